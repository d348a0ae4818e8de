import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bench import peers, run, suite_peers
from bench.peers import FinishedError, train_steps
from bench.suite_peers import MARKET, PEERS, Jobs, Training, link_first
from tests.bench.test_bench import KEYS

TRAINED = {"start_s": 4.0, "steps_s": [0.8, 0.9], "peak_gib": 1.3, "embed_s": 4.0, "images": 128, "mAP": 0.15}


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    """The arguments that name made-up sources and images of the first two persons."""
    for folder, version in PEERS.values():
        (tmp_path / "peers" / folder / version).parent.mkdir(parents=True)
        (tmp_path / "peers" / folder / version).write_text("__version__ = '1.2'\n")
    for part in ("bounding_box_train", "query", "bounding_box_test"):
        (tmp_path / MARKET / part).mkdir(parents=True)
        for person in ("-1", "0000", "0002", "0007", "0010"):
            (tmp_path / MARKET / part / f"{person}_c1s1_000001_00.jpg").touch()
    return ["--cpu", "--quick", "--peers", str(tmp_path / "peers"), "--data", str(tmp_path)]


def answer(monkeypatch: pytest.MonkeyPatch, **other: Mapping[str, Any] | str) -> list[str]:
    """Let every job answer at once, as given for its tool; a text is the last line of a failure."""
    asked = []

    def do(self: Jobs, tool: str, what: str, given: Mapping[str, Any]) -> dict[str, Any]:
        asked.append(f"{tool} {what}")
        answered = other.get(tool.replace("-", ""), {})
        if isinstance(answered, str):
            raise RuntimeError(answered)
        done = {**TRAINED, "our_mAP": 0.15} if what == "train" else {"evaluate_s": 3.0, "peak_gib": 0.5, "mAP": 0.5}
        return {**done, **answered}

    monkeypatch.setattr(Jobs, "_do", do)
    return asked


