from pathlib import Path

import pytest

from fusionreid.dataloading import DataError
from tests.dataloading.test_readers import read, touch, tuples, write


def test_msmt17_v2_with_jpeg_files_and_windows_lines(tmp_path):
    folders = {"train": "mask_train_v2", "val": "mask_train_v2", "query": "mask_test_v2", "gallery": "mask_test_v2"}
    write("msmt17", tmp_path / "msmt17/MSMT17_V2", ".jpeg", "\r\n", folders)
    split = read("msmt17", tmp_path)
    assert split.note.startswith("MSMT17 V2, train + val")
    assert all(Path(r.path).is_file() and "mask_t" in r.path for r in (*split.train, *split.query, *split.gallery))


def test_msmt17_in_the_market_layout(tmp_path):
    for folder in ("bounding_box_train", "query", "bounding_box_test"):
        touch(tmp_path / "MSMT17" / folder / "0003_c15_0007.jpg")
    split = read("msmt17", tmp_path)
    assert tuples(split, "train") == [("bounding_box_train/0003_c15_0007.jpg", 3, 14)]
    assert "Market-1501 layout" in split.note


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda root: (root / "list_val.txt").unlink(), "no file list_val.txt"),
        (lambda root: (root / "list_query.txt").write_text("\n \n"), "lists no images"),
        (lambda root: (root / "list_query.txt").write_text("a/b.jpg 0"), "list_query.txt:1 must be like"),
        (lambda root: (root / "test").rename(root / "t"), "neither the folders of V1 nor those of V2"),
        (lambda root: [(root / f"mask_{p}_v2").mkdir() for p in ("train", "test")], "V1 and V2 side by side"),
    ],
)
def test_wrong_folders_are_named(tmp_path, break_it, message):
    break_it(write("msmt17", tmp_path / "msmt17"))
    with pytest.raises(DataError, match=message):
        read("msmt17", tmp_path)
