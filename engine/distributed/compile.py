"""Compilation of a model or its blocks, and activation checkpointing."""

import re
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fusionreid.engine.config import ParallelConfig
from fusionreid.pooling import GeM
from fusionreid.refinement import LRU


def compile_parts(model: nn.Module, cfg: ParallelConfig, device: torch.device) -> None:
    """Apply PARALLEL.CHECKPOINT, then PARALLEL.COMPILE; sharding comes after both."""
    if cfg.CHECKPOINT:
        for block in blocks(model):
            _recompute(block)
    compile_model(model, cfg.COMPILE, device)


def compile_model(model: nn.Module, how: str, device: torch.device) -> None:
    """Compile what PARALLEL.COMPILE says: nothing, the blocks (the default on a GPU) or the whole model."""
    compiled = ("blocks" if device.type == "cuda" else "off") if how == "auto" else how
    torch._dynamo.config.recompile_limit = 64  # blocks of one kind share it, and differ in shape and mode
    for part in {"off": [], "blocks": [*blocks(model), *_more_parts(model)], "whole": [model]}[compiled]:
        part.compile(fullgraph=True, dynamic=False)


def blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of the Transformer and the layers of the HTM: many alike, and most of the work."""
    lists = [name for name, _ in model.named_modules() if name.rsplit(".", 1)[-1] in ("blocks", "layers")]
    outermost = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    return [block for name in outermost for block in model.get_submodule(name).children()]


def _more_parts(model: nn.Module) -> list[nn.Module]:
    """The residual blocks of a ResNet, and modules of many small operations on feature maps."""
    stages = [part for name, part in model.named_modules() if re.fullmatch(r"(.*\.)?layer\d", name)]
    return [block for stage in stages for block in stage.children()] + [
        part for part in model.modules() if isinstance(part, GeM | LRU)
    ]


def _recompute(block: nn.Module) -> None:
    """Make a block keep only its inputs, and compute its activations again in the backward pass."""
    forward = block.forward

    def recomputed(*args: Any, **options: Any) -> Any:  # one function per block, where the compiler begins
        return checkpoint(forward, *args, use_reentrant=False, **options)

    block.forward = recomputed
