"""Fill the configuration page from the schema: each key with its type, default and meaning. Equations become MathML."""

import html
import inspect
import re
from types import UnionType
from typing import Annotated, Any, get_args, get_origin

from latex2mathml.converter import convert

from fusionreid.engine.config import Config
from fusionreid.schema import Section

KEY = re.compile(r"^    ([A-Z][A-Z_0-9]*): .*?(?:  # (.*))?$")
EQUATION = re.compile(r"\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)  # as the extension arithmatex leaves them


def on_page_content(page_html: str, **_: Any) -> str:
    """Write equations so that browsers show them without scripts."""
    return EQUATION.sub(
        lambda m: convert(html.unescape(m[1] or m[2]), display="inline" if m[1] else "block"), page_html
    )


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Replace the mark on the configuration page."""
    if page.file.src_uri != "configuration.md":
        return markdown
    return markdown.replace("<!-- keys -->", "\n\n".join(section(name, kind) for name, kind in sections(Config)))


def sections(kind: type[Section], prefix: str = "") -> list[tuple[str, type[Section]]]:
    """Return every section below `kind` with its dotted name; the keys of `kind` itself come last."""
    found = []
    for name, field in kind.model_fields.items():
        if inspect.isclass(field.annotation) and issubclass(field.annotation, Section):
            found += sections(field.annotation, f"{prefix}{name}.")
    return [*found, (prefix.rstrip("."), kind)]


def section(name: str, kind: type[Section]) -> str:
    """Make the table of one section, the keys without effect in a list below it."""
    meanings = comments(kind)
    rows, unused = [], []
    for key, field in kind.model_fields.items():
        if inspect.isclass(field.annotation) and issubclass(field.annotation, Section):
            continue
        dotted = f"{name}.{key}" if name else key
        reasons = [text for text in field.metadata if isinstance(text, str)]
        if reasons:
            unused.append(f"`{dotted}` ({reasons[0]})")
            continue
        meaning = meanings[key].replace("|", "\\|")
        rows.append(f"| `{dotted}` | {values(field)} | `{shown(field.default)}` | {meaning} |")
    lines = [f"## {name or 'Top level'}", inspect.getdoc(kind) or ""]
    lines.append("\n".join(["| Key | Values | Default | Meaning |", "|---|---|---|---|", *rows]))
    if unused:
        lines.append(f"Accepted without effect, because published files set them: {', '.join(unused)}.")
    return "\n\n".join(lines)


def comments(kind: type[Section]) -> dict[str, str]:
    """Read the comment behind each key in the source."""
    found = (KEY.match(line) for line in inspect.getsource(kind).splitlines())
    return {match[1]: match[2] or "" for match in found if match}


def values(field: Any) -> str:
    """Say what a key may hold."""
    limits = [f"{sign} {shown(getattr(limit, name))}" for limit in field.metadata
              for name, sign in (("ge", "at least"), ("gt", "above"), ("le", "at most"), ("lt", "below"))
              if getattr(limit, name, None) is not None]  # fmt: skip
    return " ".join([kind_of(field.annotation), *limits]).replace("|", "\\|")


def kind_of(annotation: Any) -> str:
    """Name a type as the author of a YAML file would."""
    names = {bool: "yes or no", int: "integer", float: "number", str: "text"}
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if annotation in names:
        return names[annotation]
    choices = get_args(annotation)
    if choices and all(isinstance(choice, (str, int, bool)) for choice in choices):
        return ", ".join(f"`{shown(choice)}`" for choice in choices)
    if get_origin(annotation) is UnionType:
        return " or ".join(map(kind_of, choices))
    inner = [kind_of(choice) for choice in choices if choice is not Ellipsis]
    if not inner:
        return "value"
    plural = inner[0].replace("integer", "integers").replace("number", "numbers") if len(set(inner)) == 1 else "values"
    return f"list of {plural}"


def shown(value: Any) -> str:
    """Write a value as it stands in a YAML file."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return f"({', '.join(map(shown, value))})"
    return str(value) or "''"
