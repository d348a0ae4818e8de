"""Are the weight files there? Asked before torch is loaded, so that a placeholder path costs no time."""

import re
from pathlib import Path

from fusionreid.config import ModelConfig
from fusionreid.errors import ReIDError
from fusionreid.weights.checkpoint_files import MANIFEST, STATE

AUTO, NONE = "auto", "none"  # in place of a file: timm's weights of the backbone, or random ones
NAME = re.compile(  # of a model of timm, with the digest of its file
    r"(?P<name>(?!none$)[a-z]\w*(?:\.(?!(?:pth|pt|bin|ckpt|tar|th|npz|pkl|safetensors)\b)\w+)?)"
    r"(?:@sha256:(?P<digest>[0-9a-f]{64}))?"
)
CHECKPOINT_FILES = ("model.safetensors", STATE, MANIFEST)


class WeightsError(ReIDError, ValueError):
    """A weight file is missing, unreadable, or does not fit the model."""


def check_weights(config: ModelConfig) -> None:
    """Raises `WeightsError` with every key of MODEL that should name a weight file and does not."""
    if config.PRETRAIN_CHOICE == "none":
        return
    if config.PRETRAIN_CHOICE == "checkpoint":
        path = Path(config.PRETRAIN_PATH)
        if path.is_file() or all((path / name).is_file() for name in CHECKPOINT_FILES):
            return
        raise WeightsError(
            f"MODEL.PRETRAIN_PATH: no such checkpoint: {config.PRETRAIN_PATH!r}\n"
            f"Set it to a folder with {', '.join(CHECKPOINT_FILES)}, such as OUTPUT_DIR/checkpoints/step-00001234, "
            "or to a .pth file of the published code, or start otherwise: MODEL.PRETRAIN_CHOICE imagenet or none"
        )
    branches = ((config.RES_USE, "R", config.PRETRAIN_PATH_R), (config.TRANS_USE, "T", config.PRETRAIN_PATH_T))
    missing = [
        f"MODEL.PRETRAIN_PATH_{key}: no such file: {path!r}"
        for used, key, path in branches
        if used and path != NONE and not Path(path).is_file() and not NAME.fullmatch(path)
    ]
    if missing:
        remedies = (
            "Set the path of a file, the name of a model of timm, or auto, which fetches timm's weights of the "
            "backbone; or start from random weights: MODEL.PRETRAIN_CHOICE none"
        )
        raise WeightsError("\n".join([*missing, remedies]))
