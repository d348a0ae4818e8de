"""Weights from elsewhere: checkpoints of the published repository, pretrained backbones, finished models to tune."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fusionreid.backbones.resnet import TimmCNN
from fusionreid.backbones.t2t import T2TViT
from fusionreid.backbones.vit import ViT
from fusionreid.config import ModelConfig
from fusionreid.errors import ReIDError
from fusionreid.model import FusionReID, build_transformer
from fusionreid.weights.formats import Layout, best_prefix, fit_positions, read_state, renamed
from fusionreid.weights.named import find_weights
from fusionreid.weights.pretrained import CHECKPOINT_FILES, NONE, WeightsError, check_weights

__all__ = [
    "LoadReport",
    "WeightsError",
    "check_weights",
    "load_finetune",
    "load_imagenet",
    "load_pretrained",
    "load_published",
    "published_names",
]

SHOWN = 20  # rows of a table of differences
UNITS = {
    "encoders": {1: ("SEU",), 2: ("SEU1", "SEU2")},
    "fusions": {1: ("MFU",), 2: ("MUF_RES", "MFU_FORMER")},
}
# In the published state, never computed with: ImageNet's classifiers, and the CNN's neck where MODEL.NECK is no.
UNUSED = re.compile(r"(transformer\.)?base\.(fc|head)\.(weight|bias)|(resnet\.)?bottleneck\.\w+")


@dataclass(frozen=True)
class LoadReport:
    """What became of every entry of a weight file, and of every entry of the model that it lacks."""

    source: str
    loaded: list[str]
    resized: list[str]
    dropped: list[str]
    skipped: list[str]
    missing: list[str]

    def describe(self) -> str:
        """One line; names that differ only in their numbers are said once, with * in place of a number."""
        parts = [f"{len(self.loaded)} entries loaded"]
        for what, names in (
            ("resized", self.resized),
            ("dropped for their other shape", self.dropped),
            ("in the file but unused", self.skipped),
            ("not in the file, left as they were", self.missing),
        ):
            if names:
                kinds = dict.fromkeys(re.sub(r"\d+", "*", name) if len(names) > 1 else name for name in names)
                parts.append(f"{len(names)} {what} ({', '.join(kinds)})")
        return f"{self.source}: " + "; ".join(parts) + "."


def published_names(model: FusionReID) -> dict[str, str]:
    """Our entry -> the entry of the published repository's state dict."""
    fused = model.cnn is not None and model.transformer is not None
    cnn, transformer = ("resnet.", "transformer.") if fused else ("", "")
    heads = [branch for branch, part in ((cnn, model.cnn), (transformer, model.transformer)) if part is not None]
    prefixes = {
        "cnn.": f"{cnn}base.",
        "cnn_pool.": f"{cnn}gap.",
        "transformer.": f"{transformer}base.",
        "cnn_lru.": "res_LRU.",
        "cnn_lru_pool.": "gap_r.",
        "transformer_lru.": "former_LRU.",
        "transformer_lru_pool.": "gap_f.",
    }
    if isinstance(model.transformer, T2TViT):
        prefixes["transformer.patch_embed."] = f"{transformer}base.tokens_to_token."
    for i in range(len(model.heads)):
        branch, suffix = (heads[i], "") if i < len(heads) else ("", f"_{i + 1 - len(heads)}")
        prefixes[f"heads.{i}.norm."] = f"{branch}bottleneck{suffix}."
        prefixes[f"heads.{i}.classifier."] = f"{branch}classifier{suffix}."
    for i, layer in enumerate(model.htm.layers if fused else ()):
        for kind, units in (("encoders", layer.encoders), ("fusions", layer.fusions)):
            for j in range(len(units)):
                ours, theirs = f"htm.layers.{i}.{kind}.{j}.", f"HTM.blocks.{i}.{UNITS[kind][len(units)][j]}."
                prefixes[ours] = theirs if kind == "encoders" else f"{theirs}blocks.0."
                prefixes[f"{ours}block."] = f"{theirs}blocks.0."
    names = {}
    for name in model.state_dict():
        prefix = max((p for p in prefixes if name.startswith(p)), key=len)
        names[name] = prefixes[prefix] + name.removeprefix(prefix)
    return names


