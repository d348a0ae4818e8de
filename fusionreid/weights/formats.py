"""Naming schemes of weight files, and their position tables."""

import re
from collections.abc import Mapping
from math import isqrt
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fusionreid.weights.pretrained import WeightsError
from fusionreid.weights.reading import read_tensors

Layout = tuple[int, tuple[int, int]]  # of a position table: leading rows without a place, grid
RENAMES = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"tokens_to_token\.", "patch_embed."),  # T2T-ViT
        (r"\bfc_norm\.", "norm."),  # the last norm of a model that pooled before it
        (r"\bgamma_([12])$", r"ls\1.gamma"),  # DeiT III
        (r"\b(register|storage)_tokens$", "reg_token"),  # DINOv2, DINOv3
        (r"\bconv_proj\.", "patch_embed.proj."),  # torchvision's ViT
        (r"\bclass_token$", "cls_token"),
        (r"\bencoder\.pos_embedding$", "pos_embed"),
        (r"\bencoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
        (r"\bself_attention\.", "attn."),
        (r"\b(blocks\.\d+\.mlp)\.(0|linear_1)\.", r"\1.fc1."),
        (r"\b(blocks\.\d+\.mlp)\.(3|linear_2)\.", r"\1.fc2."),
        (r"\bencoder\.ln\.", "norm."),
        (r"\bclass_embedding$", "cls_token"),  # CLIP, here to the end
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
PROBES = 8  # entries whose names tell the prefix
PUBLISHED_GRIDS = {211: (21, 10), 311: (31, 10)}  # rows with the class token: 256x128 and 384x128 at stride 12


def read_state(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a weight file under timm's names. Nothing in the file is executed."""
    return in_timm_scheme(read_tensors(path))


def in_timm_scheme(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the same tensors under the names of timm's scheme."""
    clips = [name.removesuffix("class_embedding") for name in state if name.endswith("class_embedding")]
    patches = {f"{prefix}conv1.": f"{prefix}patch_embed.proj." for prefix in clips}  # elsewhere conv1 is a CNN's
    named = {}
    for name, value in state.items():
        start = next((start for start in patches if name.startswith(start)), None)
        named[renamed(name if start is None else patches[start] + name.removeprefix(start))] = value
    return named


def renamed(name: str) -> str:
    """Return the name in timm's scheme."""
    for pattern, replacement in RENAMES:
        name = pattern.sub(replacement, name)
    return name


def best_prefix(state: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> str:
    """Return what stands before the backbone's names in the file, such as `module.` or `visual.`."""
    some = list(ours)[:PROBES]
    prefixes = {"", *(name.removesuffix(known) for known in some for name in state if name.endswith(known))}

    def fit(prefix: str) -> int:
        return sum(prefix + name in state and state[prefix + name].shape == value.shape for name, value in ours.items())

    return max(sorted(prefixes, reverse=True), key=fit)  # of equals MoCo's encoder_q, not its momentum encoder_k


def position_layout(rows: int) -> Layout:
    """Return the leading rows without a place and the grid of a table: a class token, a distillation token or none.

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
    """Resize (1, prefix + h w, C) to (1, new_prefix + h' w', C), bilinear; leading rows stay, new ones are zero."""
    places = table[:, prefix:].unflatten(1, grid).permute(0, 3, 1, 2)  # (1, C, h, w)
    places = F.interpolate(places, size=new_grid, mode="bilinear", align_corners=False)
    leading = table.new_zeros(1, new_prefix, table.shape[2])
    kept = min(prefix, new_prefix)
    leading[:, :kept] = table[:, :kept]
    return torch.cat((leading, places.flatten(2).transpose(1, 2)), 1)


def fit_positions(
    state: dict[str, Tensor], ours: Layout, layout: Layout | None = None, *, prefix: str = ""
) -> list[str]:
    """Fit class token and position table, if there, to our layout, in place; return the names of what was resized.

    Without `layout` that of the table follows from its rows.
    """
    token, table = f"{prefix}cls_token", f"{prefix}pos_embed"
    for name in {token, table} & state.keys():
        if not 1 <= state[name].ndim <= 3 or not state[name].numel():
            raise WeightsError(f"{name}: must be (1, rows, width), got {tuple(state[name].shape)}")
        state[name] = state[name].reshape(1, -1, state[name].shape[-1])
        if state[name].dtype in (torch.float16, torch.bfloat16):
            state[name] = state[name].float()  # CLIP as released; summed and resized below
    if table not in state:
        return []
    rows = state[table].shape[1]
    layout = layout or (ours if rows == ours[0] + ours[1][0] * ours[1][1] else position_layout(rows))
    if layout == ours:
        return []
    if ours[0] == 0 and layout[0] and token in state:
        if state[token].shape != state[table][:, :1].shape:
            raise WeightsError(
                f"{token}: must be as wide as {table}, got {tuple(state[token].shape)} and {tuple(state[table].shape)}"
            )
        state[token] = state[token] + state[table][:, :1]
    state[table] = resize_positions(state[table], *layout, *ours)
    return [table]
