"""A line of the log is believed only with its checksum, and what a damaged log has lost is told."""

import json
from pathlib import Path

import pytest

from fusionreid.engine.monitoring.jsonl import drop_after, is_intact, line_of

VALUES = {"step": 3, "epoch": 1.0, "loss": 0.25, "triplet": [1.5, 2.5], "eval/mAP": None}


def test_every_flipped_bit_is_found_or_changes_no_number() -> None:
    line = line_of(VALUES).encode().rstrip()
    assert is_intact(line)
    believed = 0
    for bit in range(8 * len(line)):
        data = bytearray(line)
        data[bit // 8] ^= 1 << bit % 8
        try:
            found = json.loads(bytes(data))
        except ValueError:
            continue
        if is_intact(bytes(data)):
            believed += 1
            assert found.items() >= VALUES.items(), data
    assert believed < 20 * 8, "bits of the checksum itself alone"


def test_a_line_of_an_earlier_version_has_no_checksum() -> None:
    assert is_intact(b'{"step": 1, "loss": 2.0}')


def test_what_is_kept_dropped_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [line_of({"step": step, "loss": 1.0}) for step in (10, 20, 30)]
    lines.insert(2, line_of({"step": 20, "eval/mAP": 0.5}))
    path.write_text("".join(lines))
    drop_after(path, step=25, evaluated=19, period=10)
    assert path.read_text() == "".join(lines[:2])
    assert not caplog.messages
    path.write_bytes(lines[0].encode() + b"\xff\n" + lines[1].replace("1.0", "9.0").encode() + b"[" * 100_000)
    drop_after(path, step=25, evaluated=25, period=10)
    assert path.read_text() == lines[0]
    assert caplog.messages == [
        f"{path}: 3 of 4 lines are damaged and left out",
        f"{path} ends with step 10, the run resumes from step 25: lines are lost",
    ]
