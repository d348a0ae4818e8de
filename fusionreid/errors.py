"""The base class of every error that a user, a data set or a disk can cause."""


class ReIDError(Exception):
    """An error whose message names the thing, the rule and the remedy; `exit_code` is how a command ends because of it.

    2: arguments, configuration or data; 3: a checkpoint; 4: storage; 5: numbers that are not finite; 6: out of memory;
    7: another process of the run has ended or hangs.
    """

    exit_code = 2


class StorageError(ReIDError, OSError):
    """The disk did not take what was to be kept; what was there before is untouched."""

    exit_code = 4
