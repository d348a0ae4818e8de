"""Baselines of `suite_step`: the published model and step, written anew from what they compute, and a plain one.

The published: every stream by itself, queries, keys and values permuted apart, a softmax between two products, keys and
values of every token projected in the fusion, a convolution of one weight per channel, images channel by channel. Six
losses with one-hot targets made on the host and six distance matrices cut by boolean indices, one optimiser group per
parameter. fp16 with a loss scaler on a GPU, else fp32; the host reads loss and accuracy after every step.
The plain one: as ours on torch's ops. Channels-last, mixed precision, few groups, no wait; the model compiled or not.
Source: FusionReID, arXiv:2412.17239, and its code. B images, N tokens, C width, H heads, D head width.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.suite_attention import projected_class_attention, sdpa_on_views
from bench.suite_triplet import dense
from bench.suite_triplet import published as triplets
from fusionreid import blocks, htm
from fusionreid.blocks import SelfAttention
from fusionreid.dataloading.loader import Batch
from fusionreid.drop_path import Draws
from fusionreid.engine.config import SolverConfig
from fusionreid.engine.distributed import parallel
from fusionreid.engine.training.optim import group_of, learning_rate
from fusionreid.htm import HEADS, MFU, SEU, HTMLayer, Pair
from fusionreid.losses import LossParts
from fusionreid.model import Outputs
from fusionreid.refinement import LRU

SMOOTHING = 0.1
FIRST_SCALE = 2.0**10  # of the loss; from torch's 2^16 on, some first steps are skipped, and compare with nothing


def as_published(model: nn.Module) -> nn.Module:
    """Return a model of the same modules and weights, whose parts compute as published."""
    forwards: dict[type[nn.Module], Callable[..., Any]]
    forwards = {LRU: _refine, SelfAttention: _attend, HTMLayer: _exchange}
    for module in model.modules():
        for kind, forward in forwards.items():
            if isinstance(module, kind):
                module.forward = partial(forward, module)
    return model.to(memory_format=torch.contiguous_format)


def _refine(lru: LRU, x: Tensor) -> Tensor:
    x = lru.act1(lru.bn1(lru.dwconv(x)))
    return lru.act2(lru.bn2(lru.ptconv(x)))


def _attend(attention: SelfAttention, x: Tensor, *_: None, **__: object) -> Tensor:
    images, tokens, width = x.shape
    qkv = attention.qkv(x).reshape(images, tokens, 3, attention.heads, -1).permute(2, 0, 3, 1, 4)
    query, key, value = qkv[0], qkv[1], qkv[2]  # (B, H, N, D)
    scores = query @ key.transpose(-2, -1) * (attention.scale or query.shape[-1] ** -0.5)
    return attention.proj((scores.softmax(-1) @ value).transpose(1, 2).reshape(images, tokens, width))


def _exchange(layer: HTMLayer, cls: Pair, tokens: Pair) -> Pair:
    """Mode 0: encode, then fuse."""
    assert layer.mode == 0
    encoders, fusions = (layer.encoders[0], layer.encoders[-1]), (layer.fusions[0], layer.fusions[-1])
    cnn, transformer = (_encode(unit, c, t) for unit, c, t in zip(encoders, cls, tokens))
    return _fuse(fusions[0], cnn[:, :1], transformer[:, 1:]), _fuse(fusions[1], transformer[:, :1], cnn[:, 1:])


def _encode(unit: SEU, cls: Tensor, tokens: Tensor) -> Tensor:
    return unit.norm(unit.block(torch.cat([cls[:, None], tokens], 1)))  # (B, 1 + N, C)


def _fuse(unit: MFU, cls: Tensor, tokens: Tensor) -> Tensor:
    attention = unit.attn
    inputs = unit.norm1(cls), attention.norm(tokens), tokens
    query, key, value = (
        linear(x).reshape(*x.shape[:2], HEADS, -1).permute(0, 2, 1, 3)
        for linear, x in zip((attention.q, attention.k, attention.v), inputs)
    )
    scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
    cls = cls + attention.proj((scores.softmax(-1) @ value).transpose(1, 2).reshape(cls.shape))
    return (cls + unit.mlp(unit.norm2(cls)))[:, 0]


def published_loss(outputs: Outputs, persons: Tensor) -> LossParts:
    """Compute the losses as published."""
    identity = torch.stack([_smoothed(logits, persons) for logits in outputs.logits])
    triplet = triplets(outputs.features, persons)
    return LossParts(identity.sum() + triplet.sum(), identity, triplet, identity.new_zeros(()))


def _smoothed(logits: Tensor, persons: Tensor) -> Tensor:
    log_p = logits.log_softmax(1)
    targets = torch.zeros(log_p.shape).scatter_(1, persons[:, None].cpu(), 1).to(persons.device)
    targets = (1 - SMOOTHING) * targets + SMOOTHING / log_p.shape[1]
    return -(targets * log_p).mean(0).sum()


def published_optimizer(model: nn.Module, solver: SolverConfig) -> torch.optim.Optimizer:
    """Make the published optimiser as it is in the first epoch."""
    groups = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            base, decay = group_of(name, solver)
            groups.append({"params": [parameter], "lr": learning_rate(1, base, solver), "weight_decay": decay})
    return torch.optim.SGD(groups, lr=solver.BASE_LR, momentum=solver.MOMENTUM)


def published_autocast(device: torch.device, exact: bool = False) -> torch.autocast:
    """Return the autocast of the published loop, or none where it must be exact."""
    return torch.autocast(device.type, dtype=torch.float16, enabled=device.type == "cuda" and not exact)


def published_step(model: nn.Module, batch: Batch, solver: SolverConfig) -> Callable[[bool], list[Tensor]]:
    """Make a step of the published loop, exact or as it is; it returns its losses (2 * heads,) and all weights."""
    device = batch.images.device
    images = batch.images.contiguous()
    optimizer = published_optimizer(model, solver)
    scaler = torch.amp.GradScaler(device.type, init_scale=FIRST_SCALE, enabled=device.type == "cuda")
    draws = Draws(model, solver.SEED, torch.arange(len(images), device=device))  # those of ours, to compare

    def step(exact: bool) -> list[Tensor]:
        draws.draw(torch.zeros((), dtype=torch.int64, device=device))
        draws.show(slice(None))
        optimizer.zero_grad()
        with published_autocast(device, exact):
            outputs = model(images, batch.cameras)
            losses = published_loss(outputs, batch.persons)
        scaler.scale(losses.total).backward()
        scaler.step(optimizer)
        scaler.update()
        (outputs.logits[0].argmax(1) == batch.persons).float().mean().item()
        losses.total.item()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return [torch.cat([losses.identity, losses.triplet]), *(p.detach() for p in model.parameters())]

    return step


def plain_step(
    model: nn.Module, batch: Batch, solver: SolverConfig, compiled: Callable[..., Any] = lambda model: model
) -> Callable[[bool], list[Tensor]]:
    """Make a plain step that returns the same."""
    device = batch.images.device
    forward = compiled(model)
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            groups.setdefault(group_of(name, solver), []).append(p)
    optimizer = torch.optim.SGD(
        [
            {"params": parameters, "lr": learning_rate(1, rate, solver), "weight_decay": decay}
            for (rate, decay), parameters in groups.items()
        ],
        momentum=solver.MOMENTUM,
    )
    draws = Draws(model, solver.SEED, torch.arange(len(batch.images), device=device))

    def step(exact: bool) -> list[Tensor]:
        draws.draw(torch.zeros((), dtype=torch.int64, device=device))
        draws.show(slice(None))
        with parallel.autocast("fp32" if exact else solver.PRECISION, device), _plain_ops():
            outputs = forward(batch.images, batch.cameras)
        identity = [F.cross_entropy(x.float(), batch.persons, label_smoothing=SMOOTHING) for x in outputs.logits]
        losses = torch.cat([torch.stack(identity), dense([x.float() for x in outputs.features], batch.persons)])
        optimizer.zero_grad()
        losses.sum().backward()
        optimizer.step()
        return [losses, *(p.detach() for p in model.parameters())]

    return step


@contextmanager
def _plain_ops() -> Iterator[None]:
    """The model's attention on torch's own ops, whatever the kernels are."""

    def dual(function: Callable[..., Tensor]) -> Callable[..., Any]:
        return lambda a, b=None, scale=None: (
            function(a, scale) if b is None else (function(a, scale), function(b, scale))
        )

    own, across = dual(sdpa_on_views), dual(projected_class_attention)
    with (
        mock.patch.object(blocks, "dual_self_attention", own),
        mock.patch.multiple(htm, dual_self_attention=own, dual_cross_attention=across),
    ):
        yield
