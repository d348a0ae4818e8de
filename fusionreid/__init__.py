"""FusionReID: the model, its losses and its weights. Importing this package does not import torch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusionreid.engine.embedder import Embedder
    from fusionreid.model import FusionReID, Outputs, build_model

__all__ = ["Embedder", "FusionReID", "Outputs", "__version__", "build_model"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("fusionreid.engine.embedder" if name == "Embedder" else "fusionreid.model"), name)
