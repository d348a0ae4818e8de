"""Configurations by path or by name: `synthetic/tiny` is the file configs/synthetic/tiny.yml of this package."""

import difflib
import os
from pathlib import Path

import fusionreid

CONFIGS = Path(fusionreid.__path__[0]) / "configs"
SUGGESTIONS = 3


class NoSuchConfig(ValueError):
    """Neither a file nor a name of a shipped configuration."""


def shipped_configs() -> dict[str, Path]:
    """Name and file of every configuration that comes with the package."""
    return {path.relative_to(CONFIGS).with_suffix("").as_posix(): path for path in sorted(CONFIGS.rglob("*.yml"))}


def find_config(name: str | os.PathLike[str]) -> Path:
    """The file at this path, or else the shipped configuration of this name; NoSuchConfig lists the nearest names.

    A file wins over a name, and what ends in .yml or .yaml is always a path, so that a typo never loads another file.
    """
    path, shipped = Path(name), shipped_configs()
    if path.exists():
        return path
    if str(name) in shipped:
        return shipped[str(name)]
    nearest = ", ".join(_nearest(path, list(shipped)))
    raise NoSuchConfig(f"{name}: neither a file nor the name of a shipped configuration; the nearest names: {nearest}")


def _nearest(path: Path, names: list[str]) -> list[str]:
    """The names most like a path: those with the same last part first."""
    asked = path.with_suffix("").as_posix().removeprefix("configs/").casefold()
    spelt = {name.casefold(): name for name in names}
    same = [key for key in spelt if key.rpartition("/")[2] == asked.rpartition("/")[2]]
    alike = difflib.get_close_matches(asked, spelt, n=SUGGESTIONS, cutoff=0)
    return [spelt[key] for key in dict.fromkeys(same + alike)][:SUGGESTIONS]
