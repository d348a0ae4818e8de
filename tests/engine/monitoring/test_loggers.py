"""Loggers get every number of a log; trackers are named by package, and one that fails or is absent says so."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fusionreid.engine.config import SolverConfig
from fusionreid.engine.monitoring.loggers import MissingLoggerError, check_loggers, logger_factories
from fusionreid.engine.monitoring.metrics import Metrics

STUB = """
import json, pathlib
__file = pathlib.Path(__file__).with_suffix(".log")
def _write(*call):
    with open(__file, "a") as file: file.write(json.dumps(call) + "\\n")
def init(**options): _write("init", options)
def log(values, step): _write("log", step, values)
def finish(): _write("finish")
"""


@pytest.fixture
def trackers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Both packages as far as they are used, which write down how they were called."""
    folder = tmp_path / "packages"
    folder.mkdir()
    for name in ("wandb", "trackio"):
        (folder / f"{name}.py").write_text(STUB)
        monkeypatch.delitem(sys.modules, name, raising=False)  # the real one, if another library has loaded it
    monkeypatch.syspath_prepend(folder)
    yield folder
    for name in ("wandb", "trackio"):
        sys.modules.pop(name, None)


def calls(folder: Path, name: str) -> list[list[object]]:
    return [json.loads(line) for line in (folder / f"{name}.log").read_text().splitlines()]


def test_trackers_get_what_the_log_has(tmp_path: Path, trackers: Path) -> None:
    names = ("wandb", "trackio", "tensorboard")
    check_loggers(names)
    output = tmp_path / "duke"
    factories = logger_factories(names, output, 3, "0a1b", {"EPOCHS": 2})
    log = Metrics(output, total_steps=9, start_step=3, loggers=factories)
    log.log(4, loss=0.5, identity=1.5)
    log.close()
    options = {"project": "fusionreid", "name": "duke-0a1b", "config": {"EPOCHS": 2}, "resume": "allow"}
    rest = [["log", 4, {"loss": 0.5, "identity": 1.5}], ["finish"]]
    assert calls(trackers, "trackio") == [["init", options], *rest]
    assert calls(trackers, "wandb") == [["init", options | {"id": "0a1b", "dir": str(output)}], *rest]
    assert list((output / "tensorboard").glob("events*"))


def test_a_tracker_that_is_offline_costs_its_own_curves_alone(tmp_path: Path, trackers: Path, caplog) -> None:
    (trackers / "wandb.py").write_text("def init(**_): raise ConnectionError('no route')")
    log = Metrics(tmp_path, total_steps=9, loggers=logger_factories(("wandb", "trackio"), tmp_path, 0, "0a1b", {}))
    for step in (1, 2):
        log.log(step, loss=0.5)
    log.close()
    assert [call[0] for call in calls(trackers, "trackio")] == ["init", "log", "log", "finish"]
    assert [record.getMessage().split(";")[0] for record in caplog.records] == ["wandb: no route"]


def test_a_package_that_is_not_installed_is_an_error_and_a_folder_of_its_name_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "trackio").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    with pytest.raises(MissingLoggerError, match="names trackio, which is not installed: pip install") as caught:
        check_loggers(("trackio",))
    assert caught.value.exit_code == 2
    check_loggers(())


@pytest.mark.parametrize(("written", "read"), [
    ("wandb", ("wandb",)), ("[tensorboard, trackio]", ("tensorboard", "trackio")), (("wandb",), ("wandb",)),
    (False, ()), ("", ()), ((), ()),
])  # fmt: skip
def test_loggers_are_words_or_a_list_of_them(written: object, read: tuple[str, ...]) -> None:
    assert read == SolverConfig(LOGGERS=written).LOGGERS
