"""The formats weight files come in: containers, wrapping dictionaries, naming schemes, position tables."""

import argparse
import pickle
import re
from collections.abc import Mapping
from math import isqrt
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fusionreid.weights.pretrained import WeightsError

Layout = tuple[int, tuple[int, int]]  # of a position table: leading rows without a place, grid
NESTS = ("state_dict_ema", "model_ema", "teacher", "state_dict", "model")  # the better weights first
RENAMES = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"tokens_to_token\.", "patch_embed."),  # T2T-ViT
        (r"\bfc_norm\.", "norm."),  # the last norm of a model that pooled before it
        (r"\bgamma_([12])$", r"ls\1.gamma"),  # DeiT III
        (r"\b(register|storage)_tokens$", "reg_token"),  # DINOv2, DINOv3
        (r"\bvisual\.conv1\.", "visual.patch_embed.proj."),  # CLIP, here to the end
        (r"\bclass_embedding$", "cls_token"),
        (r"\bpositional_embedding$", "pos_embed"),
        (r"\btransformer\.resblocks\.", "blocks."),
        (r"\bln_pre\.", "norm_pre."),
        (r"\bln_post\.", "norm."),
        (r"\bln_([12])\.", r"norm\1."),
        (r"\bin_proj_(weight|bias)$", r"qkv.\1"),
        (r"\bout_proj\.", "proj."),
        (r"\bc_fc\.", "fc1."),
        (r"\bc_proj\.", "fc2."),
    )
)
PUBLISHED_GRIDS = {211: (21, 10), 311: (31, 10)}  # rows with the class token: 256x128 and 384x128 at stride 12


def read_state(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a weight file, out of whatever dictionaries they are wrapped in. Nothing in it is executed."""
    if not Path(path).is_file():
        raise WeightsError(f"{path}: no such weight file")
    try:
        if str(path).endswith(".safetensors"):
            content = load_file(path)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):  # the arguments that DeiT and DINO save
                content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError,
            SafetensorError) as error:  # fmt: skip  # what is no pickle is read as some
        raise WeightsError(
            f"{path}: must hold tensors only, saved by torch.save or safetensors; reading it says: {error}"
        ) from error
    while nest := next(
        (key for key in NESTS if isinstance(content, dict) and isinstance(content.get(key), dict)), None
    ):
        content = content[nest]
    if not isinstance(content, dict) or not any(isinstance(value, Tensor) for value in content.values()):
        raise WeightsError(f"{path}: must hold a dictionary of tensors, got {type(content).__name__}")
    return {renamed(name): value for name, value in content.items() if isinstance(value, Tensor)}


def renamed(name: str) -> str:
    """The name in timm's scheme."""
    for pattern, replacement in RENAMES:
        name = pattern.sub(replacement, name)
    return name


def best_prefix(state: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> str:
    """What stands before the backbone's names in the file, such as `module.` or `visual.`."""
    first = next(iter(ours))
    prefixes = {"", *(name.removesuffix(first) for name in state if name.endswith(first))}

    def fit(prefix: str) -> int:
        return sum(prefix + name in state and state[prefix + name].shape == value.shape for name, value in ours.items())

    return max(sorted(prefixes, reverse=True), key=fit)  # of equals MoCo's encoder_q, not its momentum encoder_k


def position_layout(rows: int) -> Layout:
    """Leading rows without a place, and the grid, of a table: a class token, with a distillation token, or neither.

    The grid is square, or two or three times as high as wide, as ReID pretraining has it, or a published one.
    """
    if rows in PUBLISHED_GRIDS:
        return 1, PUBLISHED_GRIDS[rows]
    for prefix in (1, 2, 0):
        for aspect in (1, 2, 3):
            width = isqrt(max(rows - prefix, 0) // aspect)
            if width and aspect * width * width == rows - prefix:
                return prefix, (aspect * width, width)
    raise WeightsError(f"pos_embed: its rows must be those of a grid of 1:1, 2:1, 3:1, 21x10 or 31x10, got {rows}")


def resize_positions(
    table: Tensor, prefix: int, grid: tuple[int, int], new_prefix: int, new_grid: tuple[int, int]
) -> Tensor:
    """(1, prefix + h w, C) -> (1, new_prefix + h' w', C): bilinear; the first leading rows stay, new ones are zero."""
    places = table[:, prefix:].unflatten(1, grid).permute(0, 3, 1, 2)  # (1, C, h, w)
    places = F.interpolate(places, size=new_grid, mode="bilinear", align_corners=False)
    leading = table.new_zeros(1, new_prefix, table.shape[2])
    kept = min(prefix, new_prefix)
    leading[:, :kept] = table[:, :kept]
    return torch.cat((leading, places.flatten(2).transpose(1, 2)), 1)


def fit_positions(
    state: dict[str, Tensor], ours: Layout, layout: Layout | None = None, *, prefix: str = ""
) -> list[str]:
    """Fits the class token and the position table, if there, to our layout, in place; the names of what was resized.

    Without `layout` that of the table follows from its rows.
    """
    token, table = f"{prefix}cls_token", f"{prefix}pos_embed"
    for name in {token, table} & state.keys():
        state[name] = state[name].reshape(1, -1, state[name].shape[-1])
    if table not in state:
        return []
    rows = state[table].shape[1]
    layout = layout or (ours if rows == ours[0] + ours[1][0] * ours[1][1] else position_layout(rows))
    if layout == ours:
        return []
    if ours[0] == 0 and layout[0] and token in state:
        state[token] = state[token] + state[table][:, :1]
    state[table] = resize_positions(state[table], *layout, *ours)
    return [table]
