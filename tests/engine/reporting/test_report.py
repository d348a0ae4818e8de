"""The report: the right pictures in the right frames, and a page that is whole, escaped and well formed."""

import base64
import io
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageColor

from fusionreid.dataloading import Record, Split
from fusionreid.engine.reporting.html import (
    FRAME,
    GAP,
    MARGIN,
    RIGHT,
    WRONG,
    Figure,
    System,
    choose_queries,
    cmc_chart,
    picture,
    rank_lists,
    results_table,
    ticks,
    write_page,
)

NAN = float("nan")


@pytest.fixture
def split(tmp_path: Path) -> Split:
    def records(part: str, *who: tuple[int, int]) -> tuple[Record, ...]:
        paths = [str(tmp_path / f"{part}{i}.png") for i in range(len(who))]
        for i, path in enumerate(paths):
            Image.new("RGB", (64, 128), (40 * i, 90, 120)).save(path)
        return tuple(Record(path, *pair) for path, pair in zip(paths, who))

    gallery = records("gallery", (1, 0), (1, 1), (2, 1), (0, 2))
    return Split(
        "<set & co>", str(tmp_path), records("train", (9, 0), (9, 1)), records("query", (1, 0), (2, 0)), gallery
    )


def test_queries_spread_from_best_to_worst() -> None:
    precision = np.array([0.2, NAN, 0.9, 0.5, 0.5, 0.1])
    assert choose_queries(precision, 3).tolist() == [2, 4, 5]
    assert choose_queries(precision, 10).tolist() == [2, 3, 4, 0, 5]
    assert choose_queries(np.array([NAN]), 3).tolist() == []


def test_frames_tell_right_and_wrong_and_a_short_ranking_ends(split: Split) -> None:
    neighbours = np.array([[1, 2, -1], [3, 2, 0]])
    sheet = rank_lists(
        split.query, split.gallery, neighbours, np.full((2, 3), 0.5), np.array([0.9, 0.3]), rows=2, top=3
    )
    assert sheet.size == (2 * MARGIN + 4 * 94 + GAP, 2 * MARGIN + 2 * 208 + GAP)
    for row, frames in enumerate([(RIGHT, WRONG, "white"), (WRONG, RIGHT, WRONG)]):
        for column, frame in enumerate(frames):
            corner = MARGIN + GAP + (column + 1) * 94 + 40, MARGIN + GAP + row * 208 - FRAME + 1
            assert sheet.getpixel(corner) == ImageColor.getrgb(frame), (row, column)
    inside = sheet.getpixel((MARGIN + GAP + 94 + 40, MARGIN + GAP + 80))
    assert inside == (40, 90, 120), "the first neighbour of the best query is gallery image 1"


def test_cmc_curves_run_through_their_values() -> None:
    drawing = ET.fromstring(cmc_chart({"<a> & b": np.array([0.5, 0.75, 1.0]), "c": np.full(50, 0.25)}, ranks=3))
    lines = [e.get("points", "").split() for e in drawing.iter() if e.tag.endswith("polyline")]
    heights = [[float(point.split(",")[1]) for point in line] for line in lines]
    (zero,), (one,) = ([float(t.get("y", 0)) - 4.5 for t in drawing.iter() if t.text == v][:1] for v in ("0", "100"))
    rates = [[(zero - y) / (zero - one) for y in line] for line in heights]
    np.testing.assert_allclose(rates, [[0.5, 0.75, 1.0], [0.25, 0.25, 0.25]], atol=1e-3)
    labels = {t.text: float(t.get("y", 0)) for t in drawing.iter() if t.text in ("<a> & b", "c")}
    assert labels["c"] - labels["<a> & b"] >= 18


class Page(HTMLParser):
    """Collects tags and text, and fails on tags that do not close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "path", "polyline"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_page_is_whole_escaped_and_self_contained(tmp_path: Path) -> None:
    systems = [
        System("<b>ours</b>", 0.8125, 0.5, np.array([0.9, 0.95]), 1234),
        System("colour & co", 0.2, NAN, np.full(50, 0.3), 1234),
    ]
    path = tmp_path / "report.html"
    figure = Figure("1 < 2", "a & b", Image.new("RGB", (30, 20), "white"))
    write_page(path, "<title>", "<set & co>", [results_table(systems), picture(figure)])
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    texts = "<b>ours</b>", "colour & co", "<title>", "<set & co>", "1 < 2", "a & b"
    for shown in (*texts, "81.2", "90.0", "95.0", "1,234", "n/a"):
        assert shown in page.texts, shown
    assert "b" not in {tag for tag, _ in page.seen}
    assert "script" not in {tag for tag, _ in page.seen}
    assert not re.search(r'(src|href)="(?!data:)', text)
    (source,) = (attributes["src"] or "" for tag, attributes in page.seen if tag == "img")
    with Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/png;base64,")))) as image:
        assert image.size == (30, 20)
    assert [p.name for p in tmp_path.glob("report*")] == ["report.html"]
    best = re.findall(r"<td class=\"best\">([^<]*)", text)
    assert best == ["81.2", "50.0", "90.0", "95.0", "95.0"]


@pytest.mark.parametrize(
    ("highest", "expected"),
    [(15, [0, 5, 10, 15]), (42.6, [0, 10, 20, 30, 40]), (0.35, [0, 0.1, 0.2, 0.3]), (180, [0, 50, 100, 150])],
)
def test_ticks_are_round(highest: float, expected: list[float]) -> None:
    assert ticks(highest) == pytest.approx(expected)
