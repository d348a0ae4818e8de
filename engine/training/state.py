"""Training state as whole tensors by part, as a checkpoint holds it: model, optimizer, centers, average."""

from collections.abc import Mapping

from torch import Tensor, nn

from fusionreid.engine.checkpoints.load_model import load_model
from fusionreid.engine.distributed import parallel
from fusionreid.engine.training.optim import Optimizer
from fusionreid.engine.training.train_step import TrainStep

Parts = dict[str, dict[str, Tensor]]


def capture(model: nn.Module, step: TrainStep) -> Parts:
    """Gather the state on the CPU. All ranks call it."""
    parallel.equalise_statistics(model)
    parts = {
        "model": {name: parallel.full_tensor(t) for name, t in model.state_dict().items()},
        "optimizer": {
            entry: parallel.full_tensor(t, like=_parameter(step.optimizer, entry))
            for entry, t in step.optimizer.state().items()
        },
    }
    if step.center_loss is not None:
        parts["centers"] = {"centers": step.center_loss.centers.detach().cpu()}
    if step.ema is not None:
        parts["average"] = step.ema.state()
    return parts


def restore(parts: Mapping[str, Mapping[str, Tensor]], model: nn.Module, step: TrainStep) -> None:
    """Load what `capture` returned. All ranks call it."""
    load_model(model, parts["model"])
    entries = parts["optimizer"].items()
    step.optimizer.load({name: _shard(t, _parameter(step.optimizer, name)) for name, t in entries})
    if step.center_loss is not None:
        step.center_loss.load_state_dict(parts["centers"])
    if step.ema is not None:
        step.ema.load(parts["average"])


def _parameter(optimizer: Optimizer, entry: str) -> Tensor | None:
    """The parameter that an entry "<parameter>/<what>" of the optimiser's state belongs to."""
    return optimizer.parameters.get(entry.rsplit("/", 1)[0])


def _shard(whole: Tensor, like: Tensor | None) -> Tensor:
    return whole if like is None else parallel.shard_like(whole, like)
