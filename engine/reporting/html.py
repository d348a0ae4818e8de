"""What people look at after an evaluation: rank lists as a picture, charts and tables, one HTML page of it all."""

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fusionreid.dataloading.records import Record
from fusionreid.files import atomic_write

THUMBNAIL = (80, 160)  # width, height in pixels
GAP, MARGIN, CAPTION, FRAME = 14, 24, 34, 4
SHOWN_QUERIES = 6
INK, FAINT, RIGHT, WRONG = "#1d2229", "#69707a", "#1a9850", "#d73027"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # told apart by colour-blind eyes too

STYLE = """
:root { color-scheme: light dark; --ink: #1d2229; --faint: #69707a; --line: #dfe2e6; --paper: #fff; --wash: #f5f6f8 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --faint: #99a1ab; --line: #363c44; --paper: #15181c; --wash: #1d2126 } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 70rem;
  margin: 3rem auto; padding: 0 1.5rem }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .25rem } h2 { font-size: 1.1rem; margin: 2.5rem 0 .75rem }
p { color: var(--faint); max-width: 44rem; margin: 0 0 1rem; white-space: pre-line }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .4rem 1.1rem .4rem 0; border-bottom: 1px solid var(--line); text-align: right }
th { font-weight: 500; color: var(--faint) } th:first-child, td:first-child { text-align: left }
td.best { font-weight: 650 } img, svg { max-width: 100%; height: auto; border-radius: 6px }
pre { background: var(--wash); padding: 1rem; border-radius: 6px; overflow-x: auto; font-size: .85rem }
"""


class System(NamedTuple):
    """How well one way of embedding retrieves; all but the counts are fractions."""

    name: str
    mAP: float
    mINP: float
    cmc: np.ndarray  # (ranks,): at [k - 1], the share of queries with a match among the first k
    valid_queries: int


class Figure(NamedTuple):
    title: str
    text: str
    image: Image.Image


def choose_queries(average_precision: np.ndarray, rows: int) -> np.ndarray:
    """Up to `rows` queries, evenly spread from the best average precision to the worst; NaN (no match) is left out."""
    order = np.argsort(-average_precision, kind="stable")
    order = order[np.isfinite(average_precision[order])]
    return order[np.unique(np.linspace(0, len(order) - 1, min(rows, len(order))).round().astype(np.int64))]


def rank_lists(
    query: Sequence[Record], gallery: Sequence[Record], neighbours: np.ndarray, similarity: np.ndarray,
    average_precision: np.ndarray, *, rows: int = SHOWN_QUERIES, top: int = 10,
) -> Image.Image:  # fmt: skip
    """A row per chosen query: the query, then its nearest gallery images, framed green (right) or red (wrong).

    neighbours and similarity are (Q, K), nearest first, indices into gallery and -1 past the end of the ranking;
    average_precision is (Q,) with NaN where a query has no match.
    """
    chosen, top = choose_queries(average_precision, rows), min(top, neighbours.shape[1])
    width, height = THUMBNAIL[0] + GAP, THUMBNAIL[1] + CAPTION + GAP
    sheet = Image.new("RGB", (2 * MARGIN + (top + 1) * width + GAP, 2 * MARGIN + len(chosen) * height + GAP), "white")
    pen, small = ImageDraw.Draw(sheet), ImageFont.load_default(12)

    def place(record: Record, x: int, y: int, frame: str, text: str) -> None:
        with Image.open(record.path) as file:
            sheet.paste(file.convert("RGB").resize(THUMBNAIL, Image.Resampling.BICUBIC), (x, y))
        outline = (x - FRAME, y - FRAME, x + THUMBNAIL[0] + FRAME - 1, y + THUMBNAIL[1] + FRAME - 1)
        pen.rounded_rectangle(outline, FRAME, outline=frame, width=FRAME)
        pen.text((x, y + THUMBNAIL[1] + 7), f"{record.person:04d}  cam {record.camera + 1}", INK, small)
        pen.text((x, y + THUMBNAIL[1] + 21), text, FAINT, small)

    pen.text((MARGIN, MARGIN - 12), "query", FAINT, small)
    pen.text((MARGIN + width + GAP, MARGIN - 12), "gallery, most similar first", FAINT, small)
    for row, i in enumerate(chosen):
        y = MARGIN + GAP + row * height
        place(query[i], MARGIN, y, INK, f"AP {100 * average_precision[i]:.1f} %")
        for column, (j, value) in enumerate(zip(neighbours[i, :top], similarity[i, :top])):
            if j >= 0:
                frame = RIGHT if gallery[j].person == query[i].person else WRONG
                place(gallery[j], MARGIN + GAP + (column + 1) * width, y, frame, f"{value:.3f}")
    return sheet


def cmc_chart(curves: Mapping[str, np.ndarray], ranks: int = 20) -> str:
    """Queries with a match (%) over the rank, a line per system."""
    ranks = max(2, min(ranks, max(map(len, curves.values()))))
    lines = {name: [(k, 100 * _at_rank(cmc, k)) for k in range(1, ranks + 1)] for name, cmc in curves.items()}
    return line_chart(lines, "rank", (1, *range(5, ranks + 1, 5)), range(0, 101, 20))


