"""The geometry of a line chart: where its lines, ticks and labels lie. The template of the report draws it as SVG."""

import math
from collections.abc import Sequence
from typing import NamedTuple

WIDTH, HEIGHT = 640, 340
LEFT, RIGHT, TOP, BOTTOM = 56, 20, 14, 64  # margins
COLOURS, DASHES = 6, 3  # that the template's style sheet tells apart
MOST_MARKED = 40  # a line of more points has no mark on each

Point = tuple[float, float]


class Line(NamedTuple):
    """A named line through points (x, y)."""

    name: str
    points: Sequence[Point]
    colour: int = 0
    dash: int = 0


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


class Chart(NamedTuple):
    """A chart in pixels, the origin in the upper left corner."""

    axis: str  # what x is
    lines: list[DrawnLine]
    x_ticks: list[Label]
    y_ticks: list[Label]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    bottom: int = HEIGHT - BOTTOM


def line_chart(axis: str, lines: Sequence[Line], x_ticks: Sequence[float], y_ticks: Sequence[float]) -> Chart:
    """Lay out lines above an axis; the axes reach from the first tick to the last one, or to the farthest point."""
    points = [point for line in lines for point in line.points]
    low_x, low_y = (min([ticks[0], *(point[i] for point in points)]) for i, ticks in enumerate((x_ticks, y_ticks)))
    high_x, high_y = (max([ticks[-1], *(point[i] for point in points)]) for i, ticks in enumerate((x_ticks, y_ticks)))

    def across(x: float) -> float:
        return round(LEFT + (x - low_x) / (high_x - low_x) * (WIDTH - LEFT - RIGHT), 1)

    def up(y: float) -> float:
        return round(HEIGHT - BOTTOM - (y - low_y) / (high_y - low_y) * (HEIGHT - TOP - BOTTOM), 1)

    drawn = []
    for line in lines:
        places = [(across(x), up(y)) for x, y in line.points]
        marks = places if len(places) <= MOST_MARKED else []
        drawn.append(DrawnLine(line.name, places, marks, line.colour % COLOURS, line.dash % DASHES))
    return Chart(axis, drawn, [Label(across(x), f"{x:g}") for x in x_ticks], [Label(up(y), f"{y:g}") for y in y_ticks])


def ticks(highest: float) -> list[float]:
    """Round numbers from 0 to at most `highest`, four to ten of them; 0 and 1 where there is no room for any."""
    if highest < 1e-300:
        return [0, 1]
    unit = 10.0 ** math.floor(math.log10(highest))
    step = unit * next(part for part in (1, 0.5, 0.2) if highest >= 3 * part * unit)
    return [step * i for i in range(int(highest / step + 1e-9) + 1)]
