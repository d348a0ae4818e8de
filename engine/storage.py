"""The error of a disk that does not take what is to be kept."""

from fusionreid.errors import ReIDError


class StorageError(ReIDError, OSError):
    """The disk did not take what was to be kept; what was there before is untouched."""

    exit_code = 4
