"""Evaluation of a model: features, then the exact rank of every true match, in equal shares by all ranks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fusionreid.dataloading.loader import TestLoader
from fusionreid.dataloading.records import DataError, Record, Split
from fusionreid.engine.config import Config
from fusionreid.engine.distributed import parallel
from fusionreid.engine.distributed.parallel import Ranks
from fusionreid.engine.evaluation.extract import embed
from fusionreid.engine.evaluation.finite import NonFiniteError
from fusionreid.engine.evaluation.measures import Ids, expand_queries
from fusionreid.engine.evaluation.rerank import rerank_blocks
from fusionreid.engine.evaluation.retrieval import Metric, Ranking, rank, rank_blocks

__all__ = [
    "Evaluation",
    "NonFiniteError",
    "check_cameras",
    "evaluate",
    "rank_all",
    "rank_features",
    "split_ids",
]

MODEL = "FusionReID"  # name of the ranking by its features as they are
LOGGED_RANKS = 1, 5, 10  # of the CMC of each evaluation
RE_RANKING: dict[bool | str, tuple[int, int] | None] = {False: None, True: (20, 6), "published": (50, 15)}  # k1, k2


@dataclass(frozen=True)
class Evaluation:
    """Features (Q + G, D) in fp32, queries first, on the device `embed` chose, and their rankings by name."""

    features: Tensor
    rankings: dict[str, Ranking]

    @property
    def ranking(self) -> Ranking:
        """The re-ranked one if TEST.RE_RANKING asks for it, else the plain one."""
        return self.rankings.get("re-ranked", self.rankings[MODEL])

    @property
    def measures(self) -> dict[str, float]:
        """Fractions for the log of a training."""
        ranks = {f"rank{k}": self.ranking.cmc[k - 1].item() for k in LOGGED_RANKS}
        return {"mAP": self.ranking.mAP, **ranks, "mINP": self.ranking.mINP}


def has_camera_embedding(cfg: Config, cameras: Sequence[int]) -> bool:
    """Whether a model trained with these cameras embeds them; one camera needs no embedding."""
    return cfg.MODEL.SIE_CAMERA and cfg.MODEL.TRANS_USE and max(cameras, default=0) > 0


def check_cameras(split: Split, cameras: Sequence[int], cfg: Config) -> None:
    """Raise DataError if a test image's camera is not among those of training and TEST.SIE_UNKNOWN is not mean."""
    unseen = sorted({record.camera for record in (*split.query, *split.gallery)} - set(cameras))
    if unseen and has_camera_embedding(cfg, cameras) and cfg.TEST.SIE_UNKNOWN == "error":
        new, known = (", ".join(split.camera_names.get(c, str(c + 1)) for c in some) for some in (unseen, cameras))
        raise DataError(
            f"{split.label}: query or gallery has images of the cameras {new}; training had only {known}, so the model "
            "has no embedding for them; set TEST.SIE_UNKNOWN mean to use the mean embedding, or train with "
            "MODEL.SIE_CAMERA no"
        )


def evaluate(
    model: nn.Module,
    split: Split,
    images: TestLoader,
    cameras: Sequence[int],
    cfg: Config,
    ranks: Ranks,
    *,
    before_batch: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Embed query and gallery and rank the gallery for every query, re-ranked if TEST.RE_RANKING says so.

    `before_batch` is called by all ranks before each batch and may raise to end the evaluation there.
    """
    features = embed(model, images, cameras, cfg, ranks, before_batch=before_batch)
    return Evaluation(features, rank_all(features, len(split.query), split_ids(split), cfg, ranks))


def rank_all(features: Tensor, num_query: int, ids: Ids, cfg: Config, ranks: Ranks) -> dict[str, Ranking]:
    """Rank exactly by features (Q + G, D), the model's own ranking first, then the further ones that TEST asks for."""
    query, gallery = features[:num_query], features[num_query:]
    rankings = {MODEL: rank_features(query, gallery, ids, ranks)}
    if cfg.TEST.QUERY_EXPANSION:
        expanded = expand_queries(query, gallery, cfg.TEST.QUERY_EXPANSION)
        rankings["expanded queries"] = rank_features(expanded, gallery, ids, ranks, metric="cosine")
    if neighbourhood := RE_RANKING[cfg.TEST.RE_RANKING]:
        share = ranks.rank, ranks.world_size
        blocks = rerank_blocks(
            features, num_query, *neighbourhood, metric="euclidean", share=share, gather=parallel.gather_rows
        )
        rankings["re-ranked"] = rank_blocks(blocks, *ids, share=share).gathered(parallel.gather_rows)
    return rankings


def rank_features(query: Tensor, gallery: Tensor, ids: Ids, ranks: Ranks, *, metric: Metric = "euclidean") -> Ranking:
    """The exact ranking by features (Q, D) and (G, D), on the device; each rank takes a share of the queries."""
    ranking = rank(query.to(ranks.device), gallery, *ids, metric=metric, share=(ranks.rank, ranks.world_size))
    return ranking.gathered(parallel.gather_rows)


def split_ids(split: Split) -> Ids:
    """Persons (Q,) and (G,) of query and gallery, then their cameras (Q,) and (G,)."""
    return record_ids((*split.query, *split.gallery), len(split.query))


def record_ids(records: Sequence[Record], num_query: int) -> Ids:
    """The ids of `split_ids` for records of queries, then gallery."""
    persons, cameras = (torch.tensor([getattr(r, what) for r in records]) for what in ("person", "camera"))
    return persons[:num_query], persons[num_query:], cameras[:num_query], cameras[num_query:]
