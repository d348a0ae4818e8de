"""YAML as ReID configurations write it: what a value means, and every mistake with its place and its rule."""

from pathlib import Path

import pytest

from fusionreid.engine.config import ConfigError, load_config


def write(folder: Path, text: str) -> str:
    (folder / "x.yml").write_text(text, encoding="utf-8")
    return str(folder / "x.yml")


def mistakes(path: str, *overrides: str) -> list[str]:
    """The lines of the error, without the folder of the file."""
    with pytest.raises(ConfigError) as error:
        load_config(path, overrides)
    assert error.value.exit_code == 2
    return str(error.value).replace(path, "x.yml").splitlines()


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("DATASETS.NAMES", "('market1501')", "market1501"),
        ("DATASETS.NAMES", "'market1501'", "market1501"),
        ("SOLVER.BASE_LR", "1e-4", 1e-4),
        ("SOLVER.BASE_LR", "1e0", 1.0),
        ("SOLVER.MAX_EPOCHS", "1e2", 100),
        ("SOLVER.MAX_EPOCHS", "1.2E+2", 120),
        ("SOLVER.BASE_LR", "3", 3.0),
        ("MODEL.STRIDE_SIZE", "(16, 14)", (16, 14)),
        ("MODEL.STRIDE_SIZE", "[16, 14]", (16, 14)),
        ("MODEL.DEVICE_ID", "('0')", "0"),
        ("MODEL.DEVICE_ID", "3", "3"),
        ("MODEL.PRETRAIN_PATH_R", "your resnet50 pretrained path", "your resnet50 pretrained path"),
        ("MODEL.NECK", "no", "no"),
        ("MODEL.NECK", "'no'", "no"),
        ("MODEL.HTM_SHARE", "none", "none"),
        ("MODEL.RES_USE", "0", False),
        ("TEST.FEAT_NORM", "'no'", False),
        ("TEST.FEAT_NORM", "off", False),
        ("MODEL.IF_LABELSMOOTH", "'off'", False),
        ("MODEL.IF_WITH_CENTER", "yes", True),
        ("TEST.RE_RANKING", "no", False),
        ("TEST.RE_RANKING", "'yes'", True),
        ("TEST.RE_RANKING", "published", "published"),
        ("SOLVER.STEPS", "(40,)", (40,)),
        ("DATASETS.SYNTHETIC.PERSONS", "7", 7),
        ("OUTPUT_DIR", "a=b", "a=b"),
        ("OUTPUT_DIR", "007", "007"),
    ],
)
def test_a_value_means_the_same_in_files_and_overrides(key: str, text: str, value: object, tmp_path: Path) -> None:
    *sections, last = key.split(".")
    lines = [f"{'  ' * depth}{section}:" for depth, section in enumerate(sections)]
    filled = load_config(write(tmp_path, "\n".join([*lines, f"{'  ' * len(sections)}{last}: {text}"])))
    empty = write(tmp_path, "")
    for config in (filled, load_config(empty, [key, text]), load_config(empty, [f"{key}={text}"])):
        found: object = config
        for name in key.split("."):
            found = getattr(found, name)
        assert found == value
        assert type(found) is type(value)


def test_of_two_overrides_the_last_counts(tmp_path: Path) -> None:
    path = write(tmp_path, "MODEL:\n  HTM_LAYER: 3")
    assert load_config(path, ["MODEL.HTM_LAYER", "4", "MODEL.HTM_LAYER=5"]).MODEL.HTM_LAYER == 5


