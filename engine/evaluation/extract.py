"""From images to test vectors, in equal shares by all ranks, in memory or streamed to files."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fusionreid.dataloading.bad_images import BadImages
from fusionreid.dataloading.image_files import find_images
from fusionreid.dataloading.loader import Batch, TestLoader
from fusionreid.dataloading.records import Record
from fusionreid.engine.checkpoints.load_model import find_checkpoint, restore
from fusionreid.engine.config import Config, TestConfig
from fusionreid.engine.distributed import parallel, peers
from fusionreid.engine.distributed.agreement import decide
from fusionreid.engine.distributed.numerics import set_numerics
from fusionreid.engine.distributed.parallel import Ranks
from fusionreid.engine.evaluation import embeddings
from fusionreid.engine.evaluation.embeddings import Embeddings
from fusionreid.engine.evaluation.finite import check_finite, refuse_non_finite

ROOM = 4  # a GPU keeps the features if it has room for so many times as much: ranking needs some too


def images_of(
    records: Sequence[Record], cfg: Config, ranks: Ranks, *, root: str = "", fill: bool = False
) -> TestLoader:
    """Loader of this rank's share of the records, as the configuration has them."""
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
    *,
    before_batch: Callable[[], None] = lambda: None,
) -> Tensor:
    """Test vectors (N, D) in fp32 of all images of all ranks, in order, on every rank.

    They are on the ranks' GPUs if every rank has room for them there, else in host memory. `cameras` are those that
    training saw. `before_batch` is called by all ranks before each batch and may raise to end the work there.
    """
    share, done = -(-len(images.records) // ranks.world_size), 0
    rows = torch.empty(0)
    for vectors in embedded_batches(model, images, cameras, cfg, ranks.device, before_batch):
        if not done:
            num_bytes = 4 * share * ranks.world_size * vectors.shape[1]
            device = ranks.device if parallel.fits_on_device(ROOM * num_bytes, ranks) else "cpu"
            rows = torch.empty(share, vectors.shape[1], device=device)
        rows[done : done + len(vectors)] = vectors
        done += len(vectors)
    peers.meet()  # one rank's disk may be much slower than another's
    features = parallel.gather_rows(rows)[: len(images.records)]
    check_finite(features, images.records)
    return features


def embedded_batches(
    model: nn.Module,
    images: Iterable[Batch],
    cameras: Sequence[int],
    cfg: Config,
    device: torch.device,
    before_batch: Callable[[], None] = lambda: None,
) -> Iterator[Tensor]:
    """Yield the test vectors (b, D) of one batch of images after the other, fp32 on the device.

    All batches have the same size for a model that is compiled or tuned for a shape, which then happens once; on a
    CPU without compilation the last one is as small as it is.
    """
    fixed = device.type != "cpu" or cfg.PARALLEL.COMPILE not in ("auto", "off")
    known = torch.tensor(list(cameras), dtype=torch.int64, device=device)
    model.eval()
    batches = iter(images)
    batch, size = next(batches, None), 0
    while batch is not None:
        before_batch()
        count = len(batch.images)
        size = (size if fixed else 0) or count
        seen = F.pad(known_only(batch.cameras, known), (0, size - count), value=-1)
        pixels = _padded(batch.images, size)
        with parallel.autocast(cfg.SOLVER.PRECISION, device):
            vectors = feature_vectors(model, pixels, seen, test=cfg.TEST)[:count]
        batch = next(batches, None)  # before anyone waits for these vectors: a GPU still computes them
        yield vectors


def store(
    folder: Path,
    batches: Iterable[Tensor],
    shape: tuple[int, int],
    records: Sequence[Record],
    num_query: int,
    source: Mapping[str, Any],
    ranks: Ranks,
) -> None:
    """Write a folder of embeddings, every rank a file of its rows: batches (b, D), together of this shape (n, D)."""
    fine = [torch.zeros(0, dtype=torch.bool)]

    def looked_at() -> Iterator[Tensor]:
        for vectors in batches:
            fine.append(vectors.isfinite().all(1).cpu())
            yield vectors.cpu()

    if ranks.main:
        embeddings.begin(folder)
    peers.meet()
    if not parallel.all_agree(embeddings.is_begun(folder)):
        raise embeddings.not_shared(folder, "a process does not see the folder that the first one made beside it")
    file = embeddings.write_rows(folder, looked_at(), shape, (ranks.rank, ranks.world_size))
    peers.meet()  # one rank's disk may be much slower than another's
    refuse_non_finite(parallel.gather_rows(torch.cat(fine).byte()).tolist(), records)
    files = [file] * ranks.world_size
    if ranks.world_size > 1:
        dist.all_gather_object(files, file)
    if ranks.main:
        embeddings.finish(folder, embeddings.index_of(files, shape[1], records, num_query, source))


def own_rows(count: int, ranks: Ranks) -> slice:
    """Rows of this rank where `count` images are embedded by all; the last ranks may have fewer, or none."""
    share = -(-count // ranks.world_size)
    return slice(min(ranks.rank * share, count), min((ranks.rank + 1) * share, count))


def embed_images(cfg: Config, path: Path, listed: Sequence[Record] = ()) -> Embeddings | None:
    """Embed an image or the images in a folder, or those `listed` at the path; None but on the main rank."""
    model, images, source, ranks = _model_and_images(cfg, path, listed)
    features = embed(model, images, (), cfg, ranks)
    return Embeddings(features.cpu(), tuple(images.records), 0, source) if ranks.main else None


@torch.no_grad()
def embed_to_folder(cfg: Config, path: Path, folder: Path) -> int:
    """Embed images as `embed_images` does, into a folder of embeddings; no rank holds more than a batch.

    Returns the number of images.
    """
    model, images, source, ranks = _model_and_images(cfg, path)
    mine = own_rows(len(images.records), ranks)
    num_rows = mine.stop - mine.start
    batches = embedded_batches(model, images, (), cfg, ranks.device)
    first = next(batches)

    def own() -> Iterator[Tensor]:
        done = 0
        for vectors in chain([first], batches):
            yield vectors[: max(num_rows - done, 0)]
            done += len(vectors)

    store(folder, own(), (num_rows, first.shape[1]), images.records, 0, source, ranks)
    return len(images.records)


def _model_and_images(
    cfg: Config, path: Path, listed: Sequence[Record] = ()
) -> tuple[nn.Module, TestLoader, dict[str, Any], Ranks]:
    """The trained model, this rank's share of the images at the path, and what `Embeddings.source` is to say."""
    ranks = parallel.start(cfg.MODEL.DEVICE, required="DEVICE" in cfg.MODEL.model_fields_set)
    set_numerics(cfg.SOLVER.PRECISION, deterministic=cfg.PARALLEL.DETERMINISTIC)
    bad = BadImages(cfg.DATASETS.ON_BAD, main=ranks.main)
    records = decide(lambda: bad.check_images(listed or find_images(path)), ranks)
    checkpoint = find_checkpoint(cfg)
    model = parallel.replicate(restore(checkpoint, cfg).model, ranks, cfg.PARALLEL)
    source = {"data": str(path), "checkpoint": str(checkpoint), "TEST": cfg.TEST.model_dump(mode="json")}
    return model, images_of(records, cfg, ranks), source, ranks


def feature_vectors(model: nn.Module, images: Tensor, cameras: Tensor | None, *, test: TestConfig) -> Tensor:
    """Vectors (B, D) in fp32 as TEST asks for them, of normalised images (B, 3, H, W) and cameras (B,)."""
    views = (images, images.flip(3)) if test.FLIP else (images,)
    outputs = [model(view, cameras).embedding(test.NECK_FEAT, test.FEAT).float() for view in views]
    vectors = outputs[0] if len(outputs) == 1 else (outputs[0] + outputs[1]) / 2
    return F.normalize(vectors) if test.FEAT_NORM else vectors


def known_only(cameras: Tensor, known: Tensor) -> Tensor:
    """The cameras that training saw; any other becomes -1."""
    return cameras.where(torch.isin(cameras, known), -1)


def _padded(images: Tensor, size: int) -> Tensor:
    """Images (B, 3, H, W), the last one repeated up to this number."""
    if len(images) == size:
        return images
    padded = torch.empty((size, *images.shape[1:]), dtype=images.dtype, device=images.device,
                         memory_format=torch.channels_last)  # fmt: skip
    padded[: len(images)] = images
    padded[len(images) :] = images[-1]
    return padded
