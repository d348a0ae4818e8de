"""Where a person is seen: a camera's lasting viewpoint, light, colours and scene, and the pictures it takes."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw, ImageFilter

from fusionreid.dataloading.datasets.synthetic import raster
from fusionreid.dataloading.datasets.synthetic.body import body
from fusionreid.dataloading.datasets.synthetic.person import person_of

GROUNDS = ((150, 146, 140), (118, 120, 124), (172, 158, 138), (96, 110, 84), (138, 116, 100), (88, 90, 96))
WALLS = ((150, 96, 78), (186, 178, 164), (128, 134, 142), (92, 104, 88), (206, 200, 190), (104, 96, 110), (72, 84, 70))
PASSERS_BY = 1 << 40  # persons from here on walk into the pictures of others


@dataclass(frozen=True)
class Camera:
    """A camera: where it looks, and how it renders."""

    yaw: float  # radians: the direction in which most people walk
    tilt: float  # radians downwards
    distance: float  # metres
    zoom: float  # how much of the picture's height a person fills
    jitter: float  # of place and size in the picture, deviation
    light: np.ndarray  # unit vector: right, down, to the viewer
    ambient: float
    mixing: np.ndarray  # (3, 3): colour cast, saturation and exposure
    gamma: float
    sharpness: float  # resolution over the picture's
    noise: float  # grey levels, deviation
    quality: int  # of the JPEG
    scene: np.ndarray  # (3, 1.25 height, 5 width) float32


@lru_cache(maxsize=64)
def camera_of(seed: int, camera: int, size: tuple[int, int]) -> Camera:
    """The camera's settings; neighbours by number look from directions 137 degrees apart."""
    rng = np.random.default_rng((seed, 3, camera))
    saturation, cast = rng.uniform(0.5, 0.95), np.exp(rng.normal(-0.05, 0.18) + rng.normal(0, 0.08, 3))
    light = np.array([rng.uniform(-0.75, 0.75), -0.35, 0.8])
    return Camera(
        yaw=2.4 * camera + rng.normal(0, 0.2),
        tilt=rng.uniform(0.08, 0.42),
        distance=rng.uniform(4.5, 9),
        zoom=rng.uniform(0.86, 0.97),
        jitter=rng.uniform(0.02, 0.05),
        light=light / np.linalg.norm(light),
        ambient=rng.uniform(0.4, 0.68),
        mixing=cast[:, None] * ((1 - saturation) / 3 + saturation * np.eye(3)),
        gamma=rng.uniform(0.8, 1.3),
        sharpness=rng.uniform(0.6, 1.1),
        noise=rng.uniform(1.5, 7.0),
        quality=int(rng.integers(60, 93)),
        scene=_scene(rng, size),
    )


def picture(seed: int, person: int, camera: int, image: int, size: tuple[int, int]) -> np.ndarray:
    """(H, W, 3) uint8: one person before one camera at one moment."""
    height, width = size
    view = camera_of(seed, camera, size)
    rng, track = (np.random.default_rng((seed, 4, person, camera, *moment)) for moment in ((image + 1,), (0,)))
    heading = view.yaw + track.normal(0, 0.45) if track.random() < 0.65 else track.uniform(0, 2 * np.pi)

    top, left = rng.integers(view.scene.shape[1] - height + 1), rng.integers(view.scene.shape[2] - width + 1)
    canvas = view.scene[:, top : top + height, left : left + width].copy()
    scale = height * view.zoom * np.exp(rng.normal(0, view.jitter)) / (person_of(seed, person).height + 0.08)
    x = width * (0.5 + rng.normal(0, view.jitter))
    y = height * (0.5 + 0.495 * view.zoom + rng.normal(0, view.jitter))

    def paint(who: int, yaw: float, place: tuple[float, float, float]) -> None:
        looks = person_of(seed, who)
        limbs = raster.project(body(looks, rng), yaw, view.tilt, view.distance, place)
        raster.draw(canvas, limbs, looks.materials, yaw, view.light, view.ambient, place[2])

    event, beside = rng.random(), width * rng.choice((-1, 1)) * rng.uniform(0.42, 0.65)
    stranger, direction = PASSERS_BY + int(rng.integers(100)), rng.uniform(0, 2 * np.pi)
    if event < 0.10:  # somebody walks behind
        paint(stranger, direction, (x + beside, y - 0.1 * height, 0.8 * scale))
    paint(person, heading + rng.normal(0, 0.3), (x, y, scale))
    if event > 0.94:  # or before
        paint(stranger, direction, (x + beside, y + 0.06 * height, 1.08 * scale))
    elif event > 0.84:
        _occlude(canvas, rng)
    return _expose(canvas, view, rng)


