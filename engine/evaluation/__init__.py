"""Evaluation: features, exact ranking, re-ranking, measures. Importing this package does not import torch."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusionreid.engine.evaluation.rerank import k_reciprocal
    from fusionreid.engine.evaluation.retrieval import Ranking, rank

__all__ = ["Ranking", "k_reciprocal", "rank"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fusionreid.engine.evaluation import rerank, retrieval

    return getattr(rerank if name == "k_reciprocal" else retrieval, name)
