"""From a checkpoint to a model: ours, or one of the published code."""

import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, Field, ValidationError
from torch import Tensor, nn

from fusionreid import FusionReID, build_model
from fusionreid.engine.checkpoints import checkpoint
from fusionreid.engine.checkpoints.checkpoint import CheckpointError
from fusionreid.engine.checkpoints.compare import compare
from fusionreid.engine.checkpoints.locate import checkpoint_at
from fusionreid.engine.config import Config, ConfigError
from fusionreid.engine.distributed import parallel
from fusionreid.weights import WeightsError, load_published
from fusionreid.weights.formats import read_state

MOST = 10**6  # persons or cameras: more were never photographed

log = logging.getLogger(__name__)


class Trainees(BaseModel, strict=True):
    """What the state.json of a checkpoint says of those whom its model was trained on."""

    classes: Annotated[int, Field(gt=0, le=MOST)]
    cameras: Annotated[list[Annotated[int, Field(ge=0, lt=MOST)]], Field(min_length=1)]
    camera_names: list[str] | None = None  # older ones do not say


class Trained(NamedTuple):
    """A model and what its training saw."""

    model: FusionReID
    cameras: tuple[int, ...]
    datasets: tuple[str, ...]  # readers of DATASETS.NAMES; empty: not known
    camera_names: tuple[str, ...]  # of the cameras, as their owner wrote them


def build(cfg: Config, num_classes: int, num_cameras: int) -> FusionReID:
    """The model that the configuration describes, before any trained weights."""
    return build_model(cfg.MODEL, image_size=cfg.INPUT.SIZE_TRAIN, num_classes=num_classes, num_cameras=num_cameras)


def load_model(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Fill a model, sharded or not, with whole CPU tensors; an entry too few, too many or misshaped raises."""
    own = model.state_dict()
    compare("the model", own, tensors)
    for name, tensor in own.items():
        parallel.local_shard(tensor).copy_(parallel.shard_like(tensors[name], tensor))


def config_of(state: Mapping[str, Any], path: Path) -> Config:
    """The configuration that a checkpoint was trained with."""
    try:
        return Config.from_dict(state["config"])
    except (KeyError, RecursionError) as error:
        raise CheckpointError(f"{path}: its state.json holds no configuration: use another checkpoint") from error
    except ConfigError as error:
        raise CheckpointError(f"{path} is of another version, whose configuration this one does not know: use that "
                              f"version\n{error}") from error  # fmt: skip


def find_checkpoint(cfg: Config) -> Path:
    """TEST.WEIGHT, or the newest checkpoint of the run in OUTPUT_DIR; `best` is the one of the highest mAP in training.

    Not by default: it is chosen by the very images that it is measured on.
    """
    if cfg.TEST.WEIGHT not in ("", "best"):
        return checkpoint_at(Path(cfg.TEST.WEIGHT).absolute(), Path(cfg.OUTPUT_DIR))
    folder = Path(cfg.OUTPUT_DIR).absolute() / "checkpoints"  # vectors are compared by the checkpoint that they are of
    best = checkpoint.best(folder) if cfg.TEST.WEIGHT else None
    path = best.path if best else checkpoint.latest(folder)
    if path is None:
        raise CheckpointError(f"no checkpoint in {folder}: train first, or name one with TEST.WEIGHT")
    if cfg.TEST.WEIGHT and not best:
        raise CheckpointError(f"no checkpoint in {folder} has been evaluated in training: leave TEST.WEIGHT empty")
    return path


def restore(path: Path, cfg: Config) -> Trained:
    """The trained model, from a checkpoint folder or a file of the published code."""
    if path.is_dir():
        tensors, state = checkpoint.load(path)
        _warn_of_differences(cfg, config_of(state, path))
        return _trained(path, tensors, state, cfg)
    published = read_state(path)
    classes = {len(t) for name, t in published.items() if t.ndim == 2 and re.search(r"classifier(_\d)?\.weight$", name)}
    if len(classes) != 1:
        raise WeightsError(f"{path} is not a trained FusionReID: it holds no classifier; name a checkpoint of one")
    cameras = max((len(t) for name, t in published.items() if t.ndim and name.endswith("sie_embed")), default=1)
    model = build(cfg, classes.pop(), cameras)
    load_published(model, published)
    return Trained(model, tuple(range(cameras)), (), _numbered(range(cameras)))


def restore_as_trained(path: Path) -> tuple[Trained, Config]:
    """The trained model of a checkpoint folder, and the configuration that it was trained with."""
    tensors, state = checkpoint.load(path)
    cfg = config_of(state, path)
    return _trained(path, tensors, state, cfg), cfg


def _trained(path: Path, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], cfg: Config) -> Trained:
    weights = tensors.get("model", {})
    try:
        seen = Trainees.model_validate(state)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"{path}: its state.json is not valid: {where}: {first['msg']}") from error
    heads = {len(t) for name, t in weights.items() if name.endswith("classifier.weight") and t.ndim}
    if heads != {seen.classes}:  # before memory is taken for so many
        raise CheckpointError(f"{path}: its state.json says {seen.classes} persons, its classifiers have {heads}")
    names = seen.camera_names or _numbered(seen.cameras)
    if len(names) != len(seen.cameras):
        raise CheckpointError(f"{path}: its state.json has {len(names)} camera_names for {len(seen.cameras)} cameras")
    model = build(cfg, seen.classes, max(seen.cameras) + 1)
    load_model(model, {**weights, **tensors.get("average", {})})  # of the weights, if one was kept
    datasets = tuple(str(one.NAMES) for one in config_of(state, path).DATASETS.sets)
    return Trained(model, tuple(seen.cameras), datasets, tuple(names))


def _numbered(cameras: Iterable[int]) -> tuple[str, ...]:
    return tuple(str(camera + 1) for camera in cameras)


def _warn_of_differences(cfg: Config, trained: Config) -> None:
    """Features mean something only in the model, and for the pixels, that were trained."""
    idle = {"DEVICE", "PRETRAIN_CHOICE", "PRETRAIN_PATH", "PRETRAIN_PATH_R", "PRETRAIN_PATH_T", "SIZE_TEST"}
    for section in ("MODEL", "INPUT"):
        ours, theirs = (getattr(c, section).model_dump() for c in (cfg, trained))
        for key, value in ours.items():
            if key not in idle and value != theirs[key]:
                log.warning("%s.%s is %s, the checkpoint was trained with %s", section, key, value, theirs[key])
