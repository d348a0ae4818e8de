"""The layout holds: one importable name, imports that point down, files within their budgets."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests import ROOT

ROOMS = {  # what each may import besides itself
    "kernels": set(),
    "dataloading": {"kernels"},
    "fusionreid": {"kernels"},
    "engine": {"fusionreid", "dataloading", "kernels"},
    "bench": {"engine", "fusionreid", "dataloading", "kernels"},
}
BASE = {"errors", "files", "schema"}  # of fusionreid: every room but kernels may import them, and they import no room
FRONT = Path("fusionreid/__init__.py")  # hands out names of every room, each imported when it is asked for
ENGINE_BASE = {"config", "config_files", "config_hints", "config_yaml", "signals", "storage"}  # likewise, of engine
ENGINE = {  # the rooms of the engine, and what each may import besides ENGINE_BASE; files beside them may import all
    "distributed": set(),
    "monitoring": {"distributed"},
    "checkpoints": {"distributed"},
    "evaluation": {"distributed", "checkpoints"},
    "training": {"distributed", "monitoring", "checkpoints", "evaluation"},
    "galleries": {"checkpoints", "embedder"},
    "reporting": {"distributed", "monitoring", "checkpoints", "evaluation"},
}
LINKS = ("engine", "kernels", "dataloading", "configs")
LINES = {"kernels": 600, "fusionreid": 300}  # most lines of a file by its room
OTHER_LINES = 250
EXCEPTIONS = {
    "engine/training/trainer.py": 300,
    "engine/distributed/parallel.py": 300,
    "engine/evaluation/retrieval.py": 260,
    "bench/suite_step.py": 270,
}
FUNCTION_LINES, KERNEL_LINES = 60, 110  # a Triton kernel cannot be split without a cost
FILES = [path.relative_to(ROOT) for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]


def imports(path: Path) -> Iterator[str]:
    """The dotted names that a file imports, each `from` with what it takes."""
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room_of(name: str) -> str:
    package, *rest = name.split(".")
    return rest[0] if package == "fusionreid" and rest and rest[0] in ROOMS | dict.fromkeys(BASE) else package


def engine_parts(path: Path) -> set[str]:
    """The rooms and files of the engine that a file imports."""
    names = (name.split(".") for name in imports(path))
    return {name[2] for name in names if name[:2] == ["fusionreid", "engine"] and len(name) > 2}


def part_of(path: Path) -> str:
    return path.parts[1].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_point_down(path: Path) -> None:
    room, rooms = path.parts[0], {room_of(name) for name in imports(path)}
    if path == FRONT:
        assert not rooms & {"bench", "tests"}
    elif room == "fusionreid" and path.stem in BASE:
        assert not rooms & (ROOMS.keys() | {"tests"})
    elif room == "kernels":
        assert rooms & (ROOMS.keys() | BASE | {"tests"}) <= {room}
    else:
        assert rooms & (ROOMS.keys() | {"tests"}) <= ROOMS[room] | {room}


@pytest.mark.parametrize("path", [path for path in FILES if path.parts[0] == "engine"], ids=str)
def test_imports_within_the_engine_point_down(path: Path) -> None:
    part, parts = part_of(path), engine_parts(path)
    if part in ENGINE:
        assert parts <= ENGINE[part] | ENGINE_BASE | {part}
    elif part in ENGINE_BASE:
        assert parts <= ENGINE_BASE


def test_the_engine_has_no_circle_and_no_unknown_room() -> None:
    folders = {path.name for path in (ROOT / "engine").iterdir() if (path / "__init__.py").exists()}
    assert folders == ENGINE.keys()
    graph: dict[str, set[str]] = {}
    for path in FILES:
        if path.parts[0] == "engine":
            graph.setdefault(part_of(path), set()).update(engine_parts(path) - {part_of(path)})
    assert len(list(TopologicalSorter(graph).static_order())) >= len(graph)


def test_nothing_imports_a_bare_name() -> None:
    files = [*FILES, *(path.relative_to(ROOT) for path in (ROOT / "tests").rglob("*.py"))]
    bare = {f"{path}: {name}" for path in files for name in imports(path) if name.split(".")[0] in LINKS}
    assert not bare


@pytest.mark.skipif((ROOT / "PKG-INFO").exists(), reason="a source distribution holds copies in place of links")
@pytest.mark.parametrize("name", LINKS)
def test_rooms_are_relative_links(name: str) -> None:
    link = ROOT / "fusionreid" / name
    assert link.is_symlink()
    assert os.readlink(link) == f"../{name}"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_files_open_with_a_sentence_and_keep_their_budget(path: Path) -> None:
    text = (ROOT / path).read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert ast.get_docstring(tree), f"{path} has no docstring"
    assert text.count("\n") <= EXCEPTIONS.get(str(path), LINES.get(path.parts[0], OTHER_LINES))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            compiled = any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
            budget = KERNEL_LINES if compiled else FUNCTION_LINES
            assert lines <= budget, f"{path}: {node.name} has {lines} lines"


@pytest.mark.parametrize("folder", ["engine", "bench"])
def test_scripts_hide_no_other_module(folder: str) -> None:
    """A script's own folder comes first on the path."""
    names = {path.stem for path in (ROOT / folder).glob("*.py")}
    assert not names & (set(sys.stdlib_module_names) | set(ROOMS) | {"torch", "numpy", "timm"})


def test_configuration_is_checked_before_torch_loads() -> None:
    modules = "fusionreid.dataloading, fusionreid.engine.command, fusionreid.engine.config"
    script = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)
