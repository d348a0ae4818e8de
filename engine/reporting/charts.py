"""The geometry of a line chart: where its lines, ticks and labels lie. The template of the report draws it as SVG."""

import math
from collections.abc import Sequence
from typing import NamedTuple

WIDTH, HEIGHT = 640, 340
LEFT, RIGHT, TOP, BOTTOM = 56, 28, 14, 64  # margins
COLOURS, DASHES = 6, 3  # that the template's style sheet tells apart
MOST_MARKED = 40  # a line of more points has no mark on each
MOST_ROWS = 50  # of the table of numbers; of more, evenly spaced ones

Point = tuple[float, float]


class Line(NamedTuple):
    """A named line through points (x, y), which may be filled down to the axis."""

    name: str
    points: Sequence[Point]
    colour: int = 0
    dash: int = 0
    filled: bool = False


class Tick(NamedTuple):
    """A value on an axis, or a place to point out between its ticks, and its text."""

    value: float
    text: str


class Label(NamedTuple):
    """A tick: its place on the axis in pixels, and its text."""

    place: float
    text: str


class DrawnLine(NamedTuple):
    """A line in pixels."""

    name: str
    points: list[Point]
    marks: list[Point]
    colour: int
    dash: int
    filled: bool


class Chart(NamedTuple):
    """A chart in pixels, the origin in the upper left corner, with its numbers as a table and in words."""

    axis: str  # what x is
    lines: list[DrawnLine]
    x_ticks: list[Label]
    y_ticks: list[Label]
    pointed_out: Label | None  # a place on the x axis
    rows: list[list[str]]  # x and the y of each line
    words: str
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


def line_chart(
    axis: str,
    lines: Sequence[Line],
    x_ticks: Sequence[float | Tick],
    y_ticks: Sequence[float],
    point_out: Tick | None = None,
) -> Chart:
    """Lay out lines above an axis; the axes reach from the first tick to the last one, or to the farthest point."""
    named = [tick if isinstance(tick, Tick) else Tick(tick, f"{tick:g}") for tick in x_ticks]
    points = [point for line in lines for point in line.points]
    ends = [(named[0].value, named[-1].value), (y_ticks[0], y_ticks[-1])]
    low_x, low_y = (min([end[0], *(point[i] for point in points)]) for i, end in enumerate(ends))
    high_x, high_y = (max([end[1], *(point[i] for point in points)]) for i, end in enumerate(ends))

    def across(x: float) -> float:
        return round(LEFT + (x - low_x) / (high_x - low_x) * (WIDTH - LEFT - RIGHT), 1)

    def up(y: float) -> float:
        return round(HEIGHT - BOTTOM - (y - low_y) / (high_y - low_y) * (HEIGHT - TOP - BOTTOM), 1)

    drawn = []
    for line in lines:
        places = [(across(x), up(y)) for x, y in line.points]
        marks = places if len(places) <= MOST_MARKED and not line.filled else []
        drawn.append(DrawnLine(line.name, places, marks, line.colour % COLOURS, line.dash % DASHES, line.filled))
    return Chart(
        axis,
        drawn,
        [Label(across(tick.value), tick.text) for tick in named],
        [Label(up(y), f"{y:g}") for y in y_ticks],
        Label(across(point_out.value), point_out.text) if point_out and low_x <= point_out.value <= high_x else None,
        _rows(lines, {tick.value: tick.text for tick in named}),
        _words(lines, axis),
    )


def _rows(lines: Sequence[Line], texts: dict[float, str]) -> list[list[str]]:
    """Make a row of texts for each x, or for evenly spaced ones of many."""
    values = [dict(line.points) for line in lines]
    places = sorted({x for line in values for x in line})
    step = max(1, math.ceil(len(places) / MOST_ROWS))
    kept = sorted({*places[::step], *places[-1:]})
    return [[texts.get(x, f"{x:.4g}"), *(f"{line[x]:.4g}" if x in line else "" for line in values)] for x in kept]


def _words(lines: Sequence[Line], axis: str) -> str:
    """Say where each line begins, ends and has its highest point."""
    texts = []
    for name, points in ((line.name, line.points) for line in lines if line.points):
        top = max(points, key=lambda point: point[1])
        ends = f"from {points[0][1]:.4g} to {points[-1][1]:.4g}"
        texts.append(f"{name}: {ends} over {axis}, highest {top[1]:.4g}.")
    return " ".join(texts)


def stairs(edges: Sequence[float], heights: Sequence[float]) -> list[Point]:
    """Return the outline of a histogram: two points for each bar between consecutive edges."""
    return [(x, height) for i, height in enumerate(heights) for x in (edges[i], edges[i + 1])]


def ticks(highest: float, lowest: float = 0.0) -> list[float]:
    """Round numbers from `lowest` to at most `highest`, four to ten of them; the two ends where there is no room."""
    if highest - lowest < 1e-300:
        return [lowest, lowest + 1]
    unit = 10.0 ** math.floor(math.log10(highest - lowest))
    step = unit * next(part for part in (1, 0.5, 0.2) if highest - lowest >= 3 * part * unit)
    first = math.ceil(lowest / step - 1e-9)
    return [step * i for i in range(first, math.floor(highest / step + 1e-9) + 1)]