def load_published(model: FusionReID, state_dict: Mapping[str, Tensor]) -> LoadReport:
    """Load a state dict with the published entry names or our own, strictly but for the layers that are never used.

    Raises `WeightsError` with a table of the differences.
    """
    theirs = {renamed(name.removeprefix("module.")): value for name, value in state_dict.items()}
    ours = model.state_dict()
    named_as_ours = any(name.startswith("heads.") for name in theirs)
    names = {name: renamed(name if named_as_ours else other) for name, other in published_names(model).items()}
    unused = [name for name in theirs if name not in names.values() and UNUSED.fullmatch(name)]
    shapes = {names[name]: tuple(value.shape) for name, value in ours.items()}
    their_shapes = {name: tuple(value.shape) for name, value in theirs.items() if name not in unused}
    if shapes != their_shapes:
        raise WeightsError(_differences(shapes, their_shapes))
    _require_floats({name: theirs[names[name]] for name in ours}, ours, "published checkpoint")
    model.load_state_dict({name: theirs[names[name]] for name in ours})
    return LoadReport("published checkpoint", list(ours), [], [], unused, [])


def _differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    share, their_share = _share(ours), _share(theirs)
    head = "published checkpoint: its entries are not those of the model"
    if share and their_share and share != their_share:
        head += f"; it was made with MODEL.HTM_SHARE {their_share}, the model has {share}: set it to {their_share}"
    rows = [
        (name, str(ours.get(name, "-")), str(theirs.get(name, "-")))
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name)
    ]
    table = [("entry", "ours", "theirs"), *rows[:SHOWN]]
    widths = [max(len(row[column]) for row in table) for column in (0, 1)]
    lines = [f"  {a:{widths[0]}}  {b:{widths[1]}}  {c}" for a, b, c in table]
    more = [f"  and {len(rows) - SHOWN} more"] if len(rows) > SHOWN else []
    return "\n".join([f"{head}:", *lines, *more])


def _share(names: Mapping[str, Any]) -> str | None:
    """Return the sharing pattern that published names tell."""
    units = {match[1] for match in (re.match(r"HTM\.blocks\.0\.(\w+)\.", name) for name in names) if match}
    if not units & {"SEU", "SEU1"} or not units & {"MFU", "MUF_RES"}:
        return None
    return {(1, 0): "encoder", (0, 0): "none", (0, 1): "fusion", (1, 1): "all"}["SEU" in units, "MFU" in units]


def load_pretrained(model: FusionReID, config: ModelConfig) -> list[LoadReport]:
    """Start the model as MODEL.PRETRAIN_CHOICE says.

    imagenet: each branch from what PRETRAIN_PATH_R or _T names, a file, weights of timm, or none; checkpoint: all of it
    from PRETRAIN_PATH.
    """
    check_weights(config)
    if config.PRETRAIN_CHOICE == "checkpoint":
        return [load_finetune(model, config.PRETRAIN_PATH)]
    if config.PRETRAIN_CHOICE == "none":
        return []
    branches = (("R", model.cnn, config.PRETRAIN_PATH_R), ("T", model.transformer, config.PRETRAIN_PATH_T))
    reports = []
    for key, branch, path in branches:
        if branch is not None and path != NONE:
            named = find_weights(config, key)
            report = load_imagenet(branch, named.path if named else path)
            reports.append(replace(report, source=named.pinned) if named else report)
    return reports


def load_imagenet(backbone: nn.Module, path: str | Path) -> LoadReport:
    """Start a backbone from a `.pth` or `.safetensors` file.

    It may be of timm, torchvision, IBN-Net, DeiT, T2T-ViT, DINO, CLIP (as released, or trained by CLIP-ReID) or MoCo.
    Position tables are resized as published. Raises `WeightsError` if the file lacks a layer of the backbone or has it
    in another shape, since it is of another architecture then.
    """
    target = backbone.body if isinstance(backbone, TimmCNN) else backbone
    state = read_state(path)
    prefix = best_prefix(state, {renamed(name): value for name, value in target.state_dict().items()})
    names = {name: prefix + renamed(name) for name in target.state_dict()}
    theirs = {ours: state[name] for ours, name in names.items() if name in state}
    _require_floats(theirs, target.state_dict(), str(path))
    resized = fit_positions(theirs, _layout(target)) if isinstance(target, ViT) else []
    unused = [name for name in state if name not in names.values()]
    return _load(target, theirs, _layers(target), resized, unused, str(path))


