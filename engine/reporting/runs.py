"""What runs left in their folders, read back and drawn as one page: results, curves, pictures, settings."""

import json
from collections import ChainMap
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from fusionreid.dataloading.records import PARTS, DataError
from fusionreid.engine.config import Config
from fusionreid.engine.monitoring import manifest
from fusionreid.engine.monitoring.manifest import flat
from fusionreid.engine.reporting.html import (
    Figure,
    System,
    cmc_chart,
    line_chart,
    picture,
    results_table,
    table,
    ticks,
    write_page,
)

REPORT, RANK_LISTS, ATTENTION = "report.html", "ranks.png", "attention.png"
PICTURES = {  # name of the file -> title, text
    RANK_LISTS: (
        "Rank lists, from the best query to the worst",
        "Green: the same person. Red: another. The same person in the query's own camera is left out.",
    ),
    ATTENTION: (
        "What the branches look at in each other",
        "The same queries, lit where the class token of one branch attends among the patches of the other, in the last "
        "fusion: what the CNN takes from the Transformer, and the Transformer from the CNN.",
    ),
}
COUNTED = "images", "persons", "cameras"


class Run(NamedTuple):
    """What a run or an evaluation left in its folder; what is not there is empty."""

    name: str
    results: dict[str, Any]  # metrics.json
    losses: list[tuple[float, float]]  # epoch and loss of its log lines
    settings: dict[str, Any]  # of its manifest, dotted


def draw_report(output: Path, cfg: Config, beside: Sequence[Path] = ()) -> None:
    """Write report.html in `output` from the files there, with the runs in other folders beside it."""
    folders = [output, *beside]
    runs = [read_run(folder, name) for folder, name in zip(folders, names_of(folders))]
    systems = [
        System(f"{run.name}, {by}" if beside else by, r["mAP"], r["mINP"], np.array(r["cmc"]), r["valid_queries"])
        for run in runs
        for by, r in run.results["results"].items()
    ]
    sections = [
        results_table(systems),
        "<h2>Queries (%) with a match among the first k</h2>" + cmc_chart({s.name: s.cmc for s in systems}),
    ]
    if curves := {run.name: run.losses for run in runs if len(run.losses) > 1}:
        epochs, losses = (ticks(max(ends)) for ends in zip(*(point for line in curves.values() for point in line)))
        sections.append("<h2>Training loss</h2>" + line_chart(curves, "epoch", epochs, losses))
    if beside:
        rows = differences([run.settings for run in runs])
        sections.append(table("Settings that differ", ("", *(run.name for run in runs)), rows))
    for file, (title, text) in PICTURES.items():
        if (output / file).is_file():
            with Image.open(output / file) as image:
                sections.append(picture(Figure(title, text, image)))
    about = runs[0].results
    if counts := about.get("split"):
        rows = [[part, *(f"{counts[part][what]:,}" for what in COUNTED)] for part in PARTS]
        sections.append(table("Data", ("", *COUNTED), rows))
    sections.append(f"<h2>Configuration</h2><pre>{escape(cfg.dump())}</pre>")
    write_page(output / REPORT, "FusionReID", f"{about['data']} {about.get('note', '')}", sections)
    print(f"report: {output / REPORT}")


def read_run(folder: Path, name: str) -> Run:
    """What is in a folder; DataError where that is no evaluation."""
    results = _json(folder / "metrics.json")
    if not results:
        raise DataError(f"{folder / 'metrics.json'} is not there: evaluate that run first")
    lines = (folder / "metrics.jsonl").read_text().splitlines() if (folder / "metrics.jsonl").is_file() else []
    entries = [json.loads(line) for line in lines if line.endswith("}")]  # a run that was killed leaves a part of one
    losses = [(entry["epoch"], entry["loss"]) for entry in entries if "loss" in entry]
    settings = dict(flat(_json(folder / manifest.FILE).get("config", {})))
    return Run(name, results, [point for point in losses if np.isfinite(point).all()], settings)


def names_of(folders: Sequence[Path]) -> list[str]:
    """The ends of the paths, as long as it takes to tell them apart."""
    paths = [folder.absolute().parts for folder in folders]
    for length in range(1, max(map(len, paths))):
        names = ["/".join(path[-length:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def differences(settings: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """A row for every key that has not the same value in all runs; OUTPUT_DIR differs always."""
    keys = [key for key in dict(ChainMap(*reversed(settings))) if key != "OUTPUT_DIR"]
    rows = [[key, *(str(values.get(key, "")) for values in settings)] for key in keys]
    return [row for row in rows if len(set(row[1:])) > 1]


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found: dict[str, Any] = json.loads(path.read_bytes())
        return found
    except ValueError as error:
        raise DataError(f"{path} is damaged: {error}") from error
