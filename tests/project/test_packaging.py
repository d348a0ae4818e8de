"""The distributions: one importable name, everything that it needs, and no harm to a package beside it."""

import os
import shutil
import site
import subprocess
import sys
import sysconfig
import tarfile
import venv
from collections.abc import Iterable
from pathlib import Path
from zipfile import ZipFile

import pytest

import fusionreid
from tests import ROOT
from tests.runs import KEYS

BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"
NEIGHBOUR = """\
[project]
name = "kernels"
version = "0.17.2"
[tool.setuptools]
packages = ["kernels"]
"""  # stands for Hugging Face's package of this name
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "*cache*", "*.egg-info", "build", "data", "log", ".hypothesis")


def run(*command: str | Path, cwd: Path) -> str:
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTEST_ADDOPTS")}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def build(kind: str, source: Path, output: Path) -> Path:
    output.mkdir(exist_ok=True)
    return output / run(sys.executable, "-c", BUILD, f"build_{kind}", output, cwd=source).splitlines()[-1]


def shipped(folder: Path, *suffixes: str) -> set[str]:
    return {path.relative_to(folder).as_posix() for suffix in suffixes for path in folder.rglob(f"*{suffix}")}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked source distribution of a copy of the tree, which must not get folders of a build."""
    folder = tmp_path_factory.mktemp("sdist")
    shutil.copytree(ROOT, folder / "tree", symlinks=True, ignore=ignore_built)
    with tarfile.open(build("sdist", folder / "tree", folder)) as archive:
        archive.extractall(folder, filter="data")
    return folder / f"fusionreid-{fusionreid.__version__}"


def ignore_built(folder: str, names: list[str]) -> Iterable[str]:
    """What a build, a test or a run leaves at the top of the tree."""
    return LEFT_OUT(folder, names) if Path(folder) == ROOT else [name for name in names if name == "__pycache__"]


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that `pip wheel .` builds from the tree with its links."""
    return build("wheel", sdist.parent / "tree", tmp_path_factory.mktemp("wheel"))


def test_version_and_import_need_no_torch() -> None:
    script = "import sys, fusionreid; print(fusionreid.__version__, 'torch' in sys.modules)"
    assert run(sys.executable, "-c", script, cwd=ROOT).split() == [fusionreid.__version__, "False"]


@pytest.mark.slow
def test_the_wheel_holds_one_package_whole(wheel: Path, sdist: Path, tmp_path: Path) -> None:
    with ZipFile(wheel) as archive:
        names = archive.namelist()
        info = f"fusionreid-{fusionreid.__version__}.dist-info"
        top_level, metadata = (archive.read(f"{info}/{file}").decode() for file in ("top_level.txt", "METADATA"))
    assert top_level.split() == ["fusionreid"]
    assert {name.partition("/")[0] for name in names} == {"fusionreid", info}
    for room in ("engine", "kernels", "dataloading", "configs"):
        inside = {name.removeprefix(f"fusionreid/{room}/") for name in names if name.startswith(f"fusionreid/{room}/")}
        assert inside == shipped(ROOT / room, ".py", ".yml", ".html", ".css"), room
    assert "fusionreid/py.typed" in names
    assert f"Version: {fusionreid.__version__}\n" in metadata
    assert "License-Expression: Apache-2.0\n" in metadata
    extras = [line.split()[1] for line in metadata.splitlines() if line.startswith("Provides-Extra")]
    assert extras == ["dali", "export", "gallery", "scale", "peers", "report", "docs", "dev"]
    with ZipFile(build("wheel", sdist, tmp_path)) as archive:
        assert sorted(archive.namelist()) == sorted(names), "the source distribution, without links, builds the same"


@pytest.mark.slow
def test_the_source_distribution_holds_tests_that_collect(sdist: Path) -> None:
    if (ROOT / ".git").exists():
        tracked = run("git", "ls-files", cwd=ROOT).splitlines()
        assert [name for name in tracked if not (sdist / name).exists()] == []
    collected = run(sys.executable, "-m", "pytest", "--collect-only", "-p", "no:cacheprovider", cwd=sdist)
    files = {f"tests/{name}" for name in shipped(sdist / "tests", ".py") if "/test_" in name}
    files -= {name for name in files if name.startswith(("tests/sanitize/", "tests/sweep/"))}  # when asked for alone
    assert files <= {line.partition(":")[0] for line in collected.splitlines()}


@pytest.mark.slow
def test_installed_beside_another_kernels_package(wheel: Path, tmp_path: Path) -> None:
    """Both are imported, a run trains by the name of its configuration, and removing ours leaves theirs whole."""
    (tmp_path / "neighbour/kernels").mkdir(parents=True)
    (tmp_path / "neighbour/pyproject.toml").write_text(NEIGHBOUR)
    (tmp_path / "neighbour/kernels/__init__.py").write_text("theirs = True\n")
    neighbour = build("wheel", tmp_path / "neighbour", tmp_path)
    home = tmp_path / "venv"
    venv.create(home, with_pip=False, symlinks=True)
    library = Path(sysconfig.get_path("purelib", "venv", {"base": str(home), "platbase": str(home)}))
    (library / "packages_of_the_tests.pth").write_text("\n".join(site.getsitepackages()))  # torch is large
    python, pip = home / "bin/python", (sys.executable, "-m", "pip", "--python", home / "bin/python")
    run(*pip, "install", "--quiet", "--no-index", "--no-deps", neighbour, wheel, cwd=tmp_path)

    where = "import fusionreid.kernels, kernels; print(kernels.theirs, kernels.__file__, fusionreid.kernels.__file__)"
    files = [f"{library}/{name}/__init__.py" for name in ("kernels", "fusionreid/kernels")]
    assert run(python, "-c", where, cwd=tmp_path).split() == ["True", *files]

    keys = KEYS | {"SOLVER.MAX_EPOCHS": "1", "DATASETS.ROOT_DIR": "data", "OUTPUT_DIR": "log"}
    overrides = [f"{key}={value}" for key, value in keys.items()]
    run(home / "bin/fusionreid", "train", "--config_file", "synthetic/tiny", *overrides, cwd=tmp_path)
    assert (tmp_path / "log/metrics.jsonl").read_text().count('"loss"') == 3
    assert not list(library.glob("kernels/[!_]*"))

    run(*pip, "uninstall", "--quiet", "--yes", "fusionreid", cwd=tmp_path)
    assert not (library / "fusionreid").exists()
    assert run(python, "-c", "import kernels; print(kernels.theirs)", cwd=tmp_path).strip() == "True"
