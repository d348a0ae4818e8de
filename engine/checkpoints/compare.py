"""Comparison of what a checkpoint holds with what a run has, as a table of the differences."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fusionreid.weights.checkpoint_files import CheckpointError

TABLE_ROWS = 20  # the rest is counted


def compare(what: str, ours: Mapping[str, Any], theirs: Mapping[str, Any], way: str = "") -> None:
    """CheckpointError with a table of the entries that differ, and a way on; of tensors, type and shape count."""
    keys = [*ours, *(key for key in theirs if key not in ours)]
    pairs = [(key, _text(ours, key), _text(theirs, key)) for key in keys]
    rows = [("entry", "this run", "checkpoint"), *(pair for pair in pairs if pair[1] != pair[2])]
    if len(rows) > 1:
        shown = rows[: TABLE_ROWS + 1]
        widths = [max(len(row[column]) for row in shown) for column in range(3)]
        table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in shown]
        table += [f"and {len(rows) - len(shown)} more"] if len(rows) > len(shown) else []
        raise CheckpointError(
            f"{what} of the checkpoint does not fit this run:\n  " + "\n  ".join(table) + "\n"
            f"use the configuration of the checkpoint, or another OUTPUT_DIR{way}"
        )


def _text(entries: Mapping[str, Any], key: str) -> str:
    value = entries.get(key, "absent")
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}" if isinstance(value, Tensor) else str(value)
