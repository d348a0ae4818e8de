"""Evaluation of a model: embeddings, in equal shares by all ranks, then exact ranks of every true match."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fusionreid.dataloading import read_split
from fusionreid.dataloading.bad_images import BadImages
from fusionreid.dataloading.loader import TestLoader
from fusionreid.dataloading.records import DataError, Record, Split
from fusionreid.engine.checkpoints.load_model import Trained, build, find_checkpoint, restore
from fusionreid.engine.config import Config
from fusionreid.engine.distributed import parallel
from fusionreid.engine.distributed.parallel import Ranks
from fusionreid.engine.evaluation import embeddings
from fusionreid.engine.evaluation.baselines import colour_histogram
from fusionreid.engine.evaluation.extract import embed, images_of
from fusionreid.engine.evaluation.finite import NonFiniteError, check_finite
from fusionreid.engine.evaluation.measures import Ids, expand_queries
from fusionreid.engine.evaluation.rerank import rerank_blocks
from fusionreid.engine.evaluation.retrieval import Metric, Ranking, check_matches, rank, rank_blocks
from fusionreid.engine.monitoring.manifest import describe_data
from fusionreid.engine.reporting.attention import attention_maps
from fusionreid.engine.reporting.summary import details, show, shown_queries, write_results

__all__ = ["Evaluation", "NonFiniteError", "check_cameras", "evaluate", "evaluate_checkpoint", "split_ids"]

RE_RANKING: dict[bool | str, tuple[int, int] | None] = {False: None, True: (20, 6), "published": (50, 15)}  # k1, k2


@dataclass(frozen=True)
class Evaluation:
    """Features (Q + G, D) in float32 on the CPU, queries first, and what ranking them gave."""

    features: Tensor
    ranking: Ranking


def check_cameras(split: Split, cameras: Sequence[int], cfg: Config) -> None:
    """A camera not in `cameras`, which training saw, has no embedding: an error unless TEST.SIE_UNKNOWN is mean."""
    unseen = sorted({record.camera for record in (*split.query, *split.gallery)} - set(cameras))
    embedded = cfg.MODEL.SIE_CAMERA and cfg.MODEL.TRANS_USE and max(cameras) > 0  # one camera needs no embedding
    if embedded and unseen and cfg.TEST.SIE_UNKNOWN == "error":
        raise DataError(
            f"{split.name}: query or gallery has images of cameras {[c + 1 for c in unseen]}, training had only "
            f"{[c + 1 for c in cameras]} (counted from 1), so the model has no embedding for them; set "
            "TEST.SIE_UNKNOWN mean to use the mean embedding, or train with MODEL.SIE_CAMERA no"
        )


def known_cameras(trained: Trained, split: Split, cfg: Config) -> tuple[int, ...]:
    """Cameras of the split that the model has embeddings of: of another data set than it was trained on, none."""
    if trained.dataset is None or _plain(trained.dataset) == _plain(cfg.DATASETS.NAMES):
        check_cameras(split, trained.cameras, cfg)
        return trained.cameras
    embedded = cfg.MODEL.SIE_CAMERA and cfg.MODEL.TRANS_USE and max(trained.cameras) > 0
    if embedded and cfg.TEST.SIE_UNKNOWN == "error":
        raise DataError(
            f"the checkpoint was trained on {trained.dataset}: its camera embeddings are of other cameras than "
            f"those of {split.name}; set TEST.SIE_UNKNOWN mean to use the mean one, or train with MODEL.SIE_CAMERA no"
        )
    return ()


def _plain(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name.lower()).removesuffix("reid")


def evaluate(
    model: nn.Module,
    split: Split,
    images: TestLoader,
    cameras: Sequence[int],
    cfg: Config,
    ranks: Ranks,
    *,
    before_batch: Callable[[], None] | None = None,
) -> Evaluation:
    """Embed query and gallery and rank the gallery for every query, re-ranked if TEST.RE_RANKING says so.

    `before_batch` is called by all ranks before each batch and may raise to end the evaluation there.
    """
    features = embed(model, images, cameras, cfg, ranks, before_batch=before_batch)
    rankings = rank_all("plain", features, len(split.query), split_ids(split), cfg, ranks)
    return Evaluation(features, rankings.get("re-ranked", rankings["plain"]))


def rank_all(name: str, features: Tensor, num_query: int, ids: Ids, cfg: Config, ranks: Ranks) -> dict[str, Ranking]:
    """The exact ranking by features (Q + G, D), under `name`, and those that TEST asks for beside it."""
    if ranks.device.type == "cuda" and torch.cuda.mem_get_info(ranks.device)[0] > 4 * features.nbytes:
        features = features.to(ranks.device)
    query, gallery = features[:num_query], features[num_query:]
    rankings = {name: rank_features(query, gallery, ids, ranks)}
    if cfg.TEST.QUERY_EXPANSION:
        expanded = expand_queries(query, gallery, cfg.TEST.QUERY_EXPANSION)
        rankings["expanded queries"] = rank_features(expanded, gallery, ids, ranks, metric="cosine")
    if neighbourhood := RE_RANKING[cfg.TEST.RE_RANKING]:
        share = ranks.rank, ranks.world_size
        blocks = rerank_blocks(
            features, num_query, *neighbourhood, metric="euclidean", share=share, gather=parallel.gather_rows
        )
        rankings["re-ranked"] = _merged(rank_blocks(blocks, *ids, share=share))
    return rankings


def rank_features(query: Tensor, gallery: Tensor, ids: Ids, ranks: Ranks, *, metric: Metric = "euclidean") -> Ranking:
    """The exact ranking by features (Q, D) and (G, D), on the device; each rank takes a share of the queries."""
    return _merged(rank(query.to(ranks.device), gallery, *ids, metric=metric, share=(ranks.rank, ranks.world_size)))


def _merged(part: Ranking) -> Ranking:
    """The shares of all ranks as one ranking, on every rank's CPU."""
    ends = parallel.gather_rows(part.num_matches.cpu()).cumsum(0)
    recomputed = int(parallel.gather_rows(torch.tensor([part.recomputed])).sum())
    together = parallel.gather_rows(part.ranks.cpu())
    return Ranking(together, torch.cat([ends.new_zeros(1), ends]), part.max_rank, recomputed)


