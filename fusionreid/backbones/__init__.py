"""The backbones of the two branches."""


class BackboneError(ValueError):
    """The configuration names a backbone that does not exist or does not fit."""

    exit_code = 2
