import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from fusionreid.dataloading.dataset_warnings import few_persons
from fusionreid.dataloading.records import DataError, Record, Split, check_batch, scarce_persons
from tests import ROOT


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
    with pytest.raises(DataError, match="no images for query in /data; query and gallery are always needed"):
        split_of([(1, 0)], [])
    without_train = split_of([])
    assert (without_train.num_persons, without_train.num_cameras, without_train.labels) == (0, 0, [])
    with pytest.raises(DataError, match="no images for train in /data; without them it can be evaluated"):
        check_batch(without_train, 64, 4)


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


BOMB = """
import resource, sys
from fusionreid.dataloading.image_files import open_file, open_image
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    try:
        with open_file(path) as file:
            open_image(file)
    except ValueError as error:
        print(error)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_a_lying_header_costs_no_memory(tmp_path):
    def with_sides(kind: str, mark: bytes, offset: int, sides: bytes, **options: object) -> bytes:
        data = image_bytes(kind, **options)
        place = data.index(mark) + offset
        return data[:place] + sides + data[place + len(sides) :]

    big, little = (struct.pack(order, 16_000, 16_000) for order in (">HH", "<HH"))
    header = struct.pack(">4sIIBBBBB", b"IHDR", 16_000, 16_000, 8, 2, 0, 0, 0)
    bombs = {
        "a.jpg": with_sides("JPEG", b"\xff\xc0", 5, struct.pack(">HH", 5001, 5001)),
        "b.jpg": with_sides("JPEG", b"\xff\xc0", 5, big),
        "c.png": with_sides("PNG", b"IHDR", 0, header + zlib.crc32(header).to_bytes(4, "big")),
        "d.bmp": with_sides("BMP", b"BM", 18, struct.pack("<II", 16_000, 16_000)),
        "e.gif": with_sides("GIF", b"GIF8", 6, little, mode="P"),
        "f.webp": with_sides("WEBP", b"VP8 ", 14, little),
        "g.ppm": b"P6 16000 16000 255\n" + bytes(1000),
    }
    paths = [tmp_path / name for name in bombs]
    for path in paths:
        path.write_bytes(bombs[path.name])
    result = subprocess.run([sys.executable, "-c", BOMB, *paths], capture_output=True, text=True, check=True, cwd=ROOT)
    *found, growth = result.stdout.splitlines()
    assert found[0] == "its header says 5001 x 5001 pixels, more than 25,000,000"
    assert [fault[:15] for fault in found] == ["its header says"] * len(bombs)
    assert int(growth) < 50 * 1024  # KiB


@pytest.mark.parametrize(("query", "gallery", "warning"), [
    ((7,), (7, 7), "one person only: every match is right"), ((7, 7), (7, 8), "all queries show one person"),
    ((7, 8), (7, 8), ""),
])  # fmt: skip
def test_a_test_set_that_measures_nothing_is_warned_of(query, gallery, warning: str) -> None:
    records = [tuple(Record(f"{part}{i}.jpg", person, i) for i, person in enumerate(persons))
               for part, persons in (("q", query), ("g", gallery))]  # fmt: skip
    split = Split("own", "/data", (Record("t.jpg", 1, 0),), *records)
    assert [warning in line for line in few_persons(split)] == [True] * bool(warning)
