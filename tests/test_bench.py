import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from bench import run, suite_triplet, timing
from bench.timing import Case, Settings, Work, WrongResultError, check, measure

QUICK = Settings("quick", torch.device("cpu"))
KEYS = {
    *("suite", "size", "device", "driver", "threads", "torch", "triton", "commit", "date", "digest", "case", "shape"),
    *("bytes", "operations", "provider", "rounds", "median_ms", "fast_ms", "slow_ms", "warm_ms", "peak_gib", "speed"),
    *("limit_ms", "bytes_per_s", "operations_per_s", "items", "cores"),
}


def case_of(*results: Tensor, tolerance: float = 1e-5) -> Case:
    """A provider per result, the first one ours."""

    @contextmanager
    def setup() -> Iterator[Work]:
        names = ["ours", *(f"other {i}" for i in range(1, len(results)))]
        yield Work({name: lambda value=value: (value,) for name, value in zip(names, results)}, tolerance)

    return Case("made up", "N 3", setup)


@pytest.mark.parametrize("suite", run.SUITES)
def test_every_suite_agrees_is_shown_and_recorded(suite: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
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


@pytest.mark.parametrize(
    ("results", "what"),
    [
        ((torch.ones(3), torch.tensor([1, 1, 1.01])), "result 0 of other 1 differs from that of ours by 1.0e-02"),
        ((torch.ones(3), torch.ones(3), torch.tensor([1, 1, torch.nan])), "of other 2 differs"),
        ((torch.tensor([torch.nan]), torch.tensor([torch.nan])), "result 0 of ours is not finite"),
        ((torch.ones(3), torch.ones(1, 3)), "other 1 gives"),
    ],
)
def test_a_wrong_provider_is_never_timed(results: tuple[Tensor, ...], what: str) -> None:
    with pytest.raises(WrongResultError, match=what):
        measure(case_of(*results), QUICK, 1)


def test_rounding_is_no_fault() -> None:
    with case_of(torch.ones(3), torch.ones(3) + 1e-6).setup() as work:
        check("made up", work)


def test_a_wrong_suite_ends_the_door(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    right = suite_triplet.dense
    monkeypatch.setattr(suite_triplet, "dense", lambda features, persons: 1.001 * right(features, persons))
    assert run.main(["--suite", "triplet", "--quick", "--cpu"]) == 1
    shown = capsys.readouterr()
    assert "dense, masked differs from that of ours" in shown.err
    assert not shown.out


def test_every_provider_is_called_equally_often_and_in_turn() -> None:
    calls: list[str] = []

    @contextmanager
    def setup() -> Iterator[Work]:
        def provider(name: str) -> Callable[[], tuple[Tensor]]:
            return lambda: calls.append(name) or (torch.ones(1),)

        yield Work({name: provider(name) for name in "abc"}, 0)

    _, measured = measure(Case("turns", "", setup), Settings("default", torch.device("cpu")), 0)
    assert [m.rounds for m in measured] == [5, 5, 5]
    assert "".join(calls) == "abc" + "abc" + "abc" + "bca" + "cab" + "abc" + "bca"  # check, memory, then five rounds


def test_memory_beyond_the_inputs_is_seen_on_a_cpu_too() -> None:
    call = partial(torch.ones, 2**26)
    assert timing._peak_gib(call, torch.device("cpu")) == pytest.approx(0.25, abs=0.02)


def test_a_changed_source_makes_a_record_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder, name in (("kernels", "op.py"), ("bench", "suite_made.py"), ("bench", "timing.py")):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / name).write_text("one")
    monkeypatch.setattr(run, "SUITES", ("made",))
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
    assert len({run.digest(suite) for suite in run.SUITES}) == len(run.SUITES)
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
