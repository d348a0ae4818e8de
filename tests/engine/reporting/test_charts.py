"""Charts run through their values, and no value makes them fail."""

import math

import numpy as np
import pytest

from fusionreid.engine.reporting.charts import MOST_MARKED, Line, line_chart, ticks


def test_lines_run_through_their_values() -> None:
    values = [[0.0, 25.0, 100.0], [50.0, 50.0, 12.5]]
    lines = [Line(f"line {i}", list(enumerate(row, start=1)), i, i) for i, row in enumerate(values)]
    chart = line_chart("rank", lines, (1, 2, 3), range(0, 101, 20))
    (zero, *_, hundred), (first, *_, last) = ([tick.place for tick in axis] for axis in (chart.y_ticks, chart.x_ticks))
    for line, row in zip(chart.lines, values):
        x, y = np.transpose(line.points)
        np.testing.assert_allclose((y - zero) / (hundred - zero) * 100, row, atol=0.1)
        np.testing.assert_allclose((x - first) / (last - first), [0, 0.5, 1], atol=1e-3)
    assert [tick.text for tick in chart.y_ticks] == ["0", "20", "40", "60", "80", "100"]
    assert (first, last, zero) == (chart.left, chart.right, chart.bottom)


def test_points_beyond_the_ticks_stay_inside() -> None:
    chart = line_chart("epoch", [Line("loss", [(0, -3), (7, 12)])], (0, 5), (0, 10))
    (x_low, y_low), (x_high, y_high) = chart.lines[0].points
    assert (x_low, y_low) == (chart.left, chart.bottom)
    assert x_high == chart.right
    assert 0 < y_high < chart.y_ticks[-1].place < chart.y_ticks[0].place < y_low


def test_many_lines_and_points() -> None:
    points = [(float(x), 1.0) for x in range(MOST_MARKED + 1)]
    chart = line_chart("epoch", [Line(str(i), points[i:], i, i // 6) for i in range(20)], (0, 50), (0, 1))
    assert [len(line.marks) for line in chart.lines] == [0, *range(MOST_MARKED, MOST_MARKED - 19, -1)]
    assert {(line.colour, line.dash) for line in chart.lines} == {(i % 6, i // 6 % 3) for i in range(20)}
    assert line_chart("epoch", [], (0, 1), (0, 1)).lines == []


@pytest.mark.parametrize(
    ("highest", "expected"),
    [
        (15, [0, 5, 10, 15]),
        (42.6, [0, 10, 20, 30, 40]),
        (0.35, [0, 0.1, 0.2, 0.3]),
        (180, [0, 50, 100, 150]),
        (0, [0, 1]),
        (-2, [0, 1]),
        (5e-324, [0, 1]),
    ],
)
def test_ticks_are_round(highest: float, expected: list[float]) -> None:
    assert ticks(highest) == pytest.approx(expected)


@pytest.mark.parametrize("highest", [1e-12, 1, 3, 9.99, 1e300])
def test_ticks_are_four_to_eleven(highest: float) -> None:
    values = ticks(highest)
    assert 4 <= len(values) <= 11
    assert all(map(math.isfinite, values))
    assert values[-1] <= highest * (1 + 1e-9)
