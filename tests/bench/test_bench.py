import json
import re
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import run, suite_triplet
from bench.evaluators import in_tf32
from bench.timing import Settings
from tests.bench.test_timing import case_of

QUICK = Settings("quick", torch.device("cpu"))
KEYS = {
    *("suite", "size", "device", "driver", "threads", "torch", "triton", "commit", "date", "digest", "case", "shape"),
    *("bytes", "operations", "provider", "rounds", "median_ms", "fast_ms", "slow_ms", "warm_ms", "peak_gib", "speed"),
    *("limit_ms", "bytes_per_s", "operations_per_s", "items", "cores", "mAP", "p95_ms"),
}


@pytest.mark.parametrize("suite", run.SUITES)
def test_every_suite_agrees_is_shown_and_recorded(suite: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    if suite == "gallery":
        pytest.importorskip("lancedb", reason="LanceDB is not installed: pip install 'fusionreid[gallery]'")
    assert run.main(["--suite", suite, "--quick", "--cpu", "--record", "--report"], tmp_path) == 0
    (path,) = tmp_path.glob("*/*.jsonl")
    assert path.stem == suite
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(row.keys() == KEYS for row in rows)
    cases = import_module(f"bench.suite_{suite}").cases(QUICK)
    assert list(dict.fromkeys(row["case"] for row in rows)) == [case.name for case in cases]
    shown = capsys.readouterr().out
    for case in cases:
        mine = [row for row in rows if row["case"] == case.name]
        assert mine[0]["provider"] == "ours"
        assert len(mine) > 1
        assert max(row["speed"] for row in mine[1:]) == 1
        assert mine[0]["speed"] == min(row["median_ms"] for row in mine[1:]) / mine[0]["median_ms"]
        assert all(0 < row["fast_ms"] <= row["median_ms"] <= row["slow_ms"] for row in mine)
    assert shown.count("| current |") == len(rows)


def test_a_wrong_case_is_refused_and_keeps_no_other_from_its_numbers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    sound, wrong = case_of(torch.ones(3), torch.ones(3)), case_of(torch.ones(3), 1.001 * torch.ones(3))
    monkeypatch.setattr(suite_triplet, "cases", lambda _: [replace(wrong, name="wrong"), replace(sound, name="sound")])
    assert run.main(["--suite", "triplet", "--quick", "--cpu"]) == 1
    shown = capsys.readouterr()
    assert "triplet: wrong: result 0 of other 1 differs from that of ours" in shown.err
    assert "| wrong" not in shown.out
    assert "| sound" in shown.out


def test_tf32_is_for_the_call_alone() -> None:
    seen: list[str] = []
    in_tf32(lambda: seen.append(torch.get_float32_matmul_precision()))()
    assert [*seen, torch.get_float32_matmul_precision()] == ["high", "highest"]


def imported(path: Path) -> set[Path]:
    """The files of bench that a file imports, and theirs."""
    names = re.findall(r"^from bench\.(\w+) import", path.read_text(), re.MULTILINE)
    files = {path.with_name(f"{name}.py") for name in names}
    return files.union(*map(imported, files))


@pytest.mark.parametrize("suite", [*run.SUITES, run.PEERS])
def test_a_changed_alternative_makes_a_record_stale(suite: str) -> None:
    """An alternative may be written in another suite's file."""
    covered = {file for pattern in run.patterns(suite) for file in run.ROOT.glob(pattern)}
    compiled = {run.ROOT / "bench" / name for name in ("builds.py", "predict.py")}  # they time nothing
    assert imported(run.ROOT / f"bench/suite_{suite}.py") - compiled <= covered


def test_a_changed_source_makes_a_record_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder, name in (
        ("kernels", "op.py"),
        ("bench", "suite_made.py"),
        ("bench", "timing.py"),
        ("bench", "peak_memory.py"),
    ):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / name).write_text("one")
    monkeypatch.setattr(run, "SUITES", ("made",))
    monkeypatch.setattr(run, "PEERS", "made")
    monkeypatch.setattr(run, "import_module", lambda name: SimpleNamespace(SOURCES=("kernels/*.py",)))
    monkeypatch.setattr(run, "ROOT", tmp_path)
    rows = [
        {"suite": "made", **run.machine(QUICK.device), "digest": run.digest("made"), "case": "c", "shape": "s",
         "bytes": None, "operations": 2e9, "provider": "ours", "rounds": 5, "median_ms": 1.0, "fast_ms": 0.5,
         "slow_ms": 2.0, "warm_ms": None, "limit_ms": 0.5, "peak_gib": None, "speed": 1.5}
    ]  # fmt: skip
    run.record(rows, tmp_path / "results")
    assert "| current |" in run.report(tmp_path / "results")
    (tmp_path / "kernels/op.py").write_text("two")
    run.record([{**rows[0], "digest": run.digest("made")}], tmp_path / "results")
    *_, old, new, _, _ = run.report(tmp_path / "results").splitlines()
    assert "| **stale** |" in old
    assert "| current   |" in new
    assert "2,000" in new  # GFLOP/s: 2e9 operations in a millisecond


def test_sources_under_test_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len({run.digest(suite) for suite in (*run.SUITES, run.PEERS)}) == len(run.SUITES) + 1
    monkeypatch.setattr(run, "ROOT", tmp_path)
    with pytest.raises(FileNotFoundError, match="kernels/triplet"):
        run.digest("triplet")


def test_the_door_refuses_what_it_does_not_know(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for arguments in (["--suite", "everything"], []):
        with pytest.raises(SystemExit) as exit_code:
            run.main(arguments, tmp_path)
        assert exit_code.value.code == 2
    assert run.main(["--report"], tmp_path) == 0
    assert "nothing is recorded" in capsys.readouterr().out