def _occlude(canvas: np.ndarray, rng: Generator) -> None:
    """A pole over the whole height, or a bin or a bollard before the legs."""
    _, height, width = canvas.shape
    pole = rng.random() < 0.5
    wide = max(2, int(width * (rng.uniform(0.06, 0.14) if pole else rng.uniform(0.4, 1.1))))
    left = int(rng.integers(-wide // 2, width - wide // 2))
    box = canvas[:, 0 if pole else int(height * rng.uniform(0.62, 0.85)) :, max(0, left) : left + wide]
    tone = rng.uniform(40, 190) + rng.normal(0, 18, 3)
    box[:] = tone[:, None, None] * np.cos(np.linspace(-1.1, 1.1, box.shape[2], dtype=np.float32))
    box[:, :2] *= 1.25


def _expose(canvas: np.ndarray, view: Camera, rng: Generator) -> np.ndarray:
    """Colour cast, exposure, gamma, blur by resolution, and sensor noise."""
    _, height, width = canvas.shape
    mixing = view.mixing * (np.exp(rng.normal(0, 0.08)) / 255)
    linear = np.clip(mixing.astype(np.float32) @ canvas.reshape(3, -1), 0, 1)
    pixels = (255 * linear ** np.float32(view.gamma)).T.astype(np.uint8).reshape(height, width, 3)
    sharp = min(1.0, view.sharpness * rng.uniform(0.75, 1.0))
    image = Image.fromarray(pixels).resize((round(width * sharp), round(height * sharp)), Image.Resampling.BOX)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    noise = rng.integers(0, 256, (2, height, width, 3), np.uint8).sum(0, dtype=np.float32) - 255  # deviation 104.5
    return np.clip(np.asarray(image) + noise * np.float32(view.noise / 104.5), 0, 255).astype(np.uint8)


def _scene(rng: Generator, size: tuple[int, int]) -> np.ndarray:
    """Paved ground in perspective before a brick wall, with things along it."""
    height, width = int(size[0] * 1.25), size[1] * 5
    horizon = int(height * rng.uniform(0.25, 0.6))
    ground, wall = (np.array(colours[rng.integers(len(colours))], np.float32) for colours in (GROUNDS, WALLS))
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    depth = np.maximum(y - horizon, 0) / (height - horizon)
    tile, brick = rng.uniform(0.5, 1.2), size[0] / rng.uniform(14, 30)
    across, away = (12 * x / width - 6) / (0.25 + depth) * tile, 3 * tile / (0.12 + depth)
    joints = np.maximum(np.abs(across % 1 - 0.5), np.abs(away % 1 - 0.5)) > 0.46
    seams = np.minimum(y / brick % 1, (x / brick + np.floor(y / brick)) / 2 % 1 * 2) < 0.14
    paved, laid = 0.8 + 0.3 * depth - rng.uniform(0, 0.2) * joints, 0.95 - rng.uniform(0, 0.2) * seams
    tones = np.where((y > horizon)[..., None], ground * paved[..., None], wall * laid[..., None])
    image = Image.fromarray(np.clip(tones, 0, 255).astype(np.uint8))
    _furnish(ImageDraw.Draw(image), rng, horizon, width, size[0] / 16)
    image = image.filter(ImageFilter.GaussianBlur(size[0] / 128 * rng.uniform(0.3, 1.1)))
    texture = np.ones((height, width), np.float32)
    for cells, strength in ((3, 0.06), (24, 0.03), (90, 0.02)):
        coarse = Image.fromarray(rng.normal(0, strength, (cells, cells * width // height)).astype(np.float32))
        texture += np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
    return np.asarray(image, np.float32).transpose(2, 0, 1) * texture


def _furnish(pen: ImageDraw.ImageDraw, rng: Generator, horizon: int, width: int, unit: float) -> None:
    """Windows, doors, hedges, parked cars and gaps along the wall: three of the five kinds for each camera."""
    left, kinds = 0.0, rng.permutation(5)[:3]
    while left < width:
        wide, kind = unit * rng.uniform(1.5, 6), rng.choice(kinds)
        red, green, blue = (int(v) for v in rng.uniform(50, 170) + rng.normal(0, 16, 3))
        if kind == 0:
            sill = horizon - unit * rng.uniform(0.5, 1.5)
            pen.rectangle(
                (left, sill - 3 * unit, left + wide, sill), (52, 62, 76), (214, 212, 206), max(1, int(unit / 5))
            )
        elif kind == 1:
            pen.rectangle((left, horizon - unit * rng.uniform(4, 7), left + wide * 0.6, horizon), (red, green, blue))
        elif kind == 2:
            pen.rounded_rectangle((left, horizon - 2 * unit, left + wide, horizon + unit / 2), unit, (58, 84, 50))
        elif kind == 3:
            right = left + wide + 3 * unit
            pen.rounded_rectangle((left + unit, horizon - 2.6 * unit, right - unit, horizon), unit / 2, (50, 58, 68))
            pen.rounded_rectangle((left, horizon - 1.6 * unit, right, horizon + unit / 2), unit / 2, (red, green, blue))
        left += wide + unit * rng.uniform(0.5, 5)
