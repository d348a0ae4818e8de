"""The layout holds: imports point down only, files keep their budgets, no file hides a standard module."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT

ROOMS = {
    "kernels": {"kernels"},
    "dataloading": {"dataloading", "kernels"},
    "fusionreid": {"fusionreid", "kernels"},
    "engine": {"engine", "fusionreid", "dataloading", "kernels"},
    "bench": {"bench", "engine", "fusionreid", "dataloading", "kernels"},
}
BASE = {"errors", "files", "schema"}  # of fusionreid: every room but kernels may import them, and they import no room
FILES = [path.relative_to(ROOT) for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]


def room_of(name: str) -> str:
    package, *rest = name.split(".")
    return rest[0] if package == "fusionreid" and rest and rest[0] in ROOMS | dict.fromkeys(BASE) else package


def imported_rooms(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {room_of(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names |= {room_of(f"{node.module}.{alias.name}") for alias in node.names}
    return names & (ROOMS.keys() | BASE | {"tests"})


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_point_down(path: Path) -> None:
    if path.parts[0] == "fusionreid" and path.stem in BASE:
        assert not imported_rooms(path)
    else:
        assert imported_rooms(path) - BASE <= ROOMS[path.parts[0]]


@pytest.mark.parametrize("path", FILES, ids=str)
def test_files_open_with_a_sentence_and_keep_their_budget(path: Path) -> None:
    text = (ROOT / path).read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(text)), f"{path} has no docstring"
    assert text.count("\n") <= 300


@pytest.mark.parametrize("door", ["engine", "bench"])
def test_doors_hide_no_standard_module(door: str) -> None:
    names = {path.stem for path in (ROOT / door).glob("*.py")}
    assert not names & (set(sys.stdlib_module_names) | set(ROOMS) | {"torch", "numpy", "timm"})


def test_configuration_is_checked_before_torch_loads() -> None:
    modules = "fusionreid.dataloading, fusionreid.engine.command, fusionreid.engine.config"
    script = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)
