"""The backbones of the two branches."""

from fusionreid.errors import ReIDError


class BackboneError(ReIDError, ValueError):
    """The configuration names a backbone that does not exist or does not fit."""
