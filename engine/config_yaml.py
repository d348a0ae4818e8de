"""YAML as ReID configurations write it: text and `KEY VALUE` overrides -> dotted keys with values and places.

An unquoted value is a switch (yes/no/on/off), else what Python reads it as (`1e-4`, `('msmt17')`, `(12, 12)`), else
text; a quoted one is text. A key set twice is a mistake; anchors, aliases and tags are not supported.
"""

import ast
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

Schema = TypeVar("Schema", bound=BaseModel)

WORDS = {"yes": True, "on": True, "true": True, "no": False, "off": False, "false": False, "null": None, "~": None}

RULES = {  # the types of pydantic's errors, in the words of a configuration
    "bool_parsing": "yes or no",
    "bool_type": "yes or no",
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "finite",
    "string_type": "text (in quotes where it reads as something else)",
    "string_too_short": "non-empty",
    "literal_error": "{expected}",
    "greater_than": "> {gt:g}",
    "greater_than_equal": ">= {ge:g}",
    "less_than": "< {lt:g}",
    "less_than_equal": "<= {le:g}",
    "multiple_of": "a multiple of {multiple_of:g}",
    "tuple_type": "a list such as [12, 12]",
    "too_long": "a list of {max_length}",
    "missing": "a longer list",
}


EXACT = 2**53  # below it a float tells whole numbers apart


class Setting(NamedTuple):
    """A value and the place where it was set."""

    value: Any
    where: str  # "configs/synthetic/tiny.yml:12" or "override"


def plain(text: str) -> Any:
    """Read an unquoted value."""
    if text.lower() in WORDS:
        return WORDS[text.lower()]
    try:
        with warnings.catch_warnings(action="ignore"):  # "3or4" is text, not odd Python
            value = ast.literal_eval(text) if len(text) < 100 else text
    except (ValueError, SyntaxError, TypeError):
        return text
    if isinstance(value, list):
        return tuple(value)
    if isinstance(value, float) and "e" in text.lower() and value.is_integer() and abs(value) < EXACT:
        return int(value)  # 1e2 epochs are a whole number of them
    return value if isinstance(value, (int, float, str, tuple)) else text


def read_yaml(text: str, name: str, sections: Collection[str], problems: list[str]) -> dict[str, Setting]:
    """Read the dotted keys of a YAML text; only `sections` are entered. Mistakes are added to `problems`."""
    try:
        root = yaml.compose(text, Loader=_Loader)
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line if mark else text.count("\n", 0, getattr(error, "position", 0))
        what = getattr(error, "problem", None) or str(error).partition("\n")[0]
        problems.append(f"{name}:{line + 1}: not valid YAML: {what}")
        return {}
    if root is None:
        return {}
    if not isinstance(root, yaml.MappingNode):
        problems.append(f"{name}:{root.start_mark.line + 1}: must be sections of keys, got {_value(root)!r}")
        return {}
    settings: dict[str, Setting] = {}
    lines: dict[str, int] = {}
    for key, line, node in _walk(root, sections):
        if key in lines:
            problems.append(f"{name}:{line}: {key}: set twice, first in line {lines[key]}")
        elif not (key in sections and (isinstance(node, yaml.MappingNode) or node.value == "")):
            settings[key] = Setting(_value(node), f"{name}:{line}")
        lines.setdefault(key, line)
    return settings


def read_overrides(words: Sequence[str], keys: Collection[str], problems: list[str]) -> dict[str, Setting]:
    """Read the settings of a command line, each `KEY=VALUE` or `KEY`, `VALUE`; of equal keys the last one counts."""
    settings: dict[str, Setting] = {}
    left = list(words)
    while left:
        key, equals, text = left.pop(0).partition("=")
        if not equals:
            if not left or left[0].partition("=")[0] in keys:
                problems.append(f"override: {key}: has no value, write {key} VALUE or {key}=VALUE")
                continue
            text = left.pop(0)
        settings[key] = Setting(plain(text), "override")
    return settings


def dump(values: Mapping[str, Any]) -> str:
    """Write YAML that `read_yaml` reads back to the same values."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield nested keys as dotted ones, each with its value."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def validate(schema: type[Schema], settings: dict[str, Setting], problems: list[str]) -> Schema:
    """Validate again and again without the wrong keys, so that contradictions are reported along with wrong types.

    A contradiction is an error of that type whose context names the `keys` that it is about, the one to blame first.
    """
    wrong: set[str] = set()
    while True:
        right = {key: setting for key, setting in settings.items() if key not in wrong}
        try:
            return schema.model_validate(_nest(right))
        except ValidationError as invalid:
            for error in invalid.errors(include_url=False):
                keys = _keys_of(error)
                if wrong.isdisjoint(keys):
                    where = next(right[key].where for key in keys if key in right)
                    problems.append(f"{where}: {keys[0]}: {_rule(error)}")
                wrong.update(keys)


def _nest(settings: dict[str, Setting]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, setting in settings.items():
        *sections, last = key.split(".")
        level = nested
        for section in sections:
            level = level.setdefault(section, {})
        level[last] = setting.value
    return nested


def _keys_of(error: ErrorDetails) -> list[str]:
    place = [part for part in error["loc"] if isinstance(part, str)]
    if error["type"] == "contradiction":
        return [".".join((*place, key)) for key in error["ctx"]["keys"]]
    return [".".join(place)]


def _rule(error: ErrorDetails) -> str:
    if error["type"] not in RULES:
        return error["msg"]
    return f"must be {RULES[error['type']].format(**error.get('ctx', {}))}, got {error['input']!r}"


def _walk(
    mapping: yaml.MappingNode, sections: Collection[str], prefix: str = ""
) -> Iterator[tuple[str, int, yaml.Node]]:
    for key_node, node in mapping.value:
        key = f"{prefix}{_value(key_node)}"
        yield key, key_node.start_mark.line + 1, node
        if key in sections and isinstance(node, yaml.MappingNode):
            yield from _walk(node, sections, f"{key}.")


def _value(node: yaml.Node) -> Any:
    if isinstance(node, yaml.ScalarNode):
        return plain(node.value) if node.style is None else node.value
    if isinstance(node, yaml.MappingNode):
        return {str(_value(key)): _value(value) for key, value in node.value}
    return tuple(map(_value, node.value))


class _Loader(yaml.SafeLoader):
    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if event.anchor or getattr(event, "tag", None):
            raise yaml.MarkedYAMLError(
                problem="anchors, aliases and tags have no meaning here", problem_mark=event.start_mark
            )
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    style = '"' if not text.isprintable() else "'" if plain(text) != text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


def _row(dumper: yaml.SafeDumper, values: Sequence[Any]) -> yaml.Node:
    return dumper.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=True)


_Dumper.add_representer(str, _text)
_Dumper.add_representer(tuple, _row)
_Dumper.add_representer(list, _row)
