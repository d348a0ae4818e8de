"""JSON lines: tensors to numbers to JSON, and removal of lines that a resumed run writes again."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusionreid.files import atomic_write

if TYPE_CHECKING:
    from torch import Tensor


def to_host(scalars: "Mapping[str, Tensor | list[float] | float]") -> dict[str, Any]:
    """Convert to numbers, and vectors to lists of numbers, by one copy of all tensors, which share a device."""
    import torch

    tensors = {name: value.detach() for name, value in scalars.items() if isinstance(value, torch.Tensor)}
    flat = torch.cat([t.reshape(-1).double() for t in tensors.values()]).tolist() if tensors else []
    values: dict[str, Any] = {}
    for name, value in scalars.items():
        count = tensors[name].numel() if name in tensors else 0
        if name in tensors:
            values[name] = flat[:count] if tensors[name].ndim else flat[0]
        else:
            values[name] = value if isinstance(value, list) else float(value)
        flat = flat[count:]
    return values


def points_of(values: Mapping[str, Any]) -> dict[str, float]:
    """Split vectors into one number per entry, named `triplet/0` and so on."""
    vectors = {name: value for name, value in values.items() if isinstance(value, list)}
    numbers = {name: value for name, value in values.items() if name not in vectors}
    return numbers | {f"{name}/{i}": number for name, vector in vectors.items() for i, number in enumerate(vector)}


def with_nulls(value: Any) -> Any:
    """Replace NaN and infinity by null, at any depth."""
    if isinstance(value, dict):
        return {key: with_nulls(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [with_nulls(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def drop_after(path: Path, step: int, evaluated: int) -> None:
    """Remove from a file of JSON lines those after `step`, and evaluations after the step `evaluated`."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            values = json.loads(line)
            if values["step"] <= (evaluated if any(name.startswith("eval/") for name in values) else step):
                kept.append(line)
        except (ValueError, TypeError, KeyError):
            continue  # the last line of a killed run
    with atomic_write(path, "w", encoding="utf-8") as file:
        file.write("".join(f"{line}\n" for line in kept))
