"""One training step: forward, losses of the whole batch, backward, update. Its state is tensors that stay in place."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.modules.batchnorm import _BatchNorm

from fusionreid.dataloading.loader import Batch
from fusionreid.drop_path import Draws
from fusionreid.engine.config import Config
from fusionreid.engine.distributed import parallel
from fusionreid.engine.distributed.global_batch import gather_ranks
from fusionreid.engine.distributed.parallel import Ranks
from fusionreid.engine.training.cuda_graph import Graphed
from fusionreid.engine.training.ema import EMA
from fusionreid.engine.training.optim import Optimizer
from fusionreid.errors import ReIDError
from fusionreid.losses import CenterLoss, CosineMargin, head_names, reid_loss
from fusionreid.model import Outputs


class ChunkError(ReIDError, ValueError):
    """A batch cannot be computed in as many chunks as asked for."""


class StepReport(NamedTuple):
    """What the device found: means over the steps since the last `clear` and over all ranks, as numbers on the host."""

    loss: float  # identity and triplet losses of all heads
    identity: list[float]  # by head
    triplet: list[float]  # by head
    accuracy: float
    stop_wanted: bool  # by any rank
    skipped: int  # steps in a row, by the loss scaler of fp16
    bad_step: int  # the first one with a non-finite loss, -1 if there was none


class TrainStep:
    """Enqueue training steps without waiting for the device; `read` waits and reports what it found.

    With SOLVER.ACCUMULATE a batch is embedded in chunks without a graph, the loss is that of all embeddings, and each
    chunk is computed again to pass its embeddings' gradients on: the gradient of the whole batch in the memory of one
    chunk. Batch norm normalises each chunk by its own statistics.
    Source: Gao et al., Scaling Deep Contrastive Learning Batch Size, arXiv:2101.06983.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, cfg: Config, ranks: Ranks, center_loss: CenterLoss | None = None
    ) -> None:
        self.model, self.optimizer, self.cfg, self.ranks, self.center_loss = model, optimizer, cfg, ranks, center_loss
        self.exact = parallel.is_exact(cfg.PARALLEL, ranks)
        self.ema = EMA(model, cfg.SOLVER.EMA) if cfg.SOLVER.EMA else None
        self.loss_options = loss_options(cfg, center_loss)
        self.heads = head_names(cfg.MODEL.RES_USE, cfg.MODEL.TRANS_USE)
        share, chunks = cfg.SOLVER.IMS_PER_BATCH // ranks.world_size, cfg.SOLVER.ACCUMULATE
        if share % chunks or share < 2 * chunks:
            rule = f"divide the {share} images of a process into chunks of 2 or more"
            raise ChunkError(f"SOLVER.ACCUMULATE must {rule}, got {chunks}")
        self.chunks = [slice(start, start + share // chunks) for start in range(0, share, share // chunks)]
        images = torch.arange(ranks.rank * share, (ranks.rank + 1) * share, device=ranks.device)
        self.draws = Draws(model, cfg.SOLVER.SEED, images)
        self.seed = 0
        self.number = torch.zeros((), dtype=torch.int64, device=ranks.device)
        self.wants_stop = torch.zeros((), device=ranks.device)
        # identity and triplet losses by head, accuracy, wishes to stop: summed over the steps since the last `clear`
        self._sums = torch.zeros(2 * len(self.heads) + 2, dtype=torch.float64, device=ranks.device)
        self._summed = 0  # steps in them
        self.bad_step = torch.full((), -1, device=ranks.device)  # the first with a non-finite loss
        self._work: Callable[..., None] = Graphed(self.update) if fits_graph(cfg, ranks) else self.update

    def __call__(self, batch: Batch, number: int, stop: int = 0) -> None:
        """Enqueue the step of this number, counted from 0 over all epochs; `stop` is passed on to all ranks."""
        self._seed(number)
        self.wants_stop.fill_(stop)
        self._work(batch.images, batch.persons, batch.cameras)
        self._summed += 1

    @torch.no_grad()
    def replay(self, batch: Batch, number: int) -> None:
        """Compute the forward pass of the step of this number again, with the same random numbers."""
        self._seed(number)
        self.draws.draw(self.number)
        for chunk in range(len(self.chunks)):
            self._forward(batch.images, batch.cameras, chunk)

    def read(self) -> StepReport:
        """Wait for the device and copy what it found since the last `clear`, at once."""
        found = torch.cat([self._sums, self.optimizer.skipped[None], self.bad_step[None]]).cpu()
        heads, means = len(self.heads), found[:-3] / max(self._summed, 1)
        *losses, accuracy = means.tolist()
        stop, skipped, bad_step = found[-3:].tolist()
        loss = means[:-1].sum().item()
        return StepReport(loss, losses[:heads], losses[heads:], accuracy, stop > 0, int(skipped), int(bad_step))

    def clear(self) -> None:
        """Start new means."""
        self._sums.zero_()
        self._summed = 0

    def _seed(self, number: int) -> None:
        seed = (number * self.ranks.world_size + self.ranks.rank) * len(self.chunks)
        self.seed = self.cfg.SOLVER.SEED + (seed << 32)
        torch.manual_seed(self.seed)  # of dropout: nothing random has a state to resume
        self.number.fill_(number)

    def update(self, images: Tensor, persons: Tensor, cameras: Tensor) -> None:
        """Do all that a step does on the device, and nothing that a CUDA graph could not replay."""
        self.draws.draw(self.number)
        own, embeddings = self._embed(images, cameras)
        outputs, persons = self._of_all_ranks(own, persons) if self.exact else (own, persons)
        loss = reid_loss(outputs, persons, **self.loss_options)
        self.optimizer.backward(loss.total)
        if embeddings is not None:
            self._pass_on(embeddings.grad, images, cameras)
        hit = (outputs.logits[0].argmax(1) == persons).float().mean()
        report = torch.cat([loss.identity, loss.triplet, hit[None], self.wants_stop[None]]).detach().double()
        parallel.all_reduce_mean(report)
        is_bad = ~report.isfinite().all() & (self.bad_step < 0)
        self.bad_step.copy_(torch.where(is_bad, self.number, self.bad_step))
        self.optimizer.step(self.bad_step >= 0)  # once set, no weight moves any more
        if self.center_loss is not None:
            self._learn_centers(self.center_loss, outputs.features[0].detach(), persons)
        if self.ema is not None:
            self.ema.update()
        self._sums += report

    def _forward(self, images: Tensor, cameras: Tensor, number: int) -> Outputs:
        """Compute one chunk, with the same random numbers whenever it is computed."""
        chunk = self.chunks[number]
        self.draws.show(chunk)
        if number:
            torch.manual_seed(self.seed + (number << 32))
        with parallel.autocast(self.cfg.SOLVER.PRECISION, self.ranks.device):
            return self.model(images[chunk], cameras[chunk])

    def _embed(self, images: Tensor, cameras: Tensor) -> tuple[Outputs, Tensor | None]:
        """Return the outputs of the batch and, of several chunks, the leaf they are cut from: it gets the gradient."""
        if len(self.chunks) == 1:
            return self._forward(images, cameras, 0), None
        with torch.no_grad(), frozen_statistics(self.model):
            parts = [self._forward(images, cameras, number) for number in range(len(self.chunks))]
        embeddings = torch.cat([pack(part) for part in parts]).requires_grad_()
        return unpack(embeddings, parts[0]), embeddings

    def _pass_on(self, gradient: Tensor, images: Tensor, cameras: Tensor) -> None:
        """Pass the gradient of the embeddings on to the weights, chunk by chunk; ranks add it up at the last one."""
        for number, chunk in enumerate(self.chunks):
            last = number == len(self.chunks) - 1
            if isinstance(self.model, FSDPModule):
                self.model.set_requires_gradient_sync(last)
                self.model.set_reshard_after_backward(last)
            if number == 0:
                torch.manual_seed(self.seed)
            pack(self._forward(images, cameras, number)).backward(gradient[chunk])

    def _of_all_ranks(self, outputs: Outputs, persons: Tensor) -> tuple[Outputs, Tensor]:
        return unpack(gather_ranks(pack(outputs)), outputs), gather_ranks(persons)

    def _learn_centers(self, center_loss: CenterLoss, features: Tensor, persons: Tensor) -> None:
        """Move the centers along the unweighted center loss at a rate of their own, the same on all ranks."""
        centers = center_loss.centers
        (gradient,) = torch.autograd.grad(center_loss(features, persons), centers)
        parallel.all_reduce_mean(gradient)
        centers.data -= torch.where(self.bad_step < 0, self.cfg.SOLVER.CENTER_LR * gradient, 0)
        centers.grad = None


def pack(outputs: Outputs) -> Tensor:
    """Concatenate all that the loss reads, (B, ...)."""
    return torch.cat((*outputs.features, *outputs.logits), 1)


def unpack(packed: Tensor, like: Outputs) -> Outputs:
    """Invert `pack`, for any number of images; nothing reads the normed features."""
    parts = (*like.features, *like.logits)
    columns = packed.split([part.shape[1] for part in parts], 1)
    columns = tuple(column.to(part.dtype) for column, part in zip(columns, parts))
    return Outputs(columns[: len(like.features)], (), columns[len(like.features) :])


@contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Context manager: batch norm still normalises by the batch, but its running statistics stay."""
    norms = [norm for norm in model.modules() if isinstance(norm, _BatchNorm) and norm.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


def fits_graph(cfg: Config, ranks: Ranks) -> bool:
    """Whether a step is the same launches every time: a loss scaler, several ranks or chunks prevent that."""
    plain = cfg.SOLVER.PRECISION != "fp16" and cfg.SOLVER.ACCUMULATE == 1 and not cfg.PARALLEL.CHECKPOINT
    plain &= cfg.SOLVER.OPTIMIZER_IMPL == "torch"
    return cfg.PARALLEL.GRAPH and ranks.device.type == "cuda" and ranks.world_size == 1 and plain


def loss_options(cfg: Config, center_loss: CenterLoss | None) -> dict[str, Any]:
    """Options of `reid_loss` that the configuration asks for."""
    model, solver = cfg.MODEL, cfg.SOLVER
    cosine_margin = None
    if model.ID_LOSS_TYPE != "softmax":
        cosine_margin = CosineMargin(model.ID_LOSS_TYPE, solver.COSINE_MARGIN, solver.COSINE_SCALE)
    return {
        "unit_features": model.METRIC_LOSS_TYPE == "unit_triplet",
        "margin": None if model.NO_MARGIN else solver.MARGIN,
        "label_smoothing": 0.1 if model.IF_LABELSMOOTH else 0.0,
        "cosine_margin": cosine_margin,
        "id_weight": model.ID_LOSS_WEIGHT,
        "triplet_weight": model.TRIPLET_LOSS_WEIGHT,
        "center_loss": center_loss,
        "center_weight": solver.CENTER_LOSS_WEIGHT,
        "product_dtype": parallel.DTYPES[solver.PRECISION] if solver.TRIPLET_PRODUCTS == "amp" else None,
    }
