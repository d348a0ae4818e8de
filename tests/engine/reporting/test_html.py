"""The page of the report is whole and well formed, and whatever it shows is escaped."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from jinja2 import UndefinedError

from fusionreid.engine.reporting import html
from fusionreid.engine.reporting.charts import Line, line_chart
from fusionreid.engine.reporting.html import Cell, Fact, Section, Table, render_page, text_table, write_page
from fusionreid.engine.reporting.run_record import ShownQuery

EVIL = "<script>alert('1' & \"2\")</script>"
VOID = ("meta", "img", "link")


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
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def everything(text: str) -> list[Section]:
    chart = line_chart(text, [Line(text, [(0, 0), (1, 1)])], (0, 1), (0, 1))
    table = Table((text, text), [[Cell(text), Cell(text, best=True)], [Cell(text), Cell(text, heat=0.5, note=text)]])
    shown = {"person": text, "camera": text, "picture": "AAAA"}
    found = [{**shown, "score": 0.5, "right": right} for right in (True, False)]
    query = {**shown, "kind": text, "average_precision": 0.25, "maps": {text: "AAAA"}, "found": found}
    queries, facts = [ShownQuery.model_validate(query)], [Fact(text, text, text)]
    return [
        Section(text, text, text, facts, chart, table, queries, text, text),
        Section(text, table=text_table((text,), [[text]])),
    ]


def test_every_text_is_escaped_wherever_it_is_shown() -> None:
    rendered = render_page(EVIL, [Fact(EVIL, EVIL)], everything(EVIL))
    page, plain = Page(rendered), Page(render_page("x", [Fact("x", "x")], everything("x")))
    assert [tag for tag, _ in page.seen] == [tag for tag, _ in plain.seen]
    assert "script" not in {tag for tag, _ in page.seen}
    style = sum("max-width" in text for text in plain.texts)  # of a letter x
    assert (
        sum(EVIL in text for text in page.texts)
        == sum(re.search(r"\bx\b", text) is not None for text in plain.texts) - style
        > 30
    )
    for (_, attributes), (_, others) in zip(page.seen, plain.seen):
        assert attributes.keys() == others.keys()
    template, code = html.TEMPLATE.read_text(), Path(html.__file__).read_text()
    assert not re.search(r"\|\s*safe|autoescape", template)
    assert "Markup" not in code


def test_the_page_needs_no_other_file(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    write_page(path, "name \udcff", [], everything("x"))
    text = path.read_text(encoding="utf-8")
    assert "name \\udcff" in text, "a folder whose name is no UTF-8"
    page = Page(text)
    assert not re.search(r'(src|href)="(?!data:|#)|url\(|@import', text)
    images = [attributes for tag, attributes in page.seen if tag == "img"]
    assert [image["src"] for image in images] == ["data:image/jpeg;base64,AAAA"] * 4
    assert [image["alt"] for image in images] == [
        "Query: x by camera x",
        "1, the same person: x by camera x",
        "2, another person: x by camera x",
        "x",
    ]
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_wide_parts_scroll_and_are_reached_by_keyboard() -> None:
    page = Page(render_page("t", [], everything("x")))
    regions = [attributes for tag, attributes in page.seen if attributes.get("role") == "region"]
    assert len(regions) == 6, "the numbers of a chart, two tables, images and maps of a query, a text"
    assert all(region["tabindex"] == "0" and (region["aria-label"] or "").startswith("x") for region in regions)
    assert [tag for tag, _ in page.seen].count("summary") == 2, "numbers of a chart, and a text"
    links = [attributes["href"] for tag, attributes in page.seen if tag == "a"]
    assert links == [f"#{attributes['id']}" for tag, attributes in page.seen if tag == "h2"]
    assert ("html", {"lang": "en"}) in page.seen


def test_bold_is_for_the_best_cell() -> None:
    table = Table(("", "mAP"), [[Cell("a"), Cell("81.2", best=True)], [Cell("b"), Cell("20.0")]])
    rendered = render_page("t", [], [Section("Results", table=table)])
    assert re.findall(r'<td( class="best")?>([^<]*)', rendered) == [(' class="best"', "81.2"), ("", "20.0")]


def test_a_value_that_the_template_lacks_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(html, "TEMPLATE", tmp_path / "broken.html")
    html.TEMPLATE.write_text("{{ heading }}")
    with pytest.raises(UndefinedError, match="heading"):
        render_page("t", [], [])
