"""Evaluation of a model: embeddings, in equal shares by all ranks, then exact ranks of every true match."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataloading import read_split
from dataloading.loader import TestLoader
from dataloading.records import DataError, Record, Split, check_images
from engine import parallel
from engine.baselines import colour_histogram
from engine.config import Config
from engine.door import make_output_folder
from engine.metrics import write_json
from engine.parallel import Ranks
from engine.report import System, rank_lists, write_html
from engine.rerank import rerank_blocks
from engine.restore import build, find_checkpoint, restore
from engine.retrieval import Ranking, check_matches, rank, rank_blocks, top_k

log = logging.getLogger(__name__)


RE_RANKING: dict[bool | str, tuple[int, int] | None] = {False: None, True: (20, 6), "published": (50, 15)}  # k1, k2


class NonFiniteError(ArithmeticError):
    """A loss or a feature is NaN or infinite; nothing was updated or scored with it."""

    exit_code = 5


@dataclass(frozen=True)
class Evaluation:
    """Features (Q, D) and (G, D) in float32 on the CPU, and what ranking them gave."""

    query: Tensor
    gallery: Tensor
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


@torch.no_grad()
def embed(model: nn.Module, records: Sequence[Record], cameras: Sequence[int], cfg: Config, ranks: Ranks) -> Tensor:
    """Test vectors (N, D) of all records in order, float32 on the CPU of every rank.

    `cameras` are those that training saw; any other counts as unknown (-1). All ranks take equally many images, the
    last one some twice, because a sharded model computes in step.
    """
    share = -(-len(records) // ranks.world_size)
    mine = [records[min(i, len(records) - 1)] for i in range(ranks.rank * share, (ranks.rank + 1) * share)]
    known = torch.zeros(max([*cameras, *(r.camera for r in records)]) + 1, dtype=torch.bool, device=ranks.device)
    known[list(cameras)] = True
    model.eval()
    parts = []
    loader = TestLoader(mine, cfg.INPUT, batch_size=cfg.TEST.IMS_PER_BATCH, num_workers=cfg.DATALOADER.NUM_WORKERS,
                        device=ranks.device)  # fmt: skip
    for batch in loader:
        with parallel.autocast(cfg.SOLVER.PRECISION, ranks.device):
            outputs = model(batch.images, torch.where(known[batch.cameras], batch.cameras, -1))
        feature = outputs.embedding(cfg.TEST.NECK_FEAT, cfg.TEST.FEAT).float()
        parts.append((F.normalize(feature) if cfg.TEST.FEAT_NORM else feature).cpu())
    loader.close()
    features = parallel.gather_rows(torch.cat(parts))[: len(records)]
    bad = [r.path for r, fine in zip(records, features.isfinite().all(1).tolist(), strict=True) if not fine]
    if bad:
        raise NonFiniteError(
            f"features of {len(bad)} of {len(records)} images are not finite, the first: {bad[:5]}; nothing was "
            "scored: look at these images, or evaluate with SOLVER.PRECISION fp32"
        )
    return features


def evaluate(model: nn.Module, split: Split, cameras: Sequence[int], cfg: Config, ranks: Ranks) -> Evaluation:
    """Embed query and gallery and rank the gallery for every query, re-ranked if TEST.RE_RANKING says so."""
    features = embed(model, (*split.query, *split.gallery), cameras, cfg, ranks)
    query, gallery = features[: len(split.query)], features[len(split.query) :]
    return Evaluation(query, gallery, rank_split(query, gallery, split, ranks, RE_RANKING[cfg.TEST.RE_RANKING]))


def rank_split(
    query: Tensor, gallery: Tensor, split: Split, ranks: Ranks, neighbourhood: tuple[int, int] | None = None
) -> Ranking:
    """The exact ranking of a split's gallery by features (Q, D) and (G, D); each rank takes its share of the queries.

    `neighbourhood` is k1 and k2 of k-reciprocal re-ranking, which every rank does whole.
    """
    ids = split_ids(split)
    if neighbourhood:
        return rank_blocks(rerank_blocks(query, gallery, *neighbourhood, metric="euclidean"), *ids)
    part = rank(query, gallery, *ids, metric="euclidean", share=(ranks.rank, ranks.world_size))
    ends = parallel.gather_rows(part.num_matches).cumsum(0)
    recomputed = int(parallel.gather_rows(torch.tensor([part.recomputed])).sum())
    return Ranking(parallel.gather_rows(part.ranks), torch.cat([ends.new_zeros(1), ends]), part.max_rank, recomputed)


def split_ids(split: Split) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Persons of query and gallery, cameras of query and gallery."""
    persons, cameras = (
        [torch.tensor([getattr(r, what) for r in records]) for records in (split.query, split.gallery)]
        for what in ("person", "camera")
    )
    return (*persons, *cameras)


