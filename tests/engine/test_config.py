"""The configuration: published values, contradictions, keys without effect, the way back, and 500 mutated files."""

import ast
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fusionreid.engine.config import KEYS, Config, ConfigError, load_config
from tests import ROOT
from tests.conftest import FIXTURES

PUBLISHED = json.loads((FIXTURES / "published_configs.json").read_text())
SWITCH = {"yes": True, "on": True, "no": False, "off": False}
FILES = sorted((ROOT / "configs").rglob("*.yml"))


def assert_published(config: Config, changes: dict[str, Any]) -> None:
    values = config.model_dump()
    for section, defaults in PUBLISHED["defaults"].items():
        if section == "OUTPUT_DIR":
            assert values[section] == changes.get(section, defaults)
            continue
        for key, expected in (defaults | changes.get(section, {})).items():
            found = values[section][key]
            if isinstance(found, bool):
                expected = SWITCH.get(expected, expected)
            elif isinstance(found, tuple):
                expected = tuple(expected)
            elif key == "NAMES":
                expected = ast.literal_eval(expected) if "(" in expected else expected
            assert found == expected, key


def test_defaults_are_the_published_ones() -> None:
    assert_published(Config(), {})
    assert Config.from_dict(PUBLISHED["defaults"]) == Config()


@pytest.mark.parametrize("path", PUBLISHED["files"])
def test_published_files_hold_the_published_values(path: str, tmp_path: Path) -> None:
    changes = dict(PUBLISHED["files"][path])
    ours = load_config(ROOT / path)
    assert_published(ours, changes)
    lines = [f"OUTPUT_DIR: {changes.pop('OUTPUT_DIR')}"]
    for section, keys in changes.items():
        lines += [f"{section}:", *(f"  {key}: {value}" for key, value in keys.items())]
    (tmp_path / "theirs.yml").write_text("\n".join(lines))
    assert load_config(tmp_path / "theirs.yml") == ours


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_loads_silently_and_comes_back(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    assert config.notes == ()
    (tmp_path / "saved.yml").write_text(config.dump(), encoding="utf-8")
    assert load_config(tmp_path / "saved.yml") == config
    assert Config.from_dict(json.loads(json.dumps(config.model_dump()))) == config


@settings(deadline=None)
@given(st.text(min_size=1))
@example("line\x85\n\u2028 end ")
@example("('msmt17')")
def test_any_text_comes_back(text: str) -> None:
    config = Config.model_validate({"OUTPUT_DIR": text})
    assert Config.from_dict(config.model_dump()) == config


def test_a_value_may_stand_twice_in_a_dict() -> None:
    size = (64, 32)
    config = Config.from_dict({"INPUT": {"SIZE_TRAIN": size, "SIZE_TEST": size}})
    assert config.INPUT.SIZE_TEST == (64, 32)


@pytest.mark.parametrize(
    ("overrides", "key", "rule"),
    [
        ("MODEL.RES_USE=0 MODEL.TRANS_USE=0", "MODEL.RES_USE", "yes where TRANS_USE is no"),
        ("DATALOADER.NUM_INSTANCE=24", "SOLVER.IMS_PER_BATCH", "2 or more persons with DATALOADER.NUM_INSTANCE (24)"),
        ("SOLVER.IMS_PER_BATCH=16", "SOLVER.IMS_PER_BATCH", "2 or more persons with DATALOADER.NUM_INSTANCE (16)"),
        ("INPUT.SIZE_TRAIN=(384,128)", "INPUT.SIZE_TEST", "INPUT.SIZE_TRAIN (384, 128)"),
        ("MODEL.RES_USE=no TEST.FEAT=2", "TEST.FEAT", "0 or 1"),
        ("DATALOADER.NUM_WORKERS=100000", "DATALOADER.NUM_WORKERS", "<= 512"),
        ("DATALOADER.NUM_INSTANCE=24 SOLVER.IMS_PER_BATCH=many", "SOLVER.IMS_PER_BATCH", "a whole number"),
    ],
)
def test_contradictions_show_and_none_is_invented(overrides: str, key: str, rule: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(FILES[0], overrides.split())
    assert str(error.value).startswith(f"override: {key}: must be {rule}")
    assert str(error.value).count("\n") == 0


def test_the_cnn_alone_may_be_tested_at_another_size() -> None:
    assert load_config(FILES[0], ["MODEL.TRANS_USE=no", "INPUT.SIZE_TEST=[384, 128]"]).INPUT.SIZE_TEST == (384, 128)


def test_keys_without_effect_are_noted_once() -> None:
    overrides = ["SOLVER.GAMMA=0.1", "SOLVER.STEPS=[1, 2]", "SOLVER.MARGIN=0.5", "SOLVER.COSINE_SCALE=20"]
    notes = load_config(FILES[0], overrides).notes
    assert [note.split(": ")[0] for note in notes] == ["SOLVER.STEPS", "SOLVER.MARGIN", "SOLVER.COSINE_SCALE"]
    assert notes[0] == "SOLVER.STEPS: (1, 2) has no effect: the schedule is a cosine"
    assert len(load_config(FILES[0], [*overrides, "MODEL.NO_MARGIN=no"]).notes) == 2


def test_a_config_knows_what_was_set_and_is_frozen() -> None:
    assert "DEVICE" not in load_config(FILES[0]).MODEL.model_fields_set
    assert "DEVICE" in load_config(FILES[0], ["MODEL.DEVICE", "cuda"]).MODEL.model_fields_set
    with pytest.raises(ValidationError, match="frozen"):
        Config().MODEL.HTM_LAYER = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    "value", ["-1", "10**9", "0.5", "yes", "~", "''", "text", "()", "(1,2,3,4)", "([1],)", "1e999"]
)
def test_a_wrong_value_is_refused_in_our_own_words(value: str) -> None:
    for key in KEYS:
        try:
            load_config(FILES[0], [key, value])
        except ConfigError as error:
            lines = str(error).splitlines()
            assert all(line.startswith(f"override: {key}: must be ") for line in lines)


def test_mutated_files_load_or_explain_themselves(tmp_path: Path) -> None:
    rng = random.Random(1111)
    pieces = [*"0-:[](){}'\"&*!\n\t#|%é\\", "  ", "yes", "1e9", "\\n", "MODEL"]
    texts = [path.read_text(encoding="utf-8") for path in FILES] + [Config().dump()]
    path, loaded = tmp_path / "x.yml", 0
    for _ in range(500):
        text = rng.choice(texts)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(text))
            text = text[:at] + rng.choice(pieces) * rng.randint(0, 2) + text[at + rng.randint(0, 3) :]
        path.write_text(text, encoding="utf-8")
        try:
            loaded += isinstance(load_config(path), Config)
        except ConfigError as error:
            assert all(line.startswith(f"{path}:") for line in str(error).split("\n")), text  # noqa: PT017
    assert 50 < loaded < 450


def test_loading_never_imports_torch() -> None:
    script = (
        "import sys; from fusionreid.engine.config import *; load_config(sys.argv[1]); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script, str(FILES[0])], check=True, cwd=ROOT)


def test_a_file_that_is_no_configuration_is_refused_in_seconds(tmp_path: Path) -> None:
    (tmp_path / "long.yml").write_text("".join(f"UNKNOWN_KEY_{i}: {i}\n" for i in range(30_000)))
    (tmp_path / "wrong.yml").write_text("".join(f"UNKNOWN_KEY_{i}: {i}\n" for i in range(3_000)))
    start = time.process_time()
    with pytest.raises(
        ConfigError, match=r"long\.yml: has over 100,000 characters, a configuration has a few thousand"
    ):
        load_config(tmp_path / "long.yml")
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "wrong.yml")
    assert time.process_time() - start < 5
    *lines, last = str(caught.value).splitlines()
    assert (len(lines), last) == (100, "and 2,900 more mistakes")
