"""From images to test vectors, in equal shares by all ranks, in memory or streamed to a file."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fusionreid.dataloading.bad_images import BadImages
from fusionreid.dataloading.loader import TestLoader
from fusionreid.dataloading.records import Record, find_images
from fusionreid.engine.checkpoints.load_model import find_checkpoint, restore
from fusionreid.engine.config import Config, TestConfig
from fusionreid.engine.distributed import parallel
from fusionreid.engine.distributed.parallel import Ranks
from fusionreid.engine.evaluation import embeddings
from fusionreid.engine.evaluation.embeddings import Embeddings
from fusionreid.engine.evaluation.finite import check_finite


def images_of(
    records: Sequence[Record], cfg: Config, ranks: Ranks, *, root: str = "", fill: bool = False
) -> TestLoader:
    """This rank's share of the records, as the configuration has them."""
    return TestLoader(
        records, cfg.INPUT, cfg.DATALOADER, batch_size=cfg.TEST.IMS_PER_BATCH,
        rank=ranks.rank, world_size=ranks.world_size, device=ranks.device, root=root, fill=fill,
    )  # fmt: skip


@torch.no_grad()
def embed(
    model: nn.Module,
    images: TestLoader,
    cameras: Sequence[int],
    cfg: Config,
    ranks: Ranks,
    folder: Path | None = None,
    before_batch: Callable[[], None] | None = None,
) -> Tensor:
    """Test vectors (N, D) of all images of all ranks in order, float32 on the CPU of every rank.

    `cameras` are those that training saw. With a folder the vectors lie in its draft, which the caller finishes, and no
    rank holds them all.
    """
    count = len(images.records)
    share = -(-count // ranks.world_size)
    known = torch.tensor(list(cameras), dtype=torch.int64, device=ranks.device)
    model.eval()
    rows, done = torch.empty(0), 0
    batches = iter(images)
    batch = next(batches, None)
    while batch is not None:
        if before_batch is not None:
            before_batch()
        seen = known_only(batch.cameras, known)
        with parallel.autocast(cfg.SOLVER.PRECISION, ranks.device):
            feature = feature_vectors(model, batch.images, seen, test=cfg.TEST)
        batch = next(batches, None)  # before the wait for this one's features: a GPU still computes them
        if not done:
            rows = _storage(count, share, feature.shape[1], ranks, folder)
        rows[done : done + len(feature)] = feature[: len(rows) - done].cpu()
        done += len(feature)
    if folder is None:
        features = parallel.gather_rows(rows)[:count]
    else:
        dist.barrier()
        features = embeddings.draft(folder, count, rows.shape[1], create=False)
        dist.barrier()  # only now may the draft be renamed
    check_finite(features, images.records)
    return features


def embed_images(cfg: Config, path: Path, folder: Path | None = None) -> Embeddings | None:
    """Features of the images at a path by the model of the configuration; None on all ranks but the main one."""
    ranks = parallel.start(cfg.MODEL.DEVICE, required="DEVICE" in cfg.MODEL.model_fields_set)
    records = BadImages(cfg.DATASETS.ON_BAD, main=ranks.main).check_images(find_images(path))
    checkpoint = find_checkpoint(cfg)
    model = parallel.shard(restore(checkpoint, cfg).model.to(ranks.device), ranks)
    features = embed(model, images_of(records, cfg, ranks), (), cfg, ranks, folder)
    source = {"data": str(path), "checkpoint": str(checkpoint), "TEST": cfg.TEST.model_dump(mode="json")}
    return Embeddings(features, records, 0, source) if ranks.main else None


def feature_vectors(model: nn.Module, images: Tensor, cameras: Tensor | None, *, test: TestConfig) -> Tensor:
    """What TEST asks for, (B, D) in fp32, of normalised images (B, 3, H, W)."""
    views = (images, images.flip(3)) if test.FLIP else (images,)
    parts = [model(view, cameras).embedding(test.NECK_FEAT, test.FEAT).float() for view in views]
    vectors = parts[0] if len(parts) == 1 else (parts[0] + parts[1]) / 2
    return F.normalize(vectors) if test.FEAT_NORM else vectors


def known_only(cameras: Tensor, known: Tensor) -> Tensor:
    """The cameras that training saw; any other becomes -1."""
    return cameras.where(torch.isin(cameras, known), -1)


def _storage(count: int, share: int, width: int, ranks: Ranks, folder: Path | None) -> Tensor:
    """Where this rank's rows go: (share, D) of its own, or its part of the file."""
    if folder is None:
        return torch.empty(share, width)
    if ranks.main:
        embeddings.draft(folder, count, width, create=True)
    dist.barrier()
    first = min(ranks.rank * share, count)
    return embeddings.draft(folder, count, width, create=False)[first : min(first + share, count)]
