"""Charts run through their values, and no value makes them fail."""

import math

import numpy as np
import pytest

from fusionreid.engine.reporting.charts import MOST_MARKED, MOST_ROWS, Line, Tick, line_chart, stairs, ticks


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


def test_a_chart_tells_its_numbers_as_a_table_and_in_words() -> None:
    lines = [Line("mAP", [(1, 20.0), (2, 60.125), (3, 50.0)]), Line("Rank-1", [(2, 75.0)])]
    chart = line_chart("epoch", lines, (0, 1, 2, 3), range(0, 101, 20))
    assert chart.rows == [["1", "20", ""], ["2", "60.12", "75"], ["3", "50", ""]]
    assert chart.words == (
        "mAP: from 20 to 50 over epoch, highest 60.12. Rank-1: from 75 to 75 over epoch, highest 75."
    )
    long = line_chart("step", [Line("loss", [(float(x), 1.0) for x in range(1001)])], (0, 1000), (0, 1))
    assert MOST_ROWS / 2 < len(long.rows) <= MOST_ROWS + 1
    assert (long.rows[0][0], long.rows[-1][0]) == ("0", "1000")


def test_ticks_may_have_texts_and_a_place_is_pointed_out() -> None:
    x_ticks = [Tick(-2, "1 in 100"), Tick(0, "all")]
    chart = line_chart("rate", [Line("roc", [(-2, 0), (0, 1)])], x_ticks, (0, 1), Tick(-1, "suggested"))
    assert [tick.text for tick in chart.x_ticks] == ["1 in 100", "all"]
    assert chart.pointed_out == ((chart.left + chart.right) / 2, "suggested")
    assert [row[0] for row in chart.rows] == ["1 in 100", "all"]
    assert line_chart("rate", [], x_ticks, (0, 1), Tick(1, "outside")).pointed_out is None


def test_stairs_go_from_edge_to_edge() -> None:
    assert stairs([0, 1, 3], [5, 2]) == [(0, 5), (1, 5), (1, 2), (3, 2)]


@pytest.mark.parametrize(
    ("highest", "lowest", "expected"),
    [(1, 0.95, [0.95, 0.96, 0.97, 0.98, 0.99, 1]), (0.93, -0.2, [-0.2, 0, 0.2, 0.4, 0.6, 0.8]), (2, 2, [2, 3])],
)
def test_ticks_may_begin_anywhere(highest: float, lowest: float, expected: list[float]) -> None:
    assert ticks(highest, lowest) == pytest.approx(expected)


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
