"""Own data in a list: dialects, columns, and every fault at once."""

from pathlib import Path

import pytest

from fusionreid.dataloading import DataError, Split
from tests.dataloading.test_folder import make, read


def test_csv(tmp_path):
    file = tmp_path / "my crops.csv"
    rows = [
        "path,person,camera,split",
        "a.jpg,anna,door,train",
        '"b, c.jpg", anna ,hall,query',
        f"{tmp_path}/d.jpg,bob,door,gallery",
    ]
    file.write_bytes(("\ufeff" + "\r\n".join(rows) + "\r\n\r\n").encode())
    split = read("csv", file)
    assert [(r.path, r.person, r.camera) for r in (*split.train, *split.query, *split.gallery)] == [
        (f"{tmp_path}/a.jpg", 1, 0),
        (f"{tmp_path}/b, c.jpg", 1, 1),
        (f"{tmp_path}/d.jpg", 2, 0),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "lacks path, person, split in its header, which has nothing"),
        ("[" * 200_000, "is not a list but JSON"),
        ("path,person,split\n", "no images for query"),
        (
            "path,person,camera,split\na.jpg,1,1,train\nb.jpg,1,1,test\n",
            r"line 3: split must be train, query or gallery, got 'test' for 'b.jpg'",
        ),
        ("path,person,camera,split\na.jpg,1,,train\nb.jpg,1,1,query\n", "1 of 2 images name no camera"),
        ("path,person,camera,split\na.jpg,1\n", "line 2: split must not be empty"),
        ("path,person,camera,split\na.jpg,1,1,train\n", "no images for query"),
    ],
)
def test_wrong_csv(tmp_path, text, message):
    (tmp_path / "data.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        read("csv", tmp_path / "data.csv")


def test_missing_csv(tmp_path):
    with pytest.raises(DataError, match=r"csv: no file .*\nexpected:"):
        read("csv", tmp_path)


ROWS = [("a.jpg", "anna", "door", "train"), ("b.jpg", "bob", "hall", "query"), ("c, d.jpg", "bob", "door", "gallery")]
HEADER = ("path", "person", "camera", "split")


def listed(tmp_path: Path, rows, delimiter: str = ",", encoding: str = "utf-8", start: str = "") -> Split:
    lines = [delimiter.join(f'"{cell}"' if delimiter in cell else cell for cell in row) for row in rows]
    (tmp_path / "list.csv").write_bytes((start + "\r\n".join(lines) + "\r\n").encode(encoding))
    return read("csv", tmp_path / "list.csv")


def summary(split: Split) -> list[tuple[str, int, int]]:
    records = (*split.train, *split.query, *split.gallery)
    return [(Path(r.path).name, r.person, r.camera) for r in records]


EXPECTED = [("a.jpg", 1, 0), ("b.jpg", 2, 1), ("c, d.jpg", 2, 0)]


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_dialects(tmp_path, delimiter, encoding):
    split = listed(tmp_path, [HEADER, *ROWS], delimiter, encoding)
    assert summary(split) == EXPECTED
    assert split.person_names == {1: "anna", 2: "bob"}
    assert split.camera_names == {0: "door", 1: "hall"}


def test_a_spreadsheets_first_line(tmp_path):
    assert summary(listed(tmp_path, [HEADER, *ROWS], ";", start="sep=;\r\n")) == EXPECTED


@pytest.mark.parametrize(
    "header",
    [
        ("Path", "PERSON", " Camera ", "Split"),
        ("image_path", "pid", "camid", "subset"),
        ("File Name", "Person ID", "cam-id", "partition"),
        ("filename", "identity", "Cam", "set"),
    ],
)
def test_columns_under_their_usual_names(tmp_path, header):
    assert summary(listed(tmp_path, [header, *ROWS])) == EXPECTED
    reversed_rows = [row[::-1] for row in (header, *ROWS)]
    assert summary(listed(tmp_path, reversed_rows)) == EXPECTED


def test_without_a_camera_column_no_match_is_left_out(tmp_path):
    split = listed(tmp_path, [row[:2] + row[3:] for row in (HEADER, *ROWS)])
    assert [record.camera for record in (*split.train, *split.query, *split.gallery)] == [0, 0, 1]
    assert "no cameras named" in split.note
    empty = listed(tmp_path, [HEADER, *((path, person, "", part) for path, person, _, part in ROWS)])
    assert summary(empty) == summary(split)


def test_all_faults_are_told_in_one_run(tmp_path):
    lines = ["path,person,camera,split", '"a.jpg,anna,door,train', "b.jpg,,door,query", "c.jpg,bob,door,val",
             '"d.jpg" x,bob,door,gallery', "e.jpg,bob,hall,query", "f.jpg,bob,door,gallery"]  # fmt: skip
    (tmp_path / "list.csv").write_text("\n".join(lines))
    with pytest.raises(DataError) as caught:
        read("csv", tmp_path / "list.csv")
    assert [line.strip().partition(": ")[0] for line in str(caught.value).splitlines()[1:]] == [
        "line 2", "line 3", "line 4", "line 5",
    ]  # fmt: skip
    assert "line 2: a quote is not closed" in str(caught.value)
    (tmp_path / "list.csv").write_text("path,person,camera,split\n" + "a.jpg,,1,train\n" * 50)
    with pytest.raises(DataError, match=r"(?s)has 50 rows .*line 21: .*and 30 more$") as caught:
        read("csv", tmp_path / "list.csv")
    assert len(str(caught.value).splitlines()) == 22


def test_a_comma_outside_quotes_is_told(tmp_path):
    (tmp_path / "list.csv").write_text("path,person,camera,split\na, b.jpg,anna,door,train\n")
    with pytest.raises(DataError, match="line 2: it has 5 cells, the header 4; put text that holds the delimiter in"):
        read("csv", tmp_path / "list.csv")


def test_a_list_full_of_open_quotes_ends_soon(tmp_path):
    (tmp_path / "list.csv").write_text("path,person,camera,split\n" + 'a.jpg,"x,1,train\n' * 50_001)
    with pytest.raises(DataError, match="line 2: a quote is not closed"):
        read("csv", tmp_path / "list.csv")


def test_a_line_break_in_quotes_belongs_to_the_cell(tmp_path):
    split = listed(tmp_path, [HEADER, ('"a\nb.jpg"', "anna", "door", "train"), *ROWS[1:]])
    assert split.train[0].path == str(tmp_path / "a\nb.jpg")


def test_backslashes_of_windows(tmp_path):
    make(tmp_path, "crops/a.jpg", "odd\\name.jpg")
    rows = [
        ("crops\\a.jpg", "a", "1", "train"),
        ("odd\\name.jpg", "b", "1", "query"),
        ("crops\\b.jpg", "b", "2", "gallery"),
    ]
    split = listed(tmp_path, [HEADER, *rows])
    assert split.train[0].path == str(tmp_path / "crops/a.jpg")
    assert split.query[0].path == str(tmp_path / "odd\\name.jpg")


def test_an_image_has_one_person_and_counts_once(tmp_path):
    with pytest.raises(DataError, match=r"1 images belong to two persons: .*a.jpg \('anna', 'carl'\); each shows one"):
        listed(tmp_path, [HEADER, *ROWS, ("a.jpg", "carl", "door", "train")])
    with pytest.raises(DataError, match=r"1 images belong to two cameras: .*a.jpg \('door', 'hall'\)"):
        listed(tmp_path, [HEADER, *ROWS, ("a.jpg", "anna", "hall", "train")])
    split = listed(tmp_path, [HEADER, *ROWS, ROWS[0]])
    assert summary(split) == EXPECTED
    assert split.warnings == ("1 images are named more than once in the same part, and count once",)


def test_junk_is_left_out_of_a_list_too(tmp_path):
    split = listed(tmp_path, [HEADER, *ROWS, ("x.jpg", "-1", "door", "gallery"), ("y.jpg", "-1.0", "door", "gallery")])
    assert summary(split) == EXPECTED
    assert split.left_out == {"junk: person -1": (str(tmp_path / "x.jpg"), str(tmp_path / "y.jpg"))}


def test_a_control_character_is_never_printed(tmp_path):
    with pytest.raises(DataError) as caught:
        listed(tmp_path, [HEADER, ("\x1b[31m.jpg", "anna", "door", "\x1b[0m"), ("a.jpg", "", "\x1b", "train")])
    assert "\x1b" not in str(caught.value)


def test_query_and_gallery_alone_can_be_evaluated(tmp_path):
    split = listed(tmp_path, [HEADER, *ROWS[1:]])
    assert (split.train, len(split.query), len(split.gallery)) == ((), 1, 1)


def test_a_test_part_is_for_train_data_alone(tmp_path):
    rows = [(*row[:3], "test" if row[3] != "train" else "train") for row in ROWS]
    with pytest.raises(DataError, match=r"got 'test' for 'b.jpg'; train --data divides a test by itself"):
        listed(tmp_path, [HEADER, *rows])


@pytest.mark.parametrize(("name", "start", "message"), [
    ("a.zip", b"PK\x03\x04", "not a list but a ZIP archive or a spreadsheet"), ("a.csv.gz", b"\x1f\x8b", "gzip"),
    ("a.json", b"[{}]", "not a list but JSON"), ("a.jpg", b"\xff\xd8\xff\xe0\0\x10JFIF\0", "an image: name the folder"),
    ("a.bin", b"\x01\x02\0\x03abcdefgh", "a binary file"), ("a.html", b"<html>", "a web page"),
])  # fmt: skip
def test_what_is_no_list_is_named(tmp_path, name, start, message):
    (tmp_path / name).write_bytes(start)
    with pytest.raises(DataError, match=message):
        read("csv", tmp_path / name)


def test_columns_taken_by_another_name_or_not_at_all_are_told(tmp_path):
    numbered = [(str(i), *row) for i, row in enumerate(ROWS)]
    split = listed(tmp_path, [("id", "filename", "label", "cam", "split"), *numbered])
    assert summary(split) == EXPECTED
    assert split.note == "path from 'filename'; person from 'label'; camera from 'cam'; not read: 'id'"
    with pytest.raises(DataError, match="has the column 'person' twice"):
        listed(tmp_path, [(*HEADER, "Person"), *((*row, "x") for row in ROWS)])


def test_what_windows_writes_is_read(tmp_path):
    """Names in cp1252, beside files whose names are UTF-8; addresses of files."""
    make(tmp_path, "é/a.jpg", "b c.jpg")
    rows = [("é\\a.jpg", "José", "1", "train"), (f"file://{tmp_path}/b%20c.jpg", "x", "1", "query")]
    rows += [(path, "x", "2", "gallery") for path in ("./d.jpg", "e//../d.jpg", "d.jpg")]
    split = listed(tmp_path, [HEADER, *rows], encoding="cp1252")
    assert split.train[0].path == f"{tmp_path}/é/a.jpg"
    assert split.person_names[1] == "José"
    assert split.query[0].path == f"{tmp_path}/b c.jpg"
    assert len(split.gallery) == 2  # one more, since beyond a link .. may lead elsewhere


@pytest.mark.parametrize("missing", ["nan", "None", "<NA>", "unknown"])
def test_what_is_not_known_is_no_name(tmp_path, missing):
    rows = [HEADER, *ROWS, ("e.jpg", missing, "door", "train")]
    assert list(listed(tmp_path, rows).left_out.values()) == [(f"{tmp_path}/e.jpg",)]
    assert listed(tmp_path, [HEADER, *((*row[:2], missing, row[3]) for row in ROWS)]).camera_names == {}
    with pytest.raises(DataError, match="1 of 3 images name no camera"):
        listed(tmp_path, [HEADER, (*ROWS[0][:2], missing, "train"), *ROWS[1:]])
