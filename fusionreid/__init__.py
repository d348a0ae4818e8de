"""FusionReID: the model, its losses and its weights. Importing this package does not import torch."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusionreid.model import FusionReID, Outputs, build_model

__all__ = ["FusionReID", "Outputs", "build_model"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fusionreid import model

    return getattr(model, name)
