"""Lists of images to search with, as spreadsheets and trackers write them."""

from pathlib import Path

import pytest

from fusionreid.dataloading.image_list import Listed, is_list, read_image_list
from fusionreid.dataloading.records import DataError


@pytest.mark.parametrize("text", [
    "path,track,person,camera\na.jpg,7,Zoë,hall\n\nb/c.jpg,8,,\n",
    "\ufeffTrack ID;Image;pid;cam\n7;a.jpg;Zoë;hall\n8;b/c.jpg\n",
    'frame\ttid\tfile\tidentity\tcamera name\n1\t7\t"a.jpg"\tZoë\thall\n2\t8\tb/c.jpg\t\t\n',
])  # fmt: skip
def test_columns_are_found_by_their_usual_names(tmp_path: Path, text: str) -> None:
    (tmp_path / "list.csv").write_text(text, "utf-8")
    root = tmp_path.absolute()
    assert read_image_list(tmp_path / "list.csv") == [
        Listed(f"{root}/a.jpg", "7", "Zoë", "hall"), Listed(f"{root}/b/c.jpg", "8", "", "")
    ]  # fmt: skip


def test_a_list_is_known_by_its_suffix_and_one_that_is_gone_is_named(tmp_path: Path) -> None:
    assert [is_list(Path(name)) for name in ("a.csv", "a.TSV", "a.jpg", "csv")] == [True, True, False, False]
    with pytest.raises(DataError, match=r"the list .*gone\.csv cannot be read: No such file"):
        read_image_list(tmp_path / "gone.csv")
