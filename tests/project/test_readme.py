"""What README and CONTRIBUTING name is there: folders, files, keys and commands; what README says was measured was."""

import json
import re

import pytest

from fusionreid.engine import cli
from fusionreid.engine.config import Config
from tests import ROOT

README, CONTRIBUTING = ((ROOT / f"{name}.md").read_text(encoding="utf-8") for name in ("README", "CONTRIBUTING"))
LAYOUT = README.partition("## Layout")[2].split("```")[1]


def test_the_layout_is_the_tree() -> None:
    rooms = dict(re.findall(r"^(\w+)/ +(.*(?:\n .*)*)", LAYOUT, re.MULTILINE))
    here = {
        path.name for path in ROOT.iterdir() if path.is_dir() and path.name[0] != "." and any(path.glob("**/*.[py]*"))
    }
    assert rooms.keys() == here - {"log", "data", "build", "site"} - {p.name for p in ROOT.glob("*.egg-info")}
    for room, about in rooms.items():
        for name in re.findall(r"\b(\w+\.py|\w+/)(?=[\s,;])", about):
            assert (ROOT / room / name).exists(), f"{room} has no {name}"


@pytest.mark.parametrize("text", [README, CONTRIBUTING], ids=["README", "CONTRIBUTING"])
def test_files_keys_and_commands_exist(text: str) -> None:
    rooms = "kernels|dataloading|fusionreid|engine|bench|configs|tests"
    for path in set(re.findall(rf"\b(?:{rooms})/[\w/]+\.\w+", text)):
        assert (ROOT / path).exists(), path
    for section, key in set(re.findall(r"\b([A-Z]+)\.([A-Z_]{2,})\b", text)):
        assert key in Config.model_fields[section].annotation.model_fields, f"{section}.{key}"
    for command in set(re.findall(r"`fusionreid (\w+)", text)):
        assert command in cli.COMMANDS


def test_what_was_measured_is_on_record() -> None:
    rows = re.findall(r"^\|.*\|$", README.partition("On a CPU (")[2].partition("## Layout")[0], re.MULTILINE)[2:]
    values = [
        value
        for path in (ROOT / "bench/results/amd-epyc").glob("*.jsonl")
        for row in map(json.loads, path.read_text(encoding="utf-8").splitlines())
        for value in (row["median_ms"], row["median_ms"] / 1e3, 1e3 * (row["items"] or 0) / row["median_ms"])
    ]
    assert len(rows) > 5
    for row in rows:
        _, _, _, ours, beside, _ = row.split("|")
        for number in re.findall(r"(?<!\w)\d[\d,.]*\d", f"{ours} {beside}"):
            decimals = len(number.partition(".")[2])
            assert any(f"{value:,.{decimals}f}" == number for value in values), f"{number} in {row}"
