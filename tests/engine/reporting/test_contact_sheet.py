"""Contact sheets: persons together, the line where it belongs, nothing from outside, no text that is markup."""

import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fusionreid.engine.evaluation.operating_point import Threshold
from fusionreid.engine.reporting import contact_sheet
from fusionreid.engine.reporting.contact_sheet import row_of, write_sheet

LONG = "x" * 90
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture
def found(tmp_path: Path) -> list[dict[str, Any]]:
    """A query with seven matches, whose paths and names are as bad as they can be."""
    Image.new("RGB", (60, 160), "teal").save(tmp_path / "<img src=x>.png")
    path = str(tmp_path / "<img src=x>.png")
    who = [
        ("anna", 0.9),
        ("<script>alert(1)</script>", 0.8),
        ("anna", 0.7),
        (None, 0.65),
        (LONG, 0.4),
        ("anna", 0.3),
        (None, 0.2),
    ]
    matches = [{"path": path, "person": person, "camera": "hall & door", "cosine": cosine} for person, cosine in who]
    matches[4]["path"] = str(tmp_path / "gone.png")
    return [{"query": path, "person": None, "camera": None, "matches": matches}]


def test_a_person_stays_together_and_who_is_unknown_is_parted_by_the_line(found: list[dict[str, Any]]) -> None:
    row = row_of(found[0], Threshold(0.5))
    assert [[m.cosine for m in group.matches] for group in row.above] == [[0.9, 0.7, 0.3], [0.8], [0.65]]
    assert [[m.cosine for m in group.matches] for group in row.below] == [[0.4], [0.2]]
    assert [group.person for group in row.above] == ["anna", "<script>alert(1)</script>", None]
    everything = row_of(found[0], None)
    assert ([len(group.matches) for group in everything.above], everything.below) == ([3, 1, 2, 1], [])


def test_a_page_escapes_all_names_and_asks_for_nothing(found: list[dict[str, Any]], tmp_path: Path) -> None:
    assert write_sheet(tmp_path / "found.html", "Search in <i>", found, Threshold(0.5)) == 1
    page = (tmp_path / "found.html").read_text()
    assert not re.search("<script|<img src=x|<i>|https?://", page)
    assert "hall & door" in unescape(page)
    assert "<script>alert(1)</script>" in unescape(page)
    assert page.count("data:image/jpeg;base64,") == 7
    assert page.count("image not there") == 1
    assert page.count('class="below"') == 3
    assert page.index("0.900") < page.index('class="limit" role') < page.index(LONG)
    assert "No match reaches" not in page
    write_sheet(tmp_path / "found.html", "Search", found, Threshold(0.95))
    assert "No match reaches the threshold." in (tmp_path / "found.html").read_text()


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_a_picture_has_the_line_and_every_match(found: list[dict[str, Any]], tmp_path: Path, suffix: str) -> None:
    heights = {}
    for threshold in (None, Threshold(0.5)):
        file = tmp_path / f"found{suffix}"
        write_sheet(file, "Search", found, threshold)
        with Image.open(file) as picture:
            pixels, heights[threshold] = np.asarray(picture.convert("RGB")).astype(int), picture.height
        blue = (abs(pixels - np.array([11, 93, 173])).max(2) < 40).sum(1).max()  # of the line, in one row of pixels
        assert (blue > 400) == (threshold is not None)
    assert heights[Threshold(0.5)] > heights[None]
    teal = abs(pixels - np.array([0, 128, 128])).max(2) < 30
    assert teal.sum() > 5 * 72 * 192 * 0.9  # the query and four of the matches, not faded


def test_many_matches_of_one_person_fill_lines(found: list[dict[str, Any]], tmp_path: Path) -> None:
    found[0]["matches"] = found[0]["matches"][:1] * 23
    write_sheet(tmp_path / "found.png", "Search", found, None)
    with Image.open(tmp_path / "found.png") as picture:
        assert picture.height > 3 * 192


def test_only_so_many_queries_are_drawn(
    found: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(contact_sheet.MOST_QUERIES, ".html", 2)
    assert write_sheet(tmp_path / "found.html", "Search", found * 3, None) == 2
    assert (
        "3 queries, each with its nearest images and their cosines; the first 2 are shown."
        in (tmp_path / "found.html").read_text()
    )


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to lay the page out")
def test_a_page_fits_a_phone(found: list[dict[str, Any]], tmp_path: Path) -> None:
    write_sheet(tmp_path / "found.html", LONG, found * 2, Threshold(0.5))
    script = "document.title = document.querySelector('iframe').contentDocument.documentElement.scrollWidth"
    frame = '<iframe src="found.html" width="360" height="640" style="border: 0"></iframe>'
    (tmp_path / "phone.html").write_text(f"{frame}<script>onload = () => {script}</script>")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--dump-dom"]
    shown = subprocess.run([CHROMIUM or "", *options, f"--user-data-dir={tmp_path}/chromium", f"file://{tmp_path}/phone.html"],
                           capture_output=True, text=True, check=True, timeout=60).stdout  # fmt: skip
    assert "<title>360</title>" in shown or "<title>345</title>" in shown  # with a scroll bar