def split_ids(split: Split) -> Ids:
    """Persons of query and gallery, cameras of query and gallery."""
    return record_ids((*split.query, *split.gallery), len(split.query))


def record_ids(records: Sequence[Record], num_query: int) -> Ids:
    """The same of records, queries first."""
    persons, cameras = (torch.tensor([getattr(r, what) for r in records]) for what in ("person", "camera"))
    return persons[:num_query], persons[num_query:], cameras[:num_query], cameras[num_query:]


def evaluate_checkpoint(cfg: Config, *, baselines: bool) -> None:
    """Evaluate a trained model on the data set of the configuration: table, metrics.json and report in OUTPUT_DIR."""
    folder = Path(cfg.OUTPUT_DIR) / "embeddings"
    embeddings.check_place(folder)
    ranks = parallel.start(cfg.MODEL.DEVICE, required="DEVICE" in cfg.MODEL.model_fields_set)
    path = find_checkpoint(cfg)
    trained = restore(path, cfg)
    bad = BadImages(cfg.DATASETS.ON_BAD, Path(cfg.OUTPUT_DIR), ranks.main)
    split = ranks.first(lambda: bad.check(read_split(cfg.DATASETS), ("query", "gallery")))
    ids, records = split_ids(split), (*split.query, *split.gallery)
    check_matches(*ids)
    cameras = known_cameras(trained, split, cfg)
    model = parallel.shard(trained.model.to(ranks.device), ranks)
    images = images_of(records, cfg, ranks, root=split.root)
    features = embed(model, images, cameras, cfg, ranks, folder)
    source = {
        "data": split.name, "note": split.note, "split": describe_data(split), "checkpoint": str(path),
        "TEST": cfg.TEST.model_dump(mode="json"),
    }  # fmt: skip
    if ranks.main:
        embeddings.finish(folder, features, records, len(split.query), source)
    rankings = rank_all("FusionReID", features, len(split.query), ids, cfg, ranks)
    if baselines:
        torch.manual_seed(cfg.SOLVER.SEED)
        untrained = build(cfg, split.num_persons, max(trained.cameras) + 1).to(ranks.device)
        vectors = embed(parallel.shard(untrained, ranks), images, cameras, cfg, ranks)
        rankings["untrained"] = rank_features(vectors[: len(split.query)], vectors[len(split.query) :], ids, ranks)
        query, gallery = (torch.from_numpy(colour_histogram(part)) for part in (split.query, split.gallery))
        rankings["colour histogram"] = rank_features(query, gallery, ids, ranks)
    if ranks.main:
        more = details(features, len(split.query), ids) if cfg.TEST.DETAILS else {}
        write_results(Path(cfg.OUTPUT_DIR), rankings, {**source, **more})
    maps = attention_maps(model, shown_queries(rankings["FusionReID"], split.query), cameras, cfg, ranks)
    if ranks.main:
        show(cfg, split, features, ids, rankings["FusionReID"], maps)
    parallel.finish()


def evaluate_stored(cfg: Config) -> None:
    """Rank the embeddings in TEST.EMBEDDINGS again: table and metrics.json in OUTPUT_DIR; no model, no images."""
    ranks = parallel.start("cpu")
    stored = embeddings.load(Path(cfg.TEST.EMBEDDINGS))
    ids = record_ids(stored.records, stored.num_query)
    check_matches(*ids)
    check_finite(stored.features, stored.records)
    rankings = rank_all("FusionReID", stored.features, stored.num_query, ids, cfg, ranks)
    if ranks.main:
        more = details(stored.features, stored.num_query, ids) if cfg.TEST.DETAILS else {}
        asked = {"embeddings": cfg.TEST.EMBEDDINGS, "ranking": cfg.TEST.model_dump(mode="json")}
        write_results(Path(cfg.OUTPUT_DIR), rankings, {**stored.source, **asked, **more})
    parallel.finish()
