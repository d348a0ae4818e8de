from pathlib import Path

import pytest

from bench import market
from fusionreid.dataloading import read_split
from fusionreid.dataloading.config import DatasetsConfig

FILES = (
    *("bounding_box_train/0002_c1s1_000451_03.jpg", "bounding_box_train/0007_c2s1_000451_03.jpg"),
    *("query/0001_c1s1_001051_00.jpg", "query/0003_c1s1_001051_00.jpg"),
    *("bounding_box_test/0000_c1s1_000151_01.jpg", "bounding_box_test/0001_c2s1_000151_01.jpg"),
    *("bounding_box_test/0003_c2s1_000151_01.jpg", "bounding_box_test/-1_c1s1_000401_03.jpg"),
)


def test_the_first_persons_are_taken_without_distractors(tmp_path: Path) -> None:
    for file in FILES:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    split = read_split(DatasetsConfig(NAMES="market1501", ROOT_DIR=str(tmp_path)))
    some = market.some_persons(split, 1)
    names = {part: [Path(record.path).name for record in records] for part, records in some.items()}
    assert names == {
        "train": ["0002_c1s1_000451_03.jpg"],
        "query": ["0001_c1s1_001051_00.jpg"],
        "gallery": ["0001_c2s1_000151_01.jpg"],
    }


def test_missing_data_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert market.main(["--data", str(tmp_path), "--output", str(tmp_path / "run")]) == 2
    assert "make market DATA=PATH" in capsys.readouterr().out
