"""The report as one HTML file: no script, no link to another file, every text escaped by the template engine."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from fusionreid.engine.evaluation.names import cosine_text
from fusionreid.engine.reporting.charts import Chart
from fusionreid.engine.reporting.run_record import ShownQuery
from fusionreid.files import atomic_write

TEMPLATE = Path(__file__).with_name("report.html")


class Fact(NamedTuple):
    """A named value: a line of the page's head, or a figure with a note below it."""

    name: str
    value: str
    note: str = ""


class Cell(NamedTuple):
    """A cell of a table; the best one of a column is bold, and heat from 0 to 1 colours it."""

    text: str
    best: bool = False
    heat: float | None = None
    note: str = ""


class Table(NamedTuple):
    """A table whose first column names the rows."""

    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]


class Section(NamedTuple):
    """A titled part of the page, which holds whatever is given, in this order."""

    title: str
    text: str = ""
    lead: str = ""  # stands out
    figures: Sequence[Fact] = ()
    chart: Chart | None = None
    table: Table | None = None
    queries: Sequence[ShownQuery] = ()
    measure: str = ""  # of the scores of queries
    code: str = ""  # folded
    half: bool = False  # as wide as half a wide page


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Make a table of texts, none of them bold."""
    return Table(head, [[Cell(text) for text in row] for row in rows])


def render_page(title: str, facts: Sequence[Fact], sections: Sequence[Section]) -> str:
    """Fill the report's template."""
    return render(TEMPLATE.name, title=title, facts=facts, sections=sections, cosine_text=cosine_text)


def render(template: str, **values: object) -> str:
    """Fill a template of this folder; it escapes all that it is given."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATE.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page: str = environment.get_template(template).render(**values)
    return page


def write_page(path: Path, title: str, facts: Sequence[Fact], sections: Sequence[Section]) -> None:
    """Write the page; a reader sees the old file or the new one. Names of files may hold bytes that are no UTF-8."""
    page = render_page(title, facts, sections).encode("utf-8", "backslashreplace")
    with atomic_write(path) as file:
        file.write(page)
