"""The report of a run, and of others to compare it with, from the files that they left in their folders."""

import math
from collections import ChainMap
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fusionreid.dataloading.records import PARTS, printable
from fusionreid.engine.config import Config
from fusionreid.engine.reporting.charts import COLOURS, Chart, Line, line_chart, ticks
from fusionreid.engine.reporting.html import Fact, Section, text_table, write_page
from fusionreid.engine.reporting.run_record import Counts, RunRecord, read_run
from fusionreid.engine.reporting.sections import (
    PERCENT_TICKS,
    camera_sections,
    cmc_sections,
    confusion_sections,
    pair_sections,
    query_sections,
    result_sections,
)

REPORT = "report.html"


def draw_report(output: Path, cfg: Config, compare: Sequence[Path] = (), *, quiet: bool = False) -> None:
    """Write report.html in `output` from the files there, and compare the run with those in other folders."""
    folders = [output, *compare]
    runs = [read_run(folder, name) for folder, name in zip(folders, names_of(folders))]
    results = {
        f"{run.name}, {name}" if compare else name: result
        for run in runs
        for name, result in run.metrics.results.items()
    }
    about = runs[0].metrics
    loss, measures = _loss_sections(runs), _measure_sections(runs)
    sections = [*result_sections(results), *pair_sections(about), *measures, *cmc_sections(results)]
    sections += [*camera_sections(about.camera_pairs), *confusion_sections(about.confusions)]
    sections += [*query_sections(runs[0].queries), *loss]
    if about.split:
        rows = [[part, *(f"{count:,}" for _, count in getattr(about.split, part))] for part in PARTS]
        sections.append(Section("Data", table=text_table(("", *Counts.model_fields), rows), half=True))
    if compare:
        rows = differences([run.settings for run in runs])
        sections.append(Section("Settings that differ", table=text_table(("", *(run.name for run in runs)), rows)))
    sections.append(Section("Configuration", code=cfg.dump()))
    write_page(output / REPORT, printable(output.absolute().name), _facts(runs[0]), sections)
    if not quiet:
        print(f"report: {output / REPORT}")


def _facts(run: RunRecord) -> list[Fact]:
    """Say in the head of the page what was evaluated, when, and after how much training."""
    about, epochs = run.metrics, [line.epoch for line in run.lines if math.isfinite(line.epoch)]
    took = f"{max(epochs):g} epoch{'s' * (max(epochs) != 1)}" if epochs else ""
    if run.seconds:
        took += f" in {duration(run.seconds)}"
    facts = {
        "Data": f"{about.data} {about.note}".strip(),
        "Training": took,
        "Checkpoint": printable(Path(about.checkpoint).name),
        "Evaluated": _date(about.evaluated),
        "Device": run.device,
    }
    return [Fact(name, value) for name, value in facts.items() if value]


def duration(seconds: float) -> str:
    """A duration in its two largest units."""
    units = (86_400, "d"), (3600, "h"), (60, "min"), (1, "s")
    left, texts = round(seconds), list[str]()
    for size, name in units:
        count, left = divmod(left, size)
        texts += [f"{count} {name}"] if count or texts else []
    return " ".join(texts[:2]) or "0 s"


def _date(text: str) -> str:
    try:
        return datetime.fromisoformat(text).astimezone(UTC).strftime("%-d %B %Y, %H:%M UTC")
    except ValueError:
        return text


def _loss_sections(runs: Sequence[RunRecord]) -> list[Section]:
    losses = [Line(run.name, run.curve("loss"), i, i // COLOURS) for i, run in enumerate(runs)]
    chart = _over_epochs([line for line in losses if len(line.points) > 1])
    return [Section("Training loss", chart=chart, half=True)] if chart else []


def _measure_sections(runs: Sequence[RunRecord]) -> list[Section]:
    measures = [
        Line(f"{run.name}, {measure}" if len(runs) > 1 else measure, run.curve(key, 100), i, dash)
        for i, run in enumerate(runs)
        for dash, (key, measure) in enumerate((("mAP", "mAP"), ("rank1", "Rank-1")))
    ]
    chart = _over_epochs([line for line in measures if line.points], PERCENT_TICKS)
    return [Section("mAP and Rank-1 by epoch, %", chart=chart, half=True)] if chart else []


def _over_epochs(lines: Sequence[Line], y_ticks: Sequence[float] | None = None) -> Chart | None:
    if not lines:
        return None
    last_epoch = max(epoch for line in lines for epoch, _ in line.points)
    highest = max(value for line in lines for _, value in line.points)
    return line_chart("epoch", lines, ticks(last_epoch), ticks(highest) if y_ticks is None else y_ticks)


def names_of(folders: Sequence[Path]) -> list[str]:
    """Name folders by the ends of their paths, as long as it takes to tell them apart."""
    paths = [folder.absolute().parts for folder in folders]
    names: list[str] = []
    for length in range(1, max(map(len, paths)) + 1):
        names = ["/".join(path[-length:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def differences(settings: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Make a row for every key whose value is not the same in all runs; OUTPUT_DIR always differs and is left out."""
    keys = [key for key in dict(ChainMap(*reversed(settings))) if key != "OUTPUT_DIR"]
    rows = [[key, *(str(values.get(key, "")) for values in settings)] for key in keys]
    return [row for row in rows if len(set(row[1:])) > 1]