TAGS = "1: not valid YAML: anchors, aliases and tags have no meaning here"
CONTROL = "unacceptable character #x0007: special characters are not allowed"
MISTAKES = {
    "MODEL:\n  HTM_LAYR: 3": "2: MODEL.HTM_LAYR: unknown key, did you mean MODEL.HTM_LAYER?",
    "model:\n  HTM_LAYER: 3": "1: model: unknown key, did you mean MODEL?",
    "HTM_LAYER: 3": "1: HTM_LAYER: unknown key, did you mean MODEL.HTM_LAYER?",
    "MODEL:\n  SEED: 3": "2: MODEL.SEED: unknown key, did you mean DATASETS.SYNTHETIC.SEED or SOLVER.SEED?",
    "QQ: 3": "1: QQ: unknown key",
    '"Q\\nQ": 3': "1: Q\\nQ: unknown key",
    "SOLVER: 3": "1: SOLVER: is a section of keys, got 3",
    "- 3": "1: must be sections of keys, got (3,)",
    "SOLVER:\n\n  BASE_LR: -1": "3: SOLVER.BASE_LR: must be > 0, got -1",
    "SOLVER:\n  BASE_LR: 1e999": "2: SOLVER.BASE_LR: must be finite, got inf",
    "SOLVER:\n  BASE_LR: '1e-4'": "2: SOLVER.BASE_LR: must be a number, got '1e-4'",
    "MODEL:\n  HTM_LAYER: 1.5": "2: MODEL.HTM_LAYER: must be a whole number, got 1.5",
    "MODEL:\n  HTM_LAYER: yes": "2: MODEL.HTM_LAYER: must be a whole number, got True",
    "MODEL:\n  HTM_LAYER: {A: 1}": "2: MODEL.HTM_LAYER: must be a whole number, got {'A': 1}",
    "MODEL:\n  MIX_DIM: 100": "2: MODEL.MIX_DIM: must be a multiple of 12, got 100",
    "MODEL:\n  LAST_STRIDE: 3": "2: MODEL.LAST_STRIDE: must be 1 or 2, got 3",
    "MODEL:\n  NO_MARGIN: maybe": "2: MODEL.NO_MARGIN: must be yes or no, got 'maybe'",
    "MODEL:\n  DROP_PATH: 1": "2: MODEL.DROP_PATH: must be < 1, got 1",
    "MODEL:\n  STRIDE_SIZE: 12": "2: MODEL.STRIDE_SIZE: must be a list such as [12, 12], got 12",
    "MODEL:\n  STRIDE_SIZE: [12]": "2: MODEL.STRIDE_SIZE: must be a longer list, got (12,)",
    "MODEL:\n  STRIDE_SIZE: [1, 2, 3]": "2: MODEL.STRIDE_SIZE: must be a list of 2, got (1, 2, 3)",
    "INPUT:\n  PROB: 2": "2: INPUT.PROB: must be <= 1, got 2",
    "OUTPUT_DIR:": "1: OUTPUT_DIR: must be non-empty, got ''",
    "OUTPUT_DIR: 12": "1: OUTPUT_DIR: must be text (in quotes where it reads as something else), got 12",
    "TEST:\n  FEAT: 1\n  FEAT: 2": "3: TEST.FEAT: set twice, first in line 2",
    "TEST:\nINPUT:\nTEST:": "3: TEST: set twice, first in line 1",
    "A: [": "1: not valid YAML: expected the node content, but found '<stream end>'",
    "A: 1\nB: \x07": f"2: not valid YAML: {CONTROL}",
    "[" * 1000: "1: not valid YAML: maximum recursion depth exceeded",
    "A: &a [1, *a]": TAGS,
    "A: !!python/name:os.system": TAGS,
    "MODEL:\n  RES_USE: 0\n  TRANS_USE: 0": "2: MODEL.RES_USE: must be yes where TRANS_USE is no: no branch is left",
}


@pytest.mark.parametrize("text", MISTAKES, ids=lambda text: text[:30])
def test_every_mistake_has_a_place_a_rule_and_what_came(text: str, tmp_path: Path) -> None:
    (line,) = mistakes(write(tmp_path, text))
    assert line.startswith(f"x.yml:{MISTAKES[text]}")


def test_all_mistakes_at_once(tmp_path: Path) -> None:
    text = "MODEL:\n  MIX_DIM: 7\n  LAYERS: 1\n  RES_USE: no\n  TRANS_USE: no\nSOLVER:\n  SEED: x\nSOLVER:\n"
    overrides = ["SOLVER.IMS_PER_BATCH", "100", "MODEL.HTM_LAYER=0", "TEST.FEAT", "OUTPUT_DIR=a", "FEAT=1", "SEED"]
    found = mistakes(write(tmp_path, text), *overrides)
    assert sorted(": ".join(line.split(": ")[:2]) for line in found) == [
        "override: FEAT", "override: MODEL.HTM_LAYER", "override: SEED", "override: SOLVER.IMS_PER_BATCH",
        "override: TEST.FEAT", "x.yml:2: MODEL.MIX_DIM", "x.yml:3: MODEL.LAYERS", "x.yml:4: MODEL.RES_USE",
        "x.yml:7: SOLVER.SEED", "x.yml:8: SOLVER",
    ]  # fmt: skip
    assert "override: TEST.FEAT: has no value, write TEST.FEAT VALUE or TEST.FEAT=VALUE" in found


def test_a_missing_file_and_a_wrong_override() -> None:
    first, second = mistakes("nowhere/x.yml", "SOLVER.LR", "1")
    assert first.startswith("x.yml: neither a file nor the name of a shipped configuration")
    assert second.startswith("override: SOLVER.LR: unknown key")
