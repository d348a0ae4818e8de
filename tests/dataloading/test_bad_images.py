"""Bad image files before the first step: named, replaced, or refused."""

import errno
import fcntl
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from fusionreid.dataloading import DataError, Record, Split
from fusionreid.dataloading.bad_images import FILE, BadImages, replacement_candidates
from tests.dataloading.test_records import JPEG, image_bytes


def make_split(tmp_path: Path) -> Split:
    """400 images to train on, of 8 persons under 2 cameras, 800 queries, 800 in the gallery; links to three files."""
    (tmp_path / "data").mkdir()
    parts: dict[str, tuple[Record, ...]] = {}
    for number, (part, count) in enumerate({"train": 400, "query": 800, "gallery": 800}.items()):
        data = image_bytes(size=(16 + number, 32))
        (tmp_path / part).write_bytes(data)
        records = [Record(str(tmp_path / f"data/{part}_{i}.jpg"), i % 8, i // 8 % 2) for i in range(count)]
        for record in records:
            os.link(tmp_path / part, record.path)
        parts[part] = tuple(records)
    return Split("own", str(tmp_path / "data"), **parts)


@pytest.fixture
def split(tmp_path: Path) -> Split:
    return make_split(tmp_path)


def images(split: Split) -> tuple[tuple[Record, ...], ...]:
    return split.train, split.query, split.gallery


def spoil(record: Record, data: bytes = JPEG[:-9]) -> str:
    Path(record.path).unlink()
    Path(record.path).write_bytes(data)
    return record.path


def listed(folder: Path) -> list[dict]:
    return json.loads((folder / "bad_images.json").read_text())


def test_error_ends_the_run_with_the_list(split, tmp_path):
    paths = [spoil(record, b"") for record in (*split.train[:22], split.query[0])]
    with pytest.raises(DataError) as caught:
        BadImages("error", tmp_path / "out").check(split)
    assert caught.value.exit_code == 2
    heading, *lines, more, remedy = str(caught.value).splitlines()
    assert heading == "23 of 2,000 image files cannot be used:"
    assert lines == [f"  {path}: empty file" for path in sorted(paths)[:20]]
    assert more == "  and 3 more"
    assert remedy == f"replace them or take them out; {tmp_path / 'out/bad_images.json'} names all"
    assert listed(tmp_path / "out")[-1] == {
        "part": "query",
        "path": paths[-1],
        "reason": "empty file",
        "replacement": None,
    }
    assert len(listed(tmp_path / "out")) == 23


def test_skip_replaces_a_bad_image_by_another_of_the_same_person(split, tmp_path, caplog):
    bad = BadImages("skip", tmp_path)
    assert images(bad.check(split)) == images(split)
    assert not (tmp_path / "bad_images.json").exists()
    spoil(split.train[3])
    spoil(split.gallery[7])
    used = bad.check(split)
    assert used.train == (*split.train[:3], split.train[19], *split.train[4:])  # the next of person 3, camera 0
    assert (used.query, used.gallery) == (split.query, split.gallery[:7] + split.gallery[8:])
    assert used.note == "bad image files left out: 1 of train, 0 of query, 1 of gallery"
    assert used.note in caplog.text
    reasons = {(line["part"], line["replacement"]) for line in listed(tmp_path)}
    assert reasons == {("train", split.train[19].path), ("gallery", None)}
    assert used.labels == split.labels
    with pytest.raises(DataError, match=r"or set DATASETS.ON_BAD skip$"):
        BadImages("error").check(split)
    spoil(split.query[0])
    with pytest.raises(
        DataError, match=r"^3 of 2,000(?s:.)*skip tolerates one file in 1,000, and one in any data set$"
    ):
        bad.check(split)


def test_evaluation_asks_for_query_and_gallery_only(split, tmp_path):
    spoil(split.train[3])
    strict, lenient = BadImages("error", tmp_path), BadImages("skip", tmp_path)
    assert images(strict.check(split, ("query", "gallery"))) == images(split)
    path = spoil(split.query[7])
    with pytest.raises(DataError, match=f"^2 of 2,000(?s:.)*{path}: image file is truncated"):
        strict.check(split, ("query", "gallery"))
    used = lenient.check(split, ("query", "gallery"))  # one in a thousand of the whole data set
    assert (used.train, len(used.query)) == (split.train, 799)
    assert [line["path"] for line in listed(tmp_path)] == [split.train[3].path, path]
    spoil(split.query[7], image_bytes())
    spoil(split.train[3], image_bytes())
    assert images(strict.check(split)) == images(split)
    assert listed(tmp_path) == []


def test_images_of_no_data_set_are_all_looked_at_first(split, tmp_path, caplog):
    before = sorted(tmp_path.rglob("*"))
    assert BadImages().check_images(split.query) == split.query
    paths = sorted([spoil(split.gallery[7]), spoil(split.query[3], b"")])
    for rule in ("error", "skip"):
        with pytest.raises(DataError, match=r"^2 of 1,600 image files cannot be used:") as caught:
            BadImages(rule).check_images((*split.query, *split.gallery))
        assert all(path in str(caught.value) for path in paths)
        assert "names all" not in str(caught.value)
    used = BadImages("skip").check_images((*split.train, *split.query, *split.query))
    assert split.query[3] not in used
    assert len(used) == 1998
    assert f"{split.query[3].path}: empty file" in caplog.text
    assert sorted(tmp_path.rglob("*")) == before


def test_a_person_without_another_image(split, tmp_path):
    alone = Record(spoil(Record(split.train[0].path, 99, 0)), 99, 0)
    lonely = Split("own", split.root, (alone, *split.train[1:]), split.query, split.gallery)
    with pytest.raises(DataError, match=r"train_0.jpg: .*truncated.*no other image to replace it"):
        BadImages("skip", tmp_path).check(lonely)


def test_the_order_in_which_others_replace_an_image():
    records = [Record(str(i), *pair) for i, pair in enumerate([(1, 0), (1, 1), (2, 0), (1, 0), (1, 1), (1, 0)])]
    assert replacement_candidates(records, 3) == [5, 0, 4, 1]
    assert replacement_candidates([*records, records[3]], 3) == [
        5,
        0,
        4,
        1,
    ]  # the same file once more is no other image


def test_warnings_are_told_once(split, tmp_path, caplog):
    spoil(split.train[5], Path(split.query[9].path).read_bytes())
    spoil(split.gallery[5], image_bytes("WEBP", (1, 400)))
    spoil(split.query[1], Path(split.gallery[2].path).read_bytes())
    BadImages("error", tmp_path).check(split)
    assert caplog.text.count("over 10 times as long as wide") == 1
    assert "799 test images are in train too, byte for byte, which flatters every measure: " in caplog.text
    assert f"{split.train[5].path} = {split.query[0].path}" in caplog.text
    assert "799 gallery images are queries too" in caplog.text


def test_processes_that_name_files_at_once_lose_none(tmp_path):
    def name_ten(process: int) -> None:
        rule = BadImages("skip", tmp_path, total=100_000)
        for i in range(10):
            rule.report_late(Record(f"/{process}_{i}.jpg", 1, 0), ValueError("x"), Record("/other.jpg", 1, 0))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(name_ten, range(4)))
    assert len({line["path"] for line in listed(tmp_path)}) == 40
    assert sorted(path.name for path in tmp_path.iterdir()) == [f".{FILE}.lock", FILE]


@pytest.mark.parametrize("content", ["{}", "[1]", "null", '[{"path": 3}]', "[" * 100_000, '"\\ud800"', ""])
def test_a_forged_list_is_written_anew(tmp_path, content):
    (tmp_path / FILE).write_text(content)
    rule = BadImages("skip", tmp_path, total=100_000)
    rule.report_late(Record("/a.jpg", 1, 0), ValueError("x"), Record("/other.jpg", 1, 0))
    assert [line["path"] for line in listed(tmp_path)] == ["/a.jpg"]


def test_a_file_is_named_where_only_what_is_open_for_writing_can_be_locked(tmp_path, monkeypatch):
    """As on NFS."""

    def flock(file, how):
        if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    monkeypatch.setattr(fcntl, "flock", flock)
    rule = BadImages("skip", tmp_path, total=100_000)
    rule.report_late(Record("/a.jpg", 1, 0), ValueError("x"), Record("/other.jpg", 1, 0))
    assert [line["path"] for line in listed(tmp_path)] == ["/a.jpg"]


def test_one_bad_file_is_skipped_in_a_small_set_too(split, tmp_path):
    small = Split("own", split.root, split.train[:16] * 2, split.query[:8], split.gallery[:8])
    spoil(split.query[3])
    used = BadImages("skip", tmp_path).check(small)
    assert used.query == (*split.query[:3], *split.query[4:8])
    assert used.left_out == {
        "a bad image file: image file is truncated (147 bytes not processed)": (split.query[3].path,)
    }
    assert used.found == 32
    spoil(split.query[4])
    with pytest.raises(DataError, match="2 of 32 image files cannot be used"):
        BadImages("skip", tmp_path).check(small)


def test_the_same_bytes_twice_in_one_part_are_told(tmp_path):
    paths = {name: tmp_path / f"{name}.png" for name in ("a", "b", "c", "d", "e")}
    for number, path in enumerate(paths.values()):
        path.write_bytes(image_bytes("PNG", (8 + number % 3, 16)))  # a = d, b = e
    a, b, c, d, e = (Record(str(path), person, 0) for path, person in zip(paths.values(), (1, 2, 3, 1, 3), strict=True))
    split = Split("own", str(tmp_path), (a, b, d, e), (c,), (c,), person_names={2: "bob", 3: "carl"})
    warnings = BadImages(folder=tmp_path).check(split).warnings
    assert f"1 images in train are given to two persons, byte for byte: {b.path} (bob) = {e.path} (carl)" in warnings[0]
    assert warnings[1] == f"1 images in train are there more than once, byte for byte: {a.path} = {d.path}"


def test_images_to_be_turned_are_told(tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6
    for name, options in {"a": {"exif": turned}, "b": {}, "c": {}}.items():
        (tmp_path / f"{name}.jpg").write_bytes(image_bytes(size=(16, 32), **options))
    one, *others = (Record(str(tmp_path / f"{name}.jpg"), 1, 0) for name in "abc")
    warnings = (
        BadImages(folder=tmp_path).check(Split("own", str(tmp_path), (one,), (others[0],), (others[1],))).warnings
    )
    assert f"1 images ask in their EXIF data to be turned, and are read as they are stored: {one.path}" in warnings[0]
