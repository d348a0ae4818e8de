"""JSON lines: tensors to numbers to JSON, and removal of lines that a resumed run writes again."""

import json
import logging
import math
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusionreid.files import atomic_write
from fusionreid.sealed import check_file

if TYPE_CHECKING:
    from torch import Tensor

CHECKED = re.compile(rb'(\{.*), "crc32": "([0-9a-f]{8})"\}')

log = logging.getLogger(__name__)


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


def line_of(values: Mapping[str, Any]) -> str:
    """Encode as one line of JSON that ends with a checksum of what stands before it; what is not finite is null."""
    text = json.dumps(with_nulls(values), allow_nan=False)
    return f'{text[:-1]}, "crc32": "{zlib.crc32(text.encode()):08x}"}}\n'


def is_intact(line: bytes) -> bool:
    """Whether a line's checksum is that of its content; earlier versions wrote none."""
    found = CHECKED.fullmatch(line)
    return found is None or zlib.crc32(found[1] + b"}") == int(found[2], 16)


def drop_after(path: Path, step: int, evaluated: int, period: int) -> None:
    """Remove from a file of JSON lines those after `step`, and evaluations after the step `evaluated`.

    Damaged lines go too, which is told, and so is it if none is left or the lines end before `step`, every `period` of
    which was logged.
    """
    if path.is_symlink() or path.exists():
        check_file(path)
    lines = path.read_bytes().splitlines() if path.exists() else []
    kept, damaged, logged = [], 0, 0
    for line in lines:
        try:
            values = json.loads(line)
            is_later = values["step"] > (evaluated if any(name.startswith("eval/") for name in values) else step)
            if not is_intact(line):
                raise ValueError("its checksum is not that of its content")
            if not is_later:
                kept.append(line + b"\n")
                logged = max(logged, values["step"])
        except (ValueError, TypeError, KeyError, RecursionError):
            damaged += 1
    if damaged:
        log.warning("%s: %d of %d lines are damaged and left out", path, damaged, len(lines))
    if step and not kept:
        log.warning("%s holds nothing of the first %d steps: they are lost to it", path, step)
    elif step - logged >= period:
        log.warning("%s ends with step %d, the run resumes from step %d: lines are lost", path, logged, step)
    if path.exists():
        with atomic_write(path) as file:
            file.writelines(kept)