def load_finetune(model: FusionReID, path: str | Path) -> LoadReport:
    """Start a model from a finished one: a checkpoint folder of ours, or a file of the published code.

    What has another shape is dropped, such as classifiers of other persons and the table of other cameras, but
    positions are resized. Raises `WeightsError` if less than half fits or a branch lacks its first layer,
    CheckpointError if a byte of a folder is not the one that was written.
    """
    path, names = Path(path), {name: name for name in model.state_dict()}
    tensors, settings, _ = (path / name for name in CHECKPOINT_FILES)
    own = path.is_dir()
    state = {name.removeprefix("module."): value for name, value in read_state(tensors if own else path).items()}
    names = {ours: renamed(name) for ours, name in (names if own else published_names(model)).items()}
    theirs = {ours: state[name] for ours, name in names.items() if name in state}
    _require_floats(theirs, model.state_dict(), str(path))
    resized = []
    if model.transformer is not None and "transformer.pos_embed" in theirs:
        layout = _saved_layout(settings) if own else None
        resized = fit_positions(theirs, _layout(model.transformer), layout, prefix="transformer.")
    branches = ("cnn", model.cnn), ("transformer", model.transformer)
    first = [f"{name}.{_layers(branch)[0]}" for name, branch in branches if branch is not None]
    unused = [name for name in state if name not in names.values()]
    return _load(model, theirs, first, resized, unused, str(path))


def _saved_layout(path: Path) -> Layout:
    """Return the layout of the position table of the model whose configuration a checkpoint's state.json holds."""
    try:
        config = json.loads(path.read_bytes())["config"]
        section = ModelConfig.model_validate_json(json.dumps(config["MODEL"]))
        with torch.device("meta"):
            saved = build_transformer(section, tuple(config["INPUT"]["SIZE_TRAIN"]), num_cameras=1)
    except (OSError, ValueError, KeyError, TypeError, ArithmeticError, RecursionError, ReIDError) as error:
        raise WeightsError(
            f"{path}: must hold the configuration of the checkpoint, reading it says: {error}"
        ) from error
    return _layout(saved)


def _require_floats(theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor], source: str) -> None:
    floats = {name: value for name, value in theirs.items() if ours[name].is_floating_point()}
    strange = [name for name, value in floats.items() if not value.is_floating_point() or value.dtype.itemsize < 2]
    if strange:
        raise WeightsError(
            f"{source}: {len(strange)} entries hold {theirs[strange[0]].dtype} where the model has "
            f"{ours[strange[0]].dtype}, the first is {strange[0]}; quantised weights must be saved as float again"
        )
    if broken := [name for name, value in floats.items() if not value.is_meta and not value.isfinite().all()]:
        raise WeightsError(
            f"{source}: {len(broken)} entries are not finite, the first is {broken[0]}: the file is damaged, or the "
            "training that wrote it had failed; use another"
        )


def _layers(module: nn.Module) -> list[str]:
    """Name the weights of its convolutions and linear layers; the first of them sees the pixels."""
    return [f"{name}.weight" for name, part in module.named_modules() if isinstance(part, nn.Conv2d | nn.Linear)]


def _layout(model: ViT) -> Layout:
    return model.positioned_prefix, model.grid


def _load(
    target: nn.Module,
    theirs: Mapping[str, Tensor],
    needed: Sequence[str],
    resized: list[str],
    unused: list[str],
    source: str,
) -> LoadReport:
    """Load what has the right shape; `theirs` goes by our names, `unused` are the file's other entries.

    WeightsError: a layer that is `needed` does not fit.
    """
    ours = target.state_dict()
    fits = {name: value for name, value in theirs.items() if value.shape == ours[name].shape}
    essential = [name for name in ours if not name.endswith(("num_batches_tracked", "sie_embed"))]
    fitting = sum(name in fits for name in essential)
    head = f"{source}: fits {fitting} of {len(essential)} entries of the {type(target).__name__}"
    if 2 * fitting < len(essential):
        raise WeightsError(
            f"{head}, at least half must; the file has {', '.join([*unused, *theirs][:3])}, ..., the model "
            f"{', '.join(essential[:3])}, ..."
        )
    if lost := [name for name in needed if name not in fits]:
        found = f"has the shape {tuple(theirs[lost[0]].shape)}" if lost[0] in theirs else "is not in the file"
        if lost[0] == needed[0]:
            what = f"its first layer {lost[0]} {tuple(ours[lost[0]].shape)} {found}: all after it would work on noise"
        else:
            what = (
                f"{len(lost)} of {len(needed)} layers are of another architecture: {lost[0]} "
                f"{tuple(ours[lost[0]].shape)} {found}; set MODEL.RES_NAME, RES_MODE or TRANSFORMER_TYPE to what it is"
            )
        raise WeightsError(f"{head}, but {what}; the file also has {', '.join(unused[:5]) or 'no other entries'}")
    target.load_state_dict(fits, strict=False)
    return LoadReport(
        source,
        loaded=[name for name in fits if name not in resized],
        resized=[name for name in resized if name in fits],
        dropped=[name for name in theirs if name not in fits],
        skipped=unused,
        missing=[name for name in ours if name not in theirs and not name.endswith("num_batches_tracked")],
    )
