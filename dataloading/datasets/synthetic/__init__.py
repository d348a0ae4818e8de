"""A rendered ReID data set: pedestrians under several cameras, on disk in the Market-1501 layout.

Every picture is a pure function of (seed, person, camera, image, size). Persons 1..N train, the next M are tested.
"""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from fusionreid.dataloading.config import DatasetsConfig
from fusionreid.dataloading.datasets import market1501
from fusionreid.dataloading.datasets.synthetic.camera import camera_of, picture
from fusionreid.dataloading.image_files import read_file
from fusionreid.dataloading.records import DataError, Split, printable
from fusionreid.errors import StorageError
from fusionreid.files import locked

PARAMETERS = "synthetic.json"  # beside the folders: what they were rendered from
SHOWN = 300  # characters of what is found there instead
RENDERER = 1  # counts changes of the pictures that the same parameters give
NOT_WRITABLE = errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST
DISTRACTORS = 1 << 20  # persons from here on are seen once, in the gallery


def render_person(seed: int, person: int, camera: int, image: int, size: tuple[int, int] = (128, 64)) -> np.ndarray:
    """Render one picture, (height, width, 3) uint8; camera from 0."""
    return picture(seed, person, camera, image, size)


def render_dataset(
    root: str | Path, *, persons: int, test_persons: int, cameras: int, images: int, seed: int, size: tuple[int, int]
) -> Path:
    """Write the whole data set to `root`, unless it is there; `images` is per person and camera.

    Of each test person and camera the first picture is the query, the others are gallery; one in six gallery
    pictures more shows a distractor. The folder appears at once and whole; of several processes one renders, the
    others wait.
    """
    if min(persons, test_persons) < 1 or min(cameras, images) < 2 or min(size) < 16 or seed < 0:
        raise DataError(
            "DATASETS.SYNTHETIC: PERSONS and TEST_PERSONS must be at least 1, CAMERAS and IMAGES at least 2, SIZE at "
            f"least 16 pixels, SEED at least 0, got {persons}, {test_persons}, {cameras}, {images}, {size} and {seed}"
        )
    root = Path(root).absolute()
    wanted = {"persons": persons, "test_persons": test_persons, "cameras": cameras, "images": images, "seed": seed,
              "size": list(size), "renderer": RENDERER}  # fmt: skip
    if _complete(root, wanted):
        return root
    root.parent.mkdir(parents=True, exist_ok=True)
    with locked(root.parent / f".{root.name}.lock"):
        if _complete(root, wanted):  # by now
            return root
        for left in root.parent.glob(f".{root.name}-*"):  # by processes that were killed
            shutil.rmtree(left, ignore_errors=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
        try:
            draft.chmod(0o755)
            for folder in market1501.PARTS.values():
                (draft / folder).mkdir()
            for folder, number, person, camera, image in _pictures(persons, test_persons, cameras, images):
                name = f"{number:04d}_c{camera + 1}s1_{25 * image + 1:06d}_{image + 1:02d}.jpg"
                pixels = Image.fromarray(render_person(seed, person, camera, image, size))
                pixels.save(draft / folder / name, "JPEG", quality=camera_of(seed, camera, size).quality)
            (draft / PARAMETERS).write_text(json.dumps(wanted))
            os.rename(draft, root)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    return root


def _complete(root: Path, wanted: dict[str, object]) -> bool:
    """Tell whether the folder holds this data set; DataError: it holds something else."""
    if not root.is_dir() or not any(root.iterdir()):
        return False
    try:
        found = json.loads(read_file(str(root / PARAMETERS)))
    except (OSError, ValueError, RecursionError):
        found = "files of other origin"
    if found != wanted:
        raise DataError(
            f"{printable(root)} holds {str(found)[:SHOWN]}, going by its {PARAMETERS}, "
            f"not the synthetic data set {wanted}; "
            "remove that folder or choose another DATASETS.ROOT_DIR"
        )
    return True


def _pictures(persons: int, test_persons: int, cameras: int, images: int) -> Iterator[tuple[str, int, int, int, int]]:
    """Yield (folder, number in the file name, person, camera, image)."""
    train, query, gallery = market1501.PARTS.values()
    for person in range(1, persons + test_persons + 1):
        for camera in range(cameras):
            for image in range(images):
                folder = train if person <= persons else gallery if image else query
                yield folder, person, person, camera, image
    for i in range(test_persons * cameras * (images - 1) // 6):
        yield gallery, 0, DISTRACTORS + i, i % cameras, i // cameras


def read(cfg: DatasetsConfig) -> Split:
    """Read the data set as configured, rendered when absent into the folder `synthetic` of DATASETS.ROOT_DIR."""
    made = cfg.SYNTHETIC
    try:
        root = render_dataset(
            Path(cfg.ROOT_DIR).expanduser() / "synthetic",
            persons=made.PERSONS,
            test_persons=made.TEST_PERSONS,
            cameras=made.CAMERAS,
            images=made.IMAGES,
            seed=made.SEED,
            size=made.SIZE,
        )
    except OSError as error:
        text = f"DATASETS.ROOT_DIR {cfg.ROOT_DIR} did not take the rendered data set: {error}"
        if error.errno in NOT_WRITABLE:
            raise DataError(f"{text}; set another one") from error
        raise StorageError(f"{text}; make room or set another one") from error
    return market1501.read_layout(root, "synthetic")
