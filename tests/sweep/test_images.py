"""Images damaged at random: each is decoded as Pillow decodes it, or named; none hangs or fills the memory."""

import io
import random
import resource
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from fusionreid.dataloading.decode import BICUBIC, decode
from fusionreid.dataloading.index import inspect_file
from fusionreid.dataloading.records import DataError
from tests.promises import Tally
from tests.sweep.world import GROWTH_KIB, limited

pytestmark = pytest.mark.sweep
IMAGES = 1000
SIZE = 96, 48  # height, width
FORMATS = {"JPEG": {"quality": 90}, "PNG": {}, "WEBP": {"quality": 90}, "BMP": {}, "GIF": {}, "TIFF": {}}


def picture(draw: random.Random) -> bytes:
    pixels = np.random.default_rng(draw.randrange(2**32)).integers(0, 256, (SIZE[0] // 8, SIZE[1] // 8, 3), np.uint8)
    image, kind = Image.fromarray(pixels).resize((SIZE[1], SIZE[0])), draw.choice(list(FORMATS))
    options = {"progressive": True} if kind == "JPEG" and draw.random() < 0.3 else {}
    file = io.BytesIO()
    image.convert(draw.choice(["RGB", "L"])).save(file, kind, **FORMATS[kind], **options)
    return file.getvalue()


def mutated(data: bytes, draw: random.Random) -> bytes:
    """Bits, blocks, cuts, repeats, and numbers in the header that are too large."""
    changed, at = bytearray(data), draw.randrange(len(data))
    match draw.randrange(6):
        case 0:
            for _ in range(draw.randint(1, 40)):
                changed[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        case 1:
            changed[at : at + draw.randint(1, 200)] = bytes(draw.randint(0, 200))
        case 2:
            del changed[at:]
        case 3:
            changed[at:at] = changed[: draw.randrange(len(data))]
        case 4:
            start = draw.randrange(min(200, len(data) - 2))
            changed[start : start + 2] = draw.randbytes(2)
        case _:
            changed += draw.randbytes(draw.randint(1, 2000))
    return bytes(changed)


@pytest.mark.promise("A damaged image is read as Pillow reads it, or named; none hangs or fills the memory")
def test_mutated_images(tmp_path: Path, tally: Tally, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(IMAGES):
        draw = random.Random(number)
        path = tmp_path / "image.jpg"
        path.write_bytes(mutated(picture(draw), draw))
        with limited():
            entry, kind = inspect_file(str(path)), "refused"
            if not entry.fault:
                try:
                    pixels = decode(str(path), (32, 16), BICUBIC)
                    with Image.open(path) as image:
                        full = np.asarray(image.convert("RGB"))
                    path.with_suffix(".png").write_bytes(b"")
                    Image.fromarray(full).save(path.with_suffix(".png"))
                    expected = decode(str(path.with_suffix(".png")), (32, 16), BICUBIC)
                    same = (pixels.int() - expected.int()).abs().max() <= 2
                    kind = "survived" if same else "silent"
                except DataError:
                    kind = "refused"
        tally.add(kind, f"number {number}: {entry}")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < GROWTH_KIB