def evaluate_checkpoint(cfg: Config, *, baselines: bool) -> None:
    """Evaluate a trained model on the data set of the configuration: table, metrics.json and report in OUTPUT_DIR."""
    make_output_folder(Path(cfg.OUTPUT_DIR))
    ranks = parallel.start(cfg.MODEL.DEVICE, required="DEVICE" in cfg.MODEL.model_fields_set)
    split = ranks.first(lambda: read_split(cfg.DATASETS))
    check_matches(*split_ids(split))
    check_images((*split.query, *split.gallery))
    path = find_checkpoint(cfg)
    model, cameras = restore(path, cfg)
    check_cameras(split, cameras, cfg)
    plain = cfg.model_copy(update={"TEST": cfg.TEST.model_copy(update={"RE_RANKING": False})})
    trained = evaluate(parallel.shard(model.to(ranks.device), ranks), split, cameras, plain, ranks)
    rankings = {"FusionReID": trained.ranking}
    if cfg.TEST.RE_RANKING:
        neighbourhood = RE_RANKING[cfg.TEST.RE_RANKING]
        rankings["re-ranked"] = rank_split(trained.query, trained.gallery, split, ranks, neighbourhood)
    if baselines:
        torch.manual_seed(cfg.SOLVER.SEED)
        untrained = build(cfg, split.num_persons, max(cameras) + 1).to(ranks.device)
        rankings["untrained"] = evaluate(parallel.shard(untrained, ranks), split, cameras, plain, ranks).ranking
        query, gallery = (torch.from_numpy(colour_histogram(records)) for records in (split.query, split.gallery))
        rankings["colour histogram"] = rank_split(query, gallery, split, ranks)
    if ranks.main:
        show(cfg, split, path, trained, rankings)


def show(cfg: Config, split: Split, path: Path, trained: Evaluation, rankings: Mapping[str, Ranking]) -> None:
    """Print the table and write metrics.json, ranks.png and report.html; the rank lists are those before re-ranking."""
    output = Path(cfg.OUTPUT_DIR)
    systems = [System(name, r.mAP, r.mINP, r.cmc.numpy(), r.num_valid) for name, r in rankings.items()]
    print(f"{'%':18}{'mAP':>8}{'mINP':>8}{'Rank-1':>8}{'Rank-5':>8}{'Rank-10':>8}{'queries':>9}")
    for s in systems:
        measures = (s.mAP, s.mINP, *s.cmc[[0, 4, 9]])
        print(f"{s.name:18}" + "".join(f"{100 * value:8.1f}" for value in measures) + f"{s.valid_queries:9}")
    results = {
        s.name: {"mAP": s.mAP, "mINP": s.mINP, "cmc": s.cmc.tolist(), "valid_queries": s.valid_queries,
                 "unmatched_queries": rankings[s.name].num_unmatched} for s in systems
    }  # fmt: skip
    source = {"data": split.name, "note": split.note, "checkpoint": str(path), "TEST": cfg.TEST.model_dump(mode="json")}
    write_json(output / "metrics.json", {**source, "results": results})
    distances, neighbours = top_k(trained.query, trained.gallery, *split_ids(split), k=10, metric="euclidean")
    precision = torch.full((len(split.query),), torch.nan, dtype=torch.float64)
    precision[trained.ranking.num_matches > 0] = trained.ranking.average_precisions
    shown = 1 - distances / 2 if cfg.TEST.FEAT_NORM else distances.sqrt()  # the cosine at unit length, else a distance
    picture = rank_lists(split.query, split.gallery, neighbours.numpy(), shown.numpy(), precision.numpy())
    picture.save(output / "ranks.png")
    page = {"title": "FusionReID", "systems": systems, "split": split, "config": cfg.dump(), "picture": picture}
    write_html(output / "report.html", **page)
    print(f"rank lists and CMC curves: {output / 'report.html'}")