def line_chart(
    lines: Mapping[str, Sequence[tuple[float, float]]], axis: str, x_ticks: Sequence[float], y_ticks: Sequence[float]
) -> str:
    """An inline SVG: a labelled line (x, y) per name, above the first ticks; it takes the ink of the page it is in."""
    width, height, left, right, top, bottom = 720, 380, 48, 190, 16, 44
    last_x, last_y = (max(ends) for ends in zip((x_ticks[-1], y_ticks[-1]), *(p for ps in lines.values() for p in ps)))

    def across(x: float) -> float:
        return left + (x - x_ticks[0]) / (last_x - x_ticks[0]) * (width - left - right)

    def up(y: float) -> float:
        return height - bottom - (y - y_ticks[0]) / (last_y - y_ticks[0]) * (height - top - bottom)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" font-family="system-ui, sans-serif" font-size="13"><title>over {axis}</title>'
    ]
    for y in y_ticks:
        parts.append(f'<path d="M{left} {up(y):.1f}H{width - right}" stroke="currentColor" stroke-opacity="0.14"/>')
        parts.append(_text(left - 8, up(y) + 4.5, f"{y:g}", "end", faint=True))
    parts += [_text(across(x), height - bottom + 20, f"{x:g}", "middle", faint=True) for x in x_ticks]
    parts.append(_text(left + (width - left - right) / 2, height - 6, axis, "middle", faint=True))
    floor = float("-inf")
    coloured = zip(lines.items(), cycle(COLOURS))
    for (name, line), colour in sorted(coloured, key=lambda item: -item[0][1][-1][1]):
        points = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in line)
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2.25" stroke-linejoin="round"/>'
        )
        floor = max(up(line[-1][1]) + 4.5, floor + 18)  # labels do not meet
        parts.append(_text(width - right + 10, floor, name, "start", colour))
    return "".join([*parts, "</svg>"])


def ticks(highest: float) -> list[float]:
    """Round numbers from 0 to at most `highest`, four to ten of them."""
    unit = 10 ** np.floor(np.log10(highest))
    step = unit * next(part for part in (1, 0.5, 0.2) if highest >= 3 * part * unit)
    return [float(step * i) for i in range(int(highest / step + 1e-9) + 1)]


def _text(x: float, y: float, text: str, anchor: str, colour: str = "currentColor", faint: bool = False) -> str:
    opacity = ' fill-opacity="0.65"' if faint else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}"{opacity}>{escape(text)}</text>'


def _at_rank(cmc: np.ndarray, rank: int) -> float:
    """A list shorter than the rank has found all that it will."""
    return float(cmc[min(rank, len(cmc)) - 1])


def results_table(systems: Sequence[System]) -> str:
    """Measures of all systems in %, the best of each in bold."""
    rows = [[system.mAP, system.mINP, *(_at_rank(system.cmc, k) for k in (1, 5, 10))] for system in systems]
    best = np.nanmax(rows, axis=0)
    cells = [[system.name, *map(_percent, row), f"{system.valid_queries:,}"] for system, row in zip(systems, rows)]
    return table("Results, %", ("", "mAP", "mINP", "Rank-1", "Rank-5", "Rank-10", "valid queries"), cells,
                 [[False, *(row == best), False] for row in rows])  # fmt: skip


def table(
    title: str, head: Sequence[str], rows: Sequence[Sequence[str]], best: Sequence[Sequence[bool]] | None = None
) -> str:
    """A titled table; cells that are `best` are bold."""
    best = best or [[False] * len(head) for _ in rows]
    names = "".join(f"<th>{escape(name)}</th>" for name in head)
    lines = [
        [(' class="best"' if is_best else "", escape(cell)) for cell, is_best in zip(*line)] for line in zip(rows, best)
    ]
    body = "".join(f"<tr>{''.join(f'<td{mark}>{cell}</td>' for mark, cell in line)}</tr>" for line in lines)
    return f"<h2>{escape(title)}</h2><table><thead><tr>{names}</tr></thead><tbody>{body}</tbody></table>"


def picture(figure: Figure) -> str:
    """A titled picture with its text, inside the page itself."""
    data = io.BytesIO()
    figure.image.save(data, "PNG", optimize=True)
    source = base64.b64encode(data.getvalue()).decode("ascii")
    return (
        f"<h2>{escape(figure.title)}</h2><p>{escape(figure.text)}</p>"
        f'<img alt="{escape(figure.title)}" src="data:image/png;base64,{source}">'
    )


def write_page(path: Path, title: str, text: str, sections: Sequence[str]) -> None:
    """One HTML file without scripts or links; sections are HTML."""
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>"
        f"<body><h1>{escape(title)}</h1><p>{escape(text)}</p>{''.join(sections)}</body></html>\n"
    )
    with atomic_write(path, "w", encoding="utf-8") as file:
        file.write(page)


def _percent(rate: float) -> str:
    return f"{100 * rate:.1f}" if np.isfinite(rate) else "n/a"
