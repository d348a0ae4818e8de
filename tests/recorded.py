"""Runs a module with the recorded made-up weights and compares it with what was recorded, in double precision."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.numerics import assert_close, entry_value, load_case, normal

EXACT = 1e-9
STORED = 1e-6  # full gradients are stored rounded to float32


def fill(module: nn.Module, published: Callable[[str], str] = str) -> nn.Module:
    """The module in float64 with the made-up values of its published entry names."""
    for name, tensor in module.state_dict().items():
        tensor.copy_(torch.from_numpy(np.asarray(entry_value(published(name), tuple(tensor.shape)))))
    return module.double()


def assert_gradient_summary(name: str, gradient: Tensor | None, summary: Sequence[float] | None) -> None:
    """`summary` is [norm, dot product with the probe of this name], or None where no gradient arrives."""
    if summary is None:
        assert gradient is None, f"{name}: has a gradient, none was recorded"
        return
    assert gradient is not None, f"{name}: no gradient"
    norm, dot = summary
    if norm < EXACT:  # its true gradient is zero, both sides hold rounding only
        assert gradient.norm() < EXACT, f"{name}: gradient {gradient.norm():.2e}, must be zero"
        return
    probe = torch.from_numpy(normal("probe/" + name, tuple(gradient.shape))).to(gradient)
    got = torch.stack([gradient.norm(), (gradient * probe).sum()])
    assert_close(f"gradient of {name}", got, torch.tensor([norm, dot], dtype=torch.float64), EXACT)


def check_case(
    path: str,
    module: nn.Module,
    call: Callable[..., Tensor | tuple[Tensor, ...]],
    *,
    mode: str = "eval",
    published: Callable[[str], str] = str,
) -> None:
    """`call` gets the recorded inputs by name and answers in the recorded order and shapes."""
    case, arrays = load_case(path)
    fill(module, published).train(mode == "train")
    inputs: dict[str, Any] = {
        name.removeprefix("in/"): torch.from_numpy(value).double().requires_grad_()
        for name, value in arrays.items()
        if name.startswith("in/") and "upstream" not in name
    }
    answer = call(**inputs)
    outputs = answer if isinstance(answer, tuple) else (answer,)
    upstream = [torch.from_numpy(arrays[f"in/upstream{i}"]).double() for i in range(len(outputs))]
    torch.autograd.backward(outputs, upstream)
    tag = f"{mode}_f64"
    for i, output in enumerate(outputs):
        assert_close(f"output {i}", output.detach(), arrays[f"{tag}/out{i}"], EXACT)
    for name, value in inputs.items():
        assert_close(f"gradient of input {name}", value.grad, arrays[f"{tag}/grad_in/{name}"], STORED)
    gradients = {published(name): parameter.grad for name, parameter in module.named_parameters()}
    assert gradients.keys() == case[f"grad_{tag}"].keys()
    for name, gradient in gradients.items():
        assert_gradient_summary(name, gradient, case[f"grad_{tag}"][name])
        if f"{tag}/grad/{name}" in arrays and case[f"grad_{tag}"][name][0] > EXACT:
            assert_close(f"gradient of {name}", gradient, arrays[f"{tag}/grad/{name}"], STORED)
    for name, buffer in module.named_buffers():
        if f"{tag}/buffer_after/{published(name)}" in arrays:
            assert_close(name, buffer, arrays[f"{tag}/buffer_after/{published(name)}"], EXACT)
