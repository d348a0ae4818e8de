"""Configurations are found by path or by name from any directory, and a wrong name lists the nearest ones."""

from pathlib import Path

import pytest

from fusionreid.engine.config import ConfigError, load_config
from fusionreid.engine.config_files import shipped_configs
from tests import ROOT


def test_a_name_means_the_shipped_file_in_any_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert shipped_configs().keys() == {
        path.relative_to(ROOT / "configs").with_suffix("").as_posix() for path in (ROOT / "configs").rglob("*.yml")
    }
    for name in shipped_configs():
        assert load_config(name) == load_config(ROOT / "configs" / f"{name}.yml")


def test_a_path_wins_over_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "synthetic").mkdir()
    for name in ("synthetic/tiny", "synthetic/tiny.yml"):
        (tmp_path / name).write_text("SOLVER: {MAX_EPOCHS: 7}")
        assert load_config(name).SOLVER.MAX_EPOCHS == 7
    with pytest.raises(ConfigError, match=r"^synthetic: cannot be read: Is a directory$"):
        load_config("synthetic")


def test_mistakes_in_a_named_file_are_told_with_its_path() -> None:
    with pytest.raises(ConfigError, match=r"^override: SOLVER.MAX_EPOCHS: must be > 0"):
        load_config("synthetic/tiny", ["SOLVER.MAX_EPOCHS", "0"])


@pytest.mark.parametrize(
    ("wrong", "first"),
    [
        ("synthetic/tny", "synthetic/tiny"),
        ("tiny", "synthetic/tiny"),
        ("configs/synthetic/tiny.yml", "synthetic/tiny"),
        ("/elsewhere/tiny.yml", "synthetic/tiny"),
        ("market1501/Market_vitb12_res50_layer2", "Market1501/market_vitb12_res50_layer2"),
        ("msmt17/t2tvit", "MSMT17/t2tvit"),
        ("../configs/own/cameras", "own/cameras"),
        ("own/cameras.yaml", "own/cameras"),
    ],
)
def test_a_wrong_name_lists_the_nearest(
    wrong: str, first: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        load_config(wrong, ["SOLVER.BASE_LR", "fast"])
    missing, override = str(caught.value).splitlines()
    rule = "neither a file nor the name of a shipped configuration; the nearest names: "
    assert missing.startswith(f"{wrong}: {rule}{first}")
    assert missing.count(", ") == 2
    assert override.startswith("override: SOLVER.BASE_LR: must be a number")


@pytest.mark.parametrize("wrong", ["", "a\0b", "\n", "x" * 5000, "../../etc/passwd"])
def test_what_is_no_name_at_all_is_an_error_of_one_line(
    wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        load_config(wrong)
    assert len(str(caught.value).splitlines()) == 1
