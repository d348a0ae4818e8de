"""Writes docs/promises.md: which faults this very session injected, and what became of each.

`pytest -m sweep --promises` does; rows of tests that did not run stay as they were. A test of the sweep counts its
cases with `tally`; for the rows of `FAULTS` each case of the tests named there is one fault.
"""

import datetime
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests import ROOT
from tests.faults import FAULTS

PAGE = ROOT / "docs/promises.md"
KINDS = "survived", "told", "refused", "lost"
SWEEPS, ROWS = "## In thousands", "## One by one"


class Tally:
    """What became of the cases of a test; at its end, one that is lost fails it."""

    def __init__(self) -> None:
        self.kinds: Counter[str] = Counter()
        self.lost: list[str] = []

    def add(self, kind: str, what: str) -> None:
        """Count a case; `what` was done in it, and what came of it."""
        if kind not in KINDS[:3]:
            self.lost.append(f"{kind}: {what}")
        self.kinds[kind if kind in KINDS else "lost"] += 1


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Iterator[Tally]:
    found = Tally()
    yield found
    promise = request.node.get_closest_marker("promise").args[0]
    request.node.user_properties.append(("tally", (promise, dict(found.kinds))))
    assert not found.lost, "\n".join([f"{len(found.lost)} of {found.kinds.total()} are lost", *found.lost[:20]])
    assert found.kinds.total(), "no case was counted"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--promises", action="store_true", help="write docs/promises.md from what the tests found")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.promises and not hasattr(config, "workerinput"):  # the main process has all reports
        config.pluginmanager.register(Page(), "promises")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Have the sweep run the tests of `FAULTS` too where it writes the page."""
    rows = {f"tests/{test.replace('::', '.py::')}" for tests in FAULTS.values() for test in tests}
    for item in items:
        if config.option.promises and item.nodeid.partition("[")[0] in rows:
            item.add_marker(pytest.mark.sweep)


class Page:
    """Collects reports, and writes the page when the session ends."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()  # by promise
        self.tallies: dict[str, Counter[str]] = {}  # of all cases of a test
        self.shown: dict[str, str] = {}  # promise -> its test
        self.broken: set[str] = set()  # nodes that failed
        self.passed: Counter[str] = Counter()  # by test without parameters
        self.failed: Counter[str] = Counter()
        self.took: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        node = report.nodeid
        for name, value in report.user_properties:
            if name == "tally" and report.when == "teardown":
                promise, kinds = value
                kinds["lost"] = max(kinds.get("lost", 0), int(node in self.broken))
                self.tallies.setdefault(promise, Counter()).update(kinds)
                self.shown[promise] = node.partition("[")[0]
                self.seconds[promise] += self.took[node]
        self.took[node] += report.duration
        test = node.removeprefix("tests/").partition("[")[0].replace(".py::", "::")
        self.took[test] += report.duration
        if report.failed:
            self.broken.add(node)
        if report.when == "call" and not report.skipped:
            (self.passed if report.passed else self.failed)[test] += 1

    def pytest_sessionfinish(self) -> None:
        sweeps, rows = read(PAGE)
        today = datetime.datetime.now(datetime.UTC).date().isoformat()
        for promise, kinds in self.tallies.items():
            numbers = [kinds.total(), *(kinds[kind] for kind in KINDS), round(self.seconds[promise])]
            sweeps[promise] = [f"`pytest -m sweep {self.shown[promise]}`", *(f"{n:,}" for n in numbers), today]
        for fault, tests in FAULTS.items():
            cases, failed = (sum(count[test] for test in tests) for count in (self.passed, self.failed))
            if all(self.passed[test] + self.failed[test] for test in tests):
                shown = "<br>".join(f"`pytest tests/{test.replace('::', '.py::')}`" for test in tests)
                seconds = round(sum(self.took[test] for test in tests))
                rows[fault] = [shown, f"{cases + failed:,}", f"{failed:,}", f"{seconds:,}", today]
        PAGE.write_text(_page(sweeps, {fault: rows[fault] for fault in FAULTS if fault in rows}), encoding="utf-8")


def read(page: Path) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """The rows of both tables, by their first cell."""
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    tables = []
    for part in (text.partition(ROWS)[0], text.partition(ROWS)[2]):
        cells = [line.strip("| ").split(" | ") for line in part.splitlines() if line.startswith("| ")]
        tables.append({row[0]: row[1:] for row in cells[2:]})
    return tables[0], tables[1]


def _page(sweeps: dict[str, list[str]], rows: dict[str, list[str]]) -> str:
    heads = ["Promise", "Shown by", "Injected", "Survived", "Told", "Refused", "Lost", "Seconds", "Run on"]
    row_heads = ["Fault", "Shown by", "Cases", "Lost", "Seconds", "Run on"]
    return f"""# Promises

What a fault may do to a run, and the test that injects it. `make sweep` injects them all and writes this page; every
number below was counted by the run of that day, on two CPU cores with torch {torch.__version__.partition("+")[0]}.
Seconds are those of the test, on a machine with other work to do.

*Survived*: the result has the same bits as without the fault. *Told*: the command went on, and a warning names the file
or the remedy. *Refused*: exit code 2 to 5, and one message that names the file. *Lost*: anything else, such as another
result without a word, a traceback, or a command that hangs; one lost case fails the sweep.

{SWEEPS}

{_table(heads, sweeps)}

Which command reads which file is seen by the sweep itself, so that a new kind of file is injected into from then on.
`config.yml` and `data.csv` of a run on own data are there to be changed: what they say is followed.

{ROWS}

{_table(row_heads, rows)}
"""


def _table(heads: list[str], rows: dict[str, list[str]]) -> str:
    lines = [heads, ["---", "---", *["---:"] * (len(heads) - 3), "---"]]
    lines += [[name, *cells] for name, cells in rows.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
