"""The start of every weight: the distribution that the published code draws it from."""

import json

import pytest
import torch

from fusionreid.weights import published_names
from tests.numerics import FIXTURES
from tests.recorded_model import tiny_model

RECORDED = json.loads((FIXTURES / "modules/start.json").read_text())  # mean, deviation, largest magnitude
CNN = "resnet.base."  # He's start; the published code leaves torch's and loads weights over it
ZERO = "transformer.base.patch_embed.proj.bias"  # as all biases of the ViT; CLIP's files have none


def test_every_weight_starts_as_published() -> None:
    torch.manual_seed(1111)
    model = tiny_model(1, share="none")
    names, compared = published_names(model), 0
    for name, weight in model.named_parameters():
        if names[name].startswith(CNN):
            continue
        mean, deviation, largest = RECORDED[names[name]] if names[name] != ZERO else (0.0, 0.0, 0.0)
        count, found = weight.numel(), weight.detach().double()
        if deviation == 0:
            assert (found == mean).all(), name
        else:  # both are samples: five standard errors of a normal's deviation and of the mean
            assert found.std(correction=0).item() == pytest.approx(deviation, rel=5 / count**0.5), name
            assert abs(found.mean().item() - mean) < 7 * deviation / count**0.5, name
            assert count < 5000 or found.abs().max().item() == pytest.approx(largest, rel=0.4), name
        compared += 1
    assert compared > 80
