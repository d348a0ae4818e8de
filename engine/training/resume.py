"""Where a run goes on: rank 0 chooses and verifies the checkpoint, and every rank learns what it found."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, NonNegativeInt, PositiveInt, ValidationError

from fusionreid.engine.checkpoints.checkpoint import CheckpointError
from fusionreid.engine.checkpoints.compare import compare
from fusionreid.engine.checkpoints.load_model import config_of
from fusionreid.engine.checkpoints.store import CheckpointStore
from fusionreid.engine.config import Config
from fusionreid.engine.distributed.agreement import decide
from fusionreid.engine.distributed.parallel import Ranks
from fusionreid.engine.training.state import Parts

EPOCHS = "SOLVER.MAX_EPOCHS"


class Position(BaseModel):
    """Where in the training a checkpoint was written, from its state.json."""

    epoch: PositiveInt  # the next to train, or the one it is in
    step_in_epoch: NonNegativeInt
    step: NonNegativeInt
    evaluation_due: bool = False  # once it was written; on resuming: and never finished
    path: str = ""  # of the checkpoint


def find(store: CheckpointStore | None, cfg: Config, ranks: Ranks) -> tuple[Position | None, Parts | None]:
    """Load the newest whole checkpoint on rank 0, which alone has a store; every rank gets its position, or its error.

    CheckpointError if it is of another configuration.
    """
    tensors: Parts | None = None

    def choose() -> Position | None:
        nonlocal tensors
        resumed = store.resume() if store is not None else None
        if store is None or resumed is None:
            return None
        path, tensors, state = resumed
        position = position_of(state, path, cfg)
        is_pending = store.is_pending(is_due=position.evaluation_due)
        return position.model_copy(update={"evaluation_due": is_pending, "path": str(path)})

    return decide(choose, ranks), tensors


def position_of(state: Mapping[str, Any], path: Path, cfg: Config) -> Position:
    """Read the position from the state of a checkpoint; CheckpointError if it is of another configuration."""
    ours, theirs = what_decides(cfg), what_decides(config_of(state, path))
    way = _way_on(path) if ours[EPOCHS] != theirs[EPOCHS] else ""
    compare(f"{path}: the configuration", ours, theirs, way)
    try:
        return Position.model_validate(state)
    except ValidationError as error:
        raise CheckpointError(f"{path}: its state.json is not valid: {error}") from error


def _way_on(path: Path) -> str:
    return (
        f". More epochs: the learning rate of every step depends on {EPOCHS}, so a run cannot be made longer; start "
        f"another from its weights, with MODEL.PRETRAIN_CHOICE checkpoint MODEL.PRETRAIN_PATH {path} and an OUTPUT_DIR "
        "of its own"
    )


def what_decides(cfg: Config) -> dict[str, Any]:
    """The keys that a resumed run must share with the one it continues, because the weights depend on them."""
    free = {
        "MODEL": {"DEVICE", "PRETRAIN_PATH", "PRETRAIN_PATH_R", "PRETRAIN_PATH_T"},
        "INPUT": {"SIZE_TEST"},
        "DATASETS": {"TEST", "ROOT_DIR", "ON_BAD"},
        "DATALOADER": {"NUM_WORKERS", "CACHE"},
        "SOLVER": {"CHECKPOINT_PERIOD", "EVAL_PERIOD", "LOG_PERIOD", "LOGGERS", "PROFILE"},
        "PARALLEL": {"CHECKPOINT", "COMPILE", "DETERMINISTIC", "GRAPH", "SHARD"},
    }
    values = cfg.model_dump(mode="json")
    values["DATASETS"]["NAMES"] = [one.NAMES for one in cfg.DATASETS.sets]  # wherever they lie
    return {f"{section}.{key}": value for section in free for key, value in values[section].items()
            if key not in free[section]}  # fmt: skip
