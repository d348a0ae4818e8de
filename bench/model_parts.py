"""Parts of a model alone, forward and backward, each on the activations that the whole model gives it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fusionreid import FusionReID
from fusionreid.dataloading.loader import Batch
from fusionreid.drop_path import Draws
from fusionreid.losses import LossParts
from fusionreid.model import Outputs

SEED = 1111
PARTS = ("CNN", "Transformer", "LRU", "HTM", "heads and losses")


def prepare(
    model: FusionReID, part: str, images: Tensor, batch: Batch, autocast: Callable[[bool], torch.autocast]
) -> dict[bool, list[Tensor]]:
    """Collect the activations that the whole model gives a part, exact or not."""
    model.train()
    draws = Draws(model, SEED, torch.arange(len(images), device=images.device))
    draws.draw(torch.zeros((), dtype=torch.int64, device=images.device))
    draws.show(slice(None))
    given = {}
    for exact in (False, True):
        with autocast(exact):
            inputs = _inputs(model, part, images, batch)
        given[exact] = [x.detach().requires_grad_(x is not images) for x in inputs]
    return given


def forward_and_backward(
    model: FusionReID,
    part: str,
    given: Mapping[bool, Sequence[Tensor]],
    batch: Batch,
    autocast: Callable[[bool], torch.autocast],
    loss: Callable[[Outputs, Tensor], LossParts],
) -> Callable[[bool], list[Tensor]]:
    """Make a call, exact or not, that returns outputs and gradients, of the inputs or of a weight in early layers."""
    # A batch norm magnifies the rounding of channels that hardly vary: no gradient of the maps is compared.
    first = {"CNN": "cnn", "Transformer": "transformer", "LRU": "cnn_lru.ptconv"}.get(part)
    with torch.no_grad(), autocast(False):
        generator = torch.Generator().manual_seed(3)
        shapes = [x.shape for x in _outputs(model, part, given[False], batch, loss)]
        upstream = [torch.randn(shape, generator=generator).to(batch.images.device) for shape in shapes]

    def call(exact: bool) -> list[Tensor]:
        inputs = given[exact]
        for tensor in (*inputs, *model.parameters()):
            tensor.grad = None
        with autocast(exact):
            outputs = _outputs(model, part, inputs, batch, loss)
        torch.autograd.backward(outputs, [y.to(x.dtype) for y, x in zip(upstream, outputs)])
        watched = inputs if first is None else [next(model.get_submodule(first).parameters())]
        return [*outputs, *(x.grad for x in watched if x.grad is not None)]

    return call


@torch.no_grad()
def _inputs(model: FusionReID, part: str, images: Tensor, batch: Batch) -> list[Tensor]:
    if part in ("CNN", "Transformer"):
        return [images]
    assert model.cnn is not None
    assert model.transformer is not None
    cnn_map, tokens = model.cnn(images), model.transformer(images, batch.cameras)
    maps = [cnn_map, tokens[:, 1:].transpose(1, 2).unflatten(2, model.transformer.grid)]
    if part == "LRU":
        return maps
    if part == "HTM":
        refined = model.cnn_lru(maps[0]), model.transformer_lru(maps[1])
        local = model.cnn_lru_pool(refined[0]), model.transformer_lru_pool(refined[1])
        return [*local, *(x.flatten(2).transpose(1, 2) for x in refined)]
    return [model.cnn_pool(cnn_map), tokens[:, 0], *model.fuse(*maps)]


def _outputs(
    model: FusionReID, part: str, inputs: Sequence[Tensor], batch: Batch, loss: Callable[[Outputs, Tensor], LossParts]
) -> Sequence[Tensor]:
    calls: dict[str, Callable[[], Any]] = {
        "CNN": lambda: [model.get_submodule("cnn")(inputs[0])],
        "Transformer": lambda: [model.get_submodule("transformer")(inputs[0], batch.cameras)],
        "LRU": lambda: (model.cnn_lru(inputs[0]), model.transformer_lru(inputs[1])),
        "HTM": lambda: model.htm((inputs[0], inputs[1]), (inputs[2], inputs[3])),
    }
    if part in calls:
        return calls[part]()
    normed, logits = zip(*(head(x) for head, x in zip(model.heads, inputs)))
    return [loss(Outputs(tuple(inputs), normed, logits), batch.persons).total]
