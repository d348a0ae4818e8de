import io
import os
import time

import numpy as np
import pytest
from PIL import Image

from dataloading.records import DataError, Record, Split, check_batch, check_images, scarce_persons


def split_of(train: list[tuple[int, int]], test: list[tuple[int, int]] = ((1, 0),)) -> Split:
    """Records from (person, camera)."""
    parts = [tuple(Record(f"/{i}.jpg", *pair) for i, pair in enumerate(part)) for part in (train, test, test)]
    return Split("market1501", "/data", *parts, note="a note")


def image_bytes(kind: str = "JPEG", size: tuple[int, int] = (64, 128), mode: str = "RGB", **options: object) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(file, kind, **options)
    return file.getvalue()


def test_split_counts_and_labels():
    split = split_of([(7, 3), (2, 0), (7, 1)], [(0, 4), (2, 0)])
    assert split.persons == (2, 7)
    assert split.labels == [1, 0, 1]
    assert split.cameras == (0, 1, 3)
    assert (split.num_persons, split.num_cameras) == (2, 4)
    assert [line.split() for line in split.describe().splitlines()] == [
        ["market1501", "in", "/data"],
        ["part", "images", "persons", "cameras"],
        ["train", "3", "2", "3"],
        ["query", "2", "2", "2"],
        ["gallery", "2", "2", "2"],
        ["a", "note"],
    ]
    assert scarce_persons(split, 2) == 1


def test_an_empty_part_is_an_error():
    with pytest.raises(DataError, match="no images for train in /data; all three parts are needed"):
        split_of([])


def test_check_batch():
    split = split_of([(person, 0) for person in range(8)])
    check_batch(split, 128, 16, world_size=4)
    for arguments, message in {
        (130, 16): r"got 130 = 8 x 16 \+ 2; the next is 144",
        (4, 16): r"got 4 = 0 x 16 \+ 4; the next is 16",
        (128, 16, 3): "a multiple of 3 x 16 = 48, got 128 = 8 x 16",
        (144, 16): r"8 persons to train on, a batch needs 9 \(144 images / 16 per person\); .* at most 128",
    }.items():
        with pytest.raises(DataError, match=message):
            check_batch(split, *arguments)


JPEG = image_bytes()
BAD = {
    "empty.jpg": (b"", "empty file"),
    "text.jpg": (b"hello, this is no picture", "not an image"),
    "page.jpg": (b"<html>404</html>" * 50, "not an image"),
    "header.jpg": (JPEG[:20], "not an image"),
    "half.jpg": (JPEG[: len(JPEG) // 2], "truncated"),
    "no_end.jpg": (JPEG[:-2], "truncated"),
    "half.png": (image_bytes("PNG")[:2000], "truncated"),
    "half.bmp": (image_bytes("BMP")[:2000], "truncated"),
}
GOOD = {
    "plain.jpg": JPEG,
    "trailing.jpg": JPEG + b"\0" * 100,
    "png_named.jpg": image_bytes("PNG"),
    "gray.jpg": image_bytes(mode="L"),
    "cmyk.jpg": image_bytes(mode="CMYK"),
    "progressive.jpg": image_bytes(progressive=True),
    "one_pixel.png": image_bytes("PNG", (1, 1)),
    "thin.webp": image_bytes("WEBP", (1, 4000)),
}


def test_good_files_pass(tmp_path):
    for name, data in GOOD.items():
        (tmp_path / name).write_bytes(data)
    check_images([Record(str(tmp_path / name), 1, 0) for name in GOOD])


def test_every_bad_file_is_named_with_its_fault(tmp_path):
    for name, data in {**BAD, "good.jpg": (JPEG, "")}.items():
        (tmp_path / name).write_bytes(data[0])
    os.mkfifo(tmp_path / "fifo.jpg")
    (tmp_path / "folder.jpg").mkdir()
    names = [*BAD, "good.jpg", "fifo.jpg", "folder.jpg", "missing.jpg"]
    with pytest.raises(DataError) as caught:
        check_images([Record(str(tmp_path / name), 1, 0) for name in names])
    heading, *lines = str(caught.value).splitlines()
    assert heading.startswith("11 of 12 image files cannot be used")
    faults = {os.path.basename(line.split(": ")[0]): line.split(": ", 1)[1] for line in lines}
    expected = {name: fault for name, (_, fault) in BAD.items()}
    expected |= {"fifo.jpg": "not a regular", "folder.jpg": "directory", "missing.jpg": "No such file"}
    assert faults.keys() == expected.keys()
    for name, fault in expected.items():
        assert fault in faults[name], name


def test_twenty_bad_files_are_named_and_the_rest_counted(tmp_path):
    with pytest.raises(DataError) as caught:
        check_images([Record(str(tmp_path / f"{i:02}.jpg"), 1, 0) for i in range(25)])
    lines = str(caught.value).splitlines()
    assert len(lines) == 22
    assert lines[-1] == "  and 5 more"


def test_a_header_of_400_megapixels_is_refused(tmp_path):
    size = JPEG.index(b"\xff\xc0") + 5
    for name, side in {"bomb.jpg": 20_000, "big.jpg": 5_001}.items():
        (tmp_path / name).write_bytes(JPEG[:size] + side.to_bytes(2, "big") * 2 + JPEG[size + 4 :])
    with pytest.raises(
        DataError, match=r"big.jpg: its header says 5001 x 5001(?s:.)*bomb.jpg: its header says more than 25,000,000"
    ):
        check_images([Record(str(tmp_path / name), 1, 0) for name in ("bomb.jpg", "big.jpg")])


def test_the_check_is_quick(tmp_path):
    (tmp_path / "image.jpg").write_bytes(JPEG)
    for i in range(500):
        os.link(tmp_path / "image.jpg", tmp_path / f"{i}.jpg")
    start = time.process_time()
    check_images([Record(str(tmp_path / f"{i}.jpg"), 1, 0) for i in range(500)])
    assert (time.process_time() - start) / 500 < 500e-6  # decoding would take longer; alone it is 70 us
