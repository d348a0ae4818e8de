"""A run on own data, trained and evaluated once for all tests of reports."""

import pytest

from fusionreid.engine.evaluate import main as evaluate
from fusionreid.engine.train import main as train
from tests.engine.reporting.own import Run, render
from tests.runs import arguments


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    root, output = tmp_path_factory.mktemp("own"), tmp_path_factory.mktemp("log") / "shop"
    render(root)
    argv = arguments(root, output, DATASETS__NAMES="folder", SOLVER__EVAL_PERIOD=1, SOLVER__MAX_EPOCHS=2)
    assert train(argv) == 0
    return Run(output, argv, (output / "report.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def evaluated(run: Run) -> Run:
    assert evaluate([*run.argv, "TEST.RE_RANKING=yes"]) == 0
    return run