def test_rows_have_the_format_of_all_suites(
    folders: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    asked = answer(monkeypatch, ours={"steps_s": [0.4, 0.4]})
    assert run.main(["--suite", "peers", *folders, "--record", "--report"], tmp_path / "results") == 0
    (path,) = (tmp_path / "results").glob("*/peers.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(row.keys() == KEYS for row in rows)
    assert all(row["shape"].endswith("float32") and row["device"] for row in rows)
    providers = ["ours", "torchreid 1.2", "fast-reid 1.2", "boxmot 1.2"]
    for case in ("training", "embedding", "command to first step", "evaluation"):
        assert [row["provider"] for row in rows if row["case"] == case] == providers
    ours, other, *_ = rows
    assert (ours["median_ms"], ours["items"], ours["mAP"], ours["peak_gib"], ours["rounds"]) == (400, 64, 0.15, 1.3, 2)
    assert other["median_ms"] == pytest.approx(850)
    assert ours["speed"] == pytest.approx(850 / 400)
    assert next(row["median_ms"] for row in rows if row["case"] == "embedding") == pytest.approx(2000)  # of a batch
    assert asked.count("torchreid train") == 1 + suite_peers.FURTHER_STARTS  # one training serves three cases
    assert capsys.readouterr().out.count("| current |") == len(rows)


def test_what_is_missing_is_said_and_fails_nothing(
    folders: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    answer(monkeypatch)
    results = tmp_path / "results"
    assert run.main(["--suite", "peers", "--cpu", "--quick", "--record"], results) == 0
    said = capsys.readouterr().err
    assert all(f"peers: {tool} is left out: no {folder}" in said for tool, (folder, _) in PEERS.items())
    assert "--peers FOLDER" in said
    assert not results.exists()

    (tmp_path / "peers/boxmot/boxmot/__init__.py").unlink()
    assert run.main(["--suite", "peers", *folders[:4]], results) == 0
    shown = capsys.readouterr()
    assert f"peers: training and embedding are left out: no {MARKET}; give --data FOLDER" in shown.err
    assert "peers: boxmot is left out" in shown.err
    assert "| evaluation" in shown.out
    assert "| training" not in shown.out
    assert "boxmot" not in shown.out


def test_a_tool_that_fails_is_named_and_left_out(
    folders: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    asked = answer(monkeypatch, torchreid="ModuleNotFoundError: No module named 'h5py'")
    assert run.main(["--suite", "peers", *folders], tmp_path) == 0
    shown = capsys.readouterr()
    assert "peers: torchreid 1.2, training is left out: ModuleNotFoundError: No module named 'h5py'" in shown.err
    assert "torchreid" not in shown.out
    assert "| fast-reid 1.2 " in shown.out
    assert asked.count("torchreid train") == 1


@pytest.mark.parametrize(("wrong", "case"), [({"our_mAP": 0.1501}, "training"), ({"mAP": 0.5001}, "evaluation")])
def test_evaluators_that_disagree_are_not_timed(
    wrong: dict[str, float], case: str, folders: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    answer(monkeypatch, fastreid=wrong)
    assert run.main(["--suite", "peers", *folders], tmp_path) == 1
    shown = capsys.readouterr()
    assert "peers: fast-reid: its mAP is 0." in shown.err
    assert f"| {case} " not in shown.out


def test_the_first_persons_are_linked_without_distractors_and_junk(folders: list[str], tmp_path: Path) -> None:
    link_first(tmp_path / MARKET, tmp_path / "linked", Training("resnet18", 3, persons=2, test_persons=1))
    linked = sorted(str(path.relative_to(tmp_path / "linked")) for path in (tmp_path / "linked").glob("*/*.jpg"))
    assert [path.replace("_c1s1_000001_00.jpg", "") for path in linked] == [
        "bounding_box_test/0002", "bounding_box_train/0002", "bounding_box_train/0007", "query/0002"
    ]  # fmt: skip


def test_a_training_ends_after_so_many_steps_of_any_optimizer() -> None:
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    weight.grad = torch.ones(1)

    def train() -> None:
        while True:
            try:
                optimizer.step()
            except Exception as error:  # as a tool may catch what goes wrong in a step
                raise AssertionError("the end is no error") from error

    ends = train_steps(train, 3)
    assert len(ends) == 3
    assert ends == sorted(ends)
    assert weight.item() == -2
    optimizer.step()  # nobody is told any more
    assert not issubclass(FinishedError, Exception)


def test_a_job_is_done_in_a_process_of_its_own(tmp_path: Path) -> None:
    jobs = Jobs({"ours": None, "other": tmp_path}, None)
    done = jobs("ours", "evaluate", sizes=(30, 200, 16, 10, 3))
    assert done.keys() == {"evaluate_s", "peak_gib", "mAP"}
    assert 0.3 < done["mAP"] < 1
    with pytest.raises(RuntimeError, match="exit code 1: KeyError: 'other'"):
        jobs("other", "evaluate", sizes=(30, 200, 16, 10, 3))


def test_this_engine_trains_embeds_and_evaluates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    for part, persons in {"bounding_box_train": (1, 2), "query": (3, 4), "bounding_box_test": (3, 4)}.items():
        (tmp_path / "market1501" / part).mkdir(parents=True)
        for person, camera, number in itertools.product(persons, (1, 2), (1, 2)):
            file = tmp_path / "market1501" / part / f"{person:04}_c{camera}s1_{number:06}_00.jpg"
            Image.fromarray(random.integers(0, 256, (32, 16, 3), np.uint8)).save(file)
    for name, value in {"BATCH": 8, "HEIGHT": 32, "WIDTH": 16}.items():
        monkeypatch.setattr(peers, name, value)
    job = {"tool": "ours", "backbone": "resnet18", "weights": "none", "data": str(tmp_path), "folder": str(tmp_path)}
    try:
        done = peers.train({**job, "steps": 2, "embed": True, "began": perf_counter()})
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    assert (len(done["steps_s"]), done["images"], done["width"]) == (1, 16, 512)
    assert done["mAP"] == pytest.approx(done["our_mAP"], abs=1e-12)
