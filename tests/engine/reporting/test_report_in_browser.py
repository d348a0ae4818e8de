"""The report in a browser fits desktop and phone, light and dark, opens by mouse and keyboard, and asks nobody."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

from fusionreid.engine.config import load_config
from fusionreid.engine.reporting.charts import WIDTH
from fusionreid.engine.reporting.runs import draw_report
from tests.engine.reporting.own import Run

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
VIEWS = {"desktop": (1280, "light"), "phone": (360, "light"), "dark": (1280, "dark"), "dark phone": (360, "dark")}
LONG = "client_" + "0123456789" * 12  # a name with no place to break
WIDTHS = "[document.documentElement.scrollWidth, window.innerWidth]"


class Opened(NamedTuple):
    """A page, and all that it complained of or asked for so far."""

    page: "Page"
    complaints: list[str]
    requests: list[str]


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright, of the dev extra, is not installed")
    if BROWSER is None:
        pytest.skip("no browser is installed: chromium, chromium-browser or google-chrome")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])  # tests may run as root
        yield browser
        browser.close()


def open_page(browser: "Browser", path: Path, view: str) -> Opened:
    width, scheme = VIEWS[view]
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    opened = Opened(page, [], [])
    page.on("console", lambda message: opened.complaints.append(message.text))
    page.on("pageerror", lambda error: opened.complaints.append(str(error)))
    page.on("request", lambda request: opened.requests.append(request.url))
    page.goto(path.as_uri())
    return opened


def assert_fits(page: "Page") -> None:
    needed, there = page.evaluate(WIDTHS)
    assert needed <= there


def leave_extremes(folder: Path) -> Path:
    """A run with long names, thirty cameras and many rankings."""
    names = [f"{LONG}_{i}" for i in range(30)]
    result = {"mAP": 1.0, "mINP": 0.123, "cmc": [0.5, 1.0], "valid_queries": 1_234_567, "unmatched_queries": 9_999}
    shown = {"person": LONG, "camera": LONG, "picture": ""}
    query = {**shown, "kind": "median", "average_precision": 0.5, "maps": {"Grad-CAM of the CNN": ""}}
    found = [{**shown, "score": 0.999991, "right": i % 2 == 0} for i in range(10)]
    rate, pair = {"false_positive_rate": 1e-6, "true_positive_rate": 0.5, "distance": 0.5}, {"num_valid": 9, "mAP": 0.5}
    metrics = {
        "data": LONG, "note": LONG, "checkpoint": LONG, "evaluated": "2026-01-01T00:00:00+00:00",
        "results": {f"{LONG} {i}": result for i in range(12)},
        "camera_pairs": [{"query": a, "gallery": b, **pair} for a in names for b in names if a != b],
        "thresholds": [rate | {"cosine": 0.9999, "false_positive_rate": 10.0**-i} for i in range(1, 9)],
        "pairs": {
            "measure": "cosine", "same_person": 10**9, "other_person": 10**12, "edges": [-1.0, 0.0, 1.0],
            "same_counts": [1, 10**9 - 1], "other_counts": [10**12, 0], "roc": [[1e-9, 0.1], [1.0, 1.0]],
        },
        "confusions": [{"person": LONG, "taken_for": LONG, "queries": 10**6, "of": 10**6}],
    }  # fmt: skip
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "queries.json").write_text(json.dumps({"measure": "cosine", "queries": [query | {"found": found}]}))
    lines = [{"epoch": i / 100, "loss": 1e9 / (i + 1), "eval/mAP": 0.5, "eval/rank1": 1.0} for i in range(2000)]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    draw_report(folder, load_config("synthetic/tiny"))
    return folder / "report.html"


@pytest.fixture(params=["a run", "extremes"], scope="module")
def report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "extremes":
        return leave_extremes(tmp_path_factory.mktemp("extremes"))
    output: Path = request.getfixturevalue("evaluated").output
    return output / "report.html"


@pytest.mark.parametrize("view", VIEWS)
def test_it_fits_opens_and_asks_nobody(browser: "Browser", report: Path, view: str) -> None:
    page, complaints, requests = open_page(browser, report, view)
    assert_fits(page)
    folded = page.locator("summary").all()
    assert len(folded) >= 5
    for summary in folded:
        summary.click()
    assert page.locator("details[open]").count() == len(folded)
    assert page.locator("details[open] pre").is_visible()
    assert_fits(page)
    for link in page.locator("nav a").all():
        link.click()
        assert page.locator(":target").is_visible()
    assert not complaints
    assert {url for url in requests if not url.startswith("data:")} == {report.as_uri()}
    page.close()


@pytest.mark.parametrize("view", ["desktop", "phone"])
def test_the_keyboard_reaches_everything(browser: "Browser", report: Path, view: str) -> None:
    """Links, folded parts and whatever scrolls; what has the focus shows it."""
    page, *_ = open_page(browser, report, view)
    wanted = page.locator("a, summary, .scroll").evaluate_all("all => all.filter(one => one.checkVisibility()).length")
    reached = set()
    for _ in range(wanted):
        page.keyboard.press("Tab")
        tag, place, outline = page.evaluate(
            "() => { const one = document.activeElement; return [one.tagName, "
            "[...document.querySelectorAll('*')].indexOf(one), getComputedStyle(one).outlineStyle] }"
        )
        assert outline == "solid", tag
        reached.add(place)
        if tag == "SUMMARY" and len(reached) < wanted:
            page.keyboard.press("Enter")
            page.keyboard.press("Enter")  # and closed again: what is within would come next
    assert len(reached) == wanted
    assert page.locator("details[open]").count() == 0
    page.locator("summary").last.focus()
    page.keyboard.press("Enter")
    assert page.locator("details[open] pre").is_visible()
    page.close()


def luminance(page: "Page", selector: str, prop: str) -> float:
    """Relative luminance of a colour, as contrast is defined on (WCAG 2)."""
    colour = page.locator(selector).first.evaluate(f"one => getComputedStyle(one).{prop}")
    red, green, blue = (int(value) / 255 for value in colour[colour.index("(") + 1 : -1].split(",")[:3])
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (red, green, blue)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("view", ["desktop", "dark"])
def test_text_stands_out_from_the_page(browser: "Browser", report: Path, view: str) -> None:
    page, *_ = open_page(browser, report, view)
    paper = luminance(page, "body", "backgroundColor")
    assert (paper < 0.05) == (view == "dark")
    for selector in ("h1", "section p", "dt", "nav a", "summary", ".right .verdict", ".wrong .verdict", ".chart text"):
        text = luminance(page, selector, "fill" if selector == ".chart text" else "color")
        ratio = (max(text, paper) + 0.05) / (min(text, paper) + 0.05)
        assert ratio >= 4.5, (selector, ratio)
    page.close()


def test_charts_speak_and_pictures_are_there(browser: "Browser", evaluated: Run) -> None:
    page, *_ = open_page(browser, evaluated.output / "report.html", "phone")
    charts = page.locator("svg[role=img]")
    assert charts.count() == 5, "ROC, cosines, mAP by epoch, CMC, loss"
    for chart in charts.all():
        named = chart.get_attribute("aria-labelledby") or ""
        assert all(page.locator(f"#{name}").text_content() for name in named.split())
        width = chart.evaluate("one => one.getBoundingClientRect().width")
        font = chart.locator("text").first.evaluate("one => parseFloat(getComputedStyle(one).fontSize)")
        assert 300 < width <= 360
        assert font * width / WIDTH >= 10, "pixels of a letter on a phone"
    widths = page.locator("img").evaluate_all("all => all.map(one => one.naturalWidth)")
    assert len(widths) > 30
    assert min(widths) > 0
    alts = page.locator("img").evaluate_all("all => all.map(one => one.alt)")
    assert all(alts)
    page.close()
