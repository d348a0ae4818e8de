"""The report of a run, and of others to compare it with, from the files that they left in their folders."""

import math
from collections import ChainMap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

from fusionreid.dataloading.records import PARTS, DataError
from fusionreid.engine.config import Config
from fusionreid.engine.reporting.charts import COLOURS, Chart, Line, line_chart, ticks
from fusionreid.engine.reporting.html import Cell, Section, Table, text_table, write_page
from fusionreid.engine.reporting.run_record import Counts, Result, RunRecord, read_run

REPORT, RANK_LISTS, ATTENTION = "report.html", "ranks.png", "attention.png"
PICTURES = {  # name of the file -> title, text
    RANK_LISTS: (
        "Rank lists",
        "Queries from the best to the worst. Green: the same person. Red: another person. Gallery images of the same "
        "person by the query's own camera are left out.",
    ),
    ATTENTION: (
        "Where each branch looks in the other",
        "The same queries, lit where the class token of one branch attends among the patches of the other, in the last "
        "fusion: what the CNN takes from the Transformer, and the Transformer from the CNN.",
    ),
}
PNG = b"\x89PNG\r\n\x1a\n"
SHOWN_RANKS = 1, 5, 10
LAST_RANK = 20  # of the chart
PERCENT_TICKS = range(0, 101, 20)


def draw_report(output: Path, cfg: Config, compare: Sequence[Path] = ()) -> None:
    """Write report.html in `output` from the files there, and compare the run with those in other folders."""
    folders = [output, *compare]
    runs = [read_run(folder, name) for folder, name in zip(folders, names_of(folders))]
    results = {
        f"{run.name}, {name}" if compare else name: result
        for run in runs
        for name, result in run.metrics.results.items()
    }
    about = runs[0].metrics
    sections = [*_result_sections(results), *_curve_sections(runs)]
    if compare:
        rows = differences([run.settings for run in runs])
        sections.append(Section("Settings that differ", table=text_table(("", *(run.name for run in runs)), rows)))
    for file, (title, text) in PICTURES.items():
        if (output / file).is_file():
            sections.append(Section(title, text, picture=_picture(output / file)))
    if about.split:
        rows = [[part, *(f"{count:,}" for _, count in getattr(about.split, part))] for part in PARTS]
        sections.append(Section("Data", table=text_table(("", *Counts.model_fields), rows)))
    sections.append(Section("Configuration", code=cfg.dump()))
    write_page(output / REPORT, "FusionReID", f"{about.data} {about.note}".strip(), sections)
    print(f"report: {output / REPORT}")


def _picture(path: Path) -> bytes:
    """Read a PNG file: a signature, then chunks of length, name, data and checksum, the last one being IEND."""
    data, at, name = path.read_bytes(), len(PNG), b""
    while data.startswith(PNG) and at < len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        name, checksum = data[at + 4 : at + 8], int.from_bytes(data[end - 4 : end], "big")
        if end > len(data) or crc32(data[at + 4 : end - 4]) != checksum:
            break
        at = end
    if at != len(data) or name != b"IEND":
        raise DataError(f"{path} is damaged: evaluate that run again, or remove the picture")
    return data


def _result_sections(results: Mapping[str, Result]) -> list[Section]:
    if not results:
        return [Section("Results", "This run has not been evaluated yet.")]
    last = max(2, min(LAST_RANK, max(len(result.cmc) for result in results.values())))
    curves = [[(float(k), 100 * result.rate_at(k)) for k in range(1, last + 1)] for result in results.values()]
    lines = [
        Line(name, [point for point in curve if math.isfinite(point[1])], i, i // COLOURS)
        for i, (name, curve) in enumerate(zip(results, curves))
    ]
    chart = line_chart("rank", lines, (1, *range(5, last + 1, 5)), PERCENT_TICKS)
    return [
        Section("Results, %", table=results_table(results)),
        Section("CMC, %", "Queries with a match among the first k images of their ranking.", chart),
    ]


def _curve_sections(runs: Sequence[RunRecord]) -> list[Section]:
    losses = [Line(run.name, run.curve("loss"), i, i // COLOURS) for i, run in enumerate(runs)]
    measures = [
        Line(f"{run.name}, {measure}" if len(runs) > 1 else measure, run.curve(key, 100), i, dash)
        for i, run in enumerate(runs)
        for dash, (key, measure) in enumerate((("mAP", "mAP"), ("rank1", "Rank-1")))
    ]
    charts = {
        "Training loss": _over_epochs([line for line in losses if len(line.points) > 1]),
        "mAP and Rank-1 during training, %": _over_epochs([line for line in measures if line.points], PERCENT_TICKS),
    }
    return [Section(title, chart=chart) for title, chart in charts.items() if chart is not None]


def _over_epochs(lines: Sequence[Line], y_ticks: Sequence[float] | None = None) -> Chart | None:
    if not lines:
        return None
    last_epoch = max(epoch for line in lines for epoch, _ in line.points)
    highest = max(value for line in lines for _, value in line.points)
    return line_chart("epoch", lines, ticks(last_epoch), ticks(highest) if y_ticks is None else y_ticks)


def results_table(results: Mapping[str, Result]) -> Table:
    """Lay out measures in %, the best of each in bold where there are several rows."""
    rates = [[r.mAP, r.mINP, *(r.rate_at(rank) for rank in SHOWN_RANKS)] for r in results.values()]
    best = [max(filter(math.isfinite, column), default=math.nan) for column in zip(*rates)]
    head = ("", "mAP", "mINP", *(f"Rank-{rank}" for rank in SHOWN_RANKS), "valid queries")
    rows = [
        [
            Cell(name),
            *(Cell(_percent(rate), len(rates) > 1 and rate == top) for rate, top in zip(row, best)),
            Cell(f"{result.valid_queries:,}"),
        ]
        for (name, result), row in zip(results.items(), rates)
    ]
    return Table(head, rows)


def _percent(rate: float) -> str:
    return f"{100 * rate:.1f}" if math.isfinite(rate) else "n/a"


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
