"""The report as one HTML file: no script, no link to another file, every text escaped by the template engine."""

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from fusionreid.engine.reporting.charts import Chart
from fusionreid.files import atomic_write

TEMPLATE = Path(__file__).with_name("report.html")


class Cell(NamedTuple):
    """A cell of a table; the best one of a column is bold."""

    text: str
    best: bool = False


class Table(NamedTuple):
    """A table whose first column names the rows."""

    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]


class Section(NamedTuple):
    """A titled part of the page, which holds whatever is given, in this order."""

    title: str
    text: str = ""
    chart: Chart | None = None
    table: Table | None = None
    picture: bytes = b""  # a PNG file
    code: str = ""


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Make a table of texts, none of them bold."""
    return Table(head, [[Cell(text) for text in row] for row in rows])


def render_page(title: str, text: str, sections: Sequence[Section]) -> str:
    """Fill the report's template."""
    return render(TEMPLATE.name, title=title, text=text, sections=sections)


def render(template: str, **values: object) -> str:
    """Fill a template of this folder; it escapes all that it is given."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATE.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["base64"] = lambda data: base64.b64encode(data).decode("ascii")
    page: str = environment.get_template(template).render(**values)
    return page


def write_page(path: Path, title: str, text: str, sections: Sequence[Section]) -> None:
    """Write the page; a reader sees the old file or the new one. Names of files may hold bytes that are no UTF-8."""
    page = render_page(title, text, sections).encode("utf-8", "backslashreplace")
    with atomic_write(path) as file:
        file.write(page)
