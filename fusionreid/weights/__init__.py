"""Weights: files as others wrote them, entry names, strict loading. Importing this package does not import torch."""

from typing import TYPE_CHECKING, Any

from fusionreid.weights.pretrained import WeightsError, check_weights

if TYPE_CHECKING:
    from fusionreid.weights.loading import (
        LoadReport,
        load_finetune,
        load_imagenet,
        load_pretrained,
        load_published,
        published_names,
    )

__all__ = [
    "LoadReport",
    "WeightsError",
    "check_weights",
    "load_finetune",
    "load_imagenet",
    "load_pretrained",
    "load_published",
    "published_names",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fusionreid.weights import loading

    return getattr(loading, name)
