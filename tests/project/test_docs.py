"""The manual is true: every link leads somewhere, every command parses, every snippet runs, every key is explained."""

import ast
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fusionreid.engine import cli
from fusionreid.engine.config import KEYS, load_config
from fusionreid.engine.config_files import shipped_configs
from tests import ROOT
from tests.faults import FAULTS
from tests.promises import PAGE, read
from tests.runs import untrained

sys.path.insert(0, str(ROOT / "docs"))
import hooks

PAGES = {
    path.name: path.read_text(encoding="utf-8") for path in [*ROOT.glob("*.md"), *sorted((ROOT / "docs").glob("*.md"))]
}
COMMANDS = re.compile(r"(?:fusionreid|torchrun .*?engine/train\.py|python engine/(\w+)\.py)\s")


def blocks(language: str) -> Iterator[tuple[str, str]]:
    for name, text in PAGES.items():
        for block in re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL):
            yield name, block


def commands() -> Iterator[tuple[str, list[str]]]:
    for name, block in blocks("bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            scripts = [i for i, word in enumerate(words) if re.fullmatch(r"engine/\w+\.py", word)]
            if words[:1] == ["fusionreid"]:
                yield name, words[1:]
            elif scripts:
                yield name, [words[scripts[0]].removeprefix("engine/").removesuffix(".py"), *words[scripts[0] + 1 :]]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_of_the_project(page: str) -> None:
    folder = ROOT / "docs" if (ROOT / "docs" / page).exists() else ROOT
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", PAGES[page]):
        assert target.startswith("https://") or (folder / target).exists(), f"{page} links to {target}"


@pytest.mark.parametrize(
    ("page", "words"), [pytest.param(*given, id=f"{given[0]}: {' '.join(given[1])[:60]}") for given in commands()]
)
def test_commands_parse_and_name_keys_that_exist(page: str, words: list[str]) -> None:
    _, parsers = cli.build()
    options = parsers[words[0]][1].parse([word for word in words[1:] if word != "..."])
    given = " ".join(options.overrides)
    for key in re.findall(r"\b[A-Z]+\.[A-Z_]+\b|\bOUTPUT_DIR\b", given):
        assert key in KEYS, f"{page} sets {key}"
    config = options.config_file or ""
    if config not in ("", "my.yml", "log/shop/config.yml"):
        assert config in shipped_configs() or (ROOT / config).is_file(), f"{page} names {config}"
        load_config(config if config in shipped_configs() else ROOT / config, options.overrides)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the snippets name: a run, a query and crops."""
    folder = tmp_path_factory.mktemp("workshop")
    crops = sorted((untrained(folder / "log/shop", ("hall", "door")).parent / "crops").glob("*.jpg"))
    (folder / "crops").mkdir()
    for crop, name in zip(crops, ("lost.jpg", "crops/0001.jpg", "crops/0002.jpg"), strict=True):
        crop.rename(folder / name)
    (folder / "configs").symlink_to(ROOT / "configs")
    return folder


@pytest.mark.parametrize(
    ("page", "code"),
    [(page, code) for page, code in blocks("python") if page in ("README.md", "evaluation.md", "search.md")],
)
def test_snippets_run(
    page: str, code: str, workshop: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workshop)
    exec(compile(code, page, "exec"), {})
    assert capsys.readouterr().out.strip()


def test_the_reference_explains_every_key() -> None:
    text = "\n".join(hooks.section(name, kind) for name, kind in hooks.sections(hooks.Config))
    for key in KEYS:
        assert f"`{key}`" in text, key
    for row in re.findall(r"^\| `.*\|$", text, re.MULTILINE):
        assert row.split("|")[-2].strip(), f"no meaning: {row}"


def test_troubleshooting_quotes_messages_of_the_program() -> None:
    sources = [path for room in ("engine", "dataloading", "fusionreid") for path in (ROOT / room).rglob("*.py")]
    texts = "\0".join(text for path in sources for text in messages(path))
    quoted = re.findall(r"^### `(.*)`$", PAGES["troubleshooting.md"], re.MULTILINE)
    assert len(quoted) > 30
    for quote in quoted:
        for part in filter(None, (part.strip() for part in quote.split("…"))):
            assert part in texts, f"no message has: {part}"


def messages(path: Path) -> list[str]:
    """The texts of a module, those of f-strings with a mark for what is filled in."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            found.append("".join(v.value if isinstance(v, ast.Constant) else "\1" for v in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return found


def test_every_row_of_promises_has_its_test_and_nothing_lost() -> None:
    """A test that was renamed would leave the row of its last run on the page; the whole sweep fills it anew."""
    sources = {path: path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")}
    promised = {text for source in sources.values() for text in re.findall(r'mark\.promise\("(.+)"\)', source)}
    sweeps, faults = read(PAGE)
    assert set(sweeps) <= promised
    assert set(faults) <= set(FAULTS)
    for path, name in re.findall(r"(tests/\S+\.py)::(\w+)", PAGES[PAGE.name]):
        assert f"def {name}(" in sources[ROOT / path], f"{path} has no {name}"
    assert not [row for table in (sweeps, faults) for row, cells in table.items() if cells[-3] != "0"], "lost cases"
