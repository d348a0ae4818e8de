"""Training state as whole tensors, as a checkpoint holds it: captured by rank 0, restored from there to all ranks."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fusionreid.engine.checkpoints.compare import compare
from fusionreid.engine.distributed import parallel
from fusionreid.engine.distributed.parallel import Ranks
from fusionreid.engine.training.train_step import TrainStep

Parts = dict[str, dict[str, Tensor]]


class Entry(NamedTuple):
    """A tensor of the training state on this rank."""

    part: str  # file of the checkpoint
    name: str
    tensor: Tensor  # local shard, or a sharded tensor
    like: Tensor  # what it is sharded like


class StateCapture:
    """Copies of the training state in host memory: training may go on while they are written to disk.

    Beside a GPU the copies go to pinned memory, which is allocated once.
    """

    def __init__(self, model: nn.Module, step: TrainStep, ranks: Ranks) -> None:
        self._model, self._step, self._ranks = model, step, ranks
        self._pinned: dict[tuple[str, str], Tensor] = {}

    def __call__(self) -> Parts:
        """Gather the state; only rank 0 copies and returns it. All ranks call this."""
        parallel.equalise_statistics(self._model)
        parts: Parts = {}
        for part, name, tensor, like in _entries(self._model, self._step):
            whole = parallel.gather(tensor, like)
            if self._ranks.main:
                parts.setdefault(part, {})[name] = self._copy((part, name), whole)
        if self._ranks.device.type == "cuda":
            torch.cuda.synchronize(self._ranks.device)
        return parts

    def _copy(self, key: tuple[str, str], whole: Tensor) -> Tensor:
        if not whole.is_cuda:
            return whole.clone(memory_format=torch.contiguous_format)
        if key not in self._pinned:
            self._pinned[key] = torch.empty(whole.shape, dtype=whole.dtype, pin_memory=True)
        return self._pinned[key].copy_(whole, non_blocking=True)


def restore(parts: Mapping[str, Mapping[str, Tensor]] | None, model: nn.Module, step: TrainStep, ranks: Ranks) -> None:
    """Load what was captured; only rank 0 needs to have it. All ranks call this.

    CheckpointError if a part is missing, or a tensor of one that is there before the first step, as the optimiser's are
    not.
    """
    whole = _on_all_ranks(parts, ranks)
    own: Parts = {}
    for part, name, _, like in _entries(model, step):
        own.setdefault(part, {})[name] = like
    needed = dict.fromkeys([*own, "optimizer"], "present")
    compare("the state", needed, {part: "present" for part in needed if part in whole})
    for part in own.keys() - {"optimizer"}:
        compare(f"the {part}", own[part], whole[part])
    for name, tensor in own["model"].items():
        parallel.local_shard(tensor).copy_(_scatter(whole["model"][name], tensor))
    parameters = step.optimizer.parameters
    step.optimizer.load(
        {name: _scatter(t, parameters.get(name.rsplit("/", 1)[0], t)) for name, t in whole["optimizer"].items()}
    )
    if step.center_loss is not None:
        centers = step.center_loss.centers
        centers.data.copy_(_scatter(whole["centers"]["centers"], centers.data))
    if step.ema is not None:
        for name, average, like in step.ema.shards():
            average.copy_(_scatter(whole["average"][name], like))


def _entries(model: nn.Module, step: TrainStep) -> Iterator[Entry]:
    for name, tensor in model.state_dict().items():
        yield Entry("model", name, tensor, tensor)
    parameters = step.optimizer.parameters
    for name, tensor in step.optimizer.state().items():
        yield Entry("optimizer", name, tensor, parameters.get(name.rsplit("/", 1)[0], tensor))
    if step.center_loss is not None:
        yield Entry("centers", "centers", step.center_loss.centers, step.center_loss.centers)
    if step.ema is not None:
        for name, average, like in step.ema.shards():
            yield Entry("average", name, average, like)


def _on_all_ranks(parts: Mapping[str, Mapping[str, Tensor]] | None, ranks: Ranks) -> Mapping[str, Mapping[str, Tensor]]:
    """The parts on rank 0, and on the others tensors of the same shapes that nobody has filled."""
    if ranks.world_size == 1:
        assert parts is not None
        return parts
    shapes: list[Any] = [None]
    if parts is not None:
        shapes = [{part: {n: (t.shape, t.dtype) for n, t in entries.items()} for part, entries in parts.items()}]
    dist.broadcast_object_list(shapes)
    if ranks.main and parts is not None:
        return parts
    return {
        part: {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in entries.items()}
        for part, entries in shapes[0].items()
    }


def _scatter(whole: Tensor, like: Tensor) -> Tensor:
    """This rank's part, sharded as `like` is, of a CPU tensor that rank 0 has."""
    if isinstance(like, DTensor) and whole.ndim == like.ndim:
        return parallel.shard_like(whole, like)
    whole = whole.to(like.device)
    if dist.get_world_size() > 1:
        dist.broadcast(whole, 0)
    return whole
