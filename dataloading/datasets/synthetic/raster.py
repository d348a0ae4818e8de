"""Limbs -> pixels: tapered, round-ended strips with the light and the cloth of a cylinder, all limbs at once.

Each limb has a box of candidate pixels; the boxes of all P limbs, one after the other, are N entries of flat arrays.
"""

import numpy as np

from fusionreid.dataloading.datasets.synthetic import person as looks


def project(
    limbs: np.ndarray, yaw: float, tilt: float, distance: float, place: tuple[float, float, float]
) -> np.ndarray:
    """Limbs (P, 14) in metres -> limbs in pixels, far to near, with the ends as x, y, nearness.

    yaw turns the person about the vertical, tilt looks down from above, distance (metres) sets the perspective;
    place is the feet's x and y in pixels, and pixels per metre.
    """
    left, base, scale = place
    x, y, z = limbs[:, :6].reshape(-1, 2, 3).transpose(2, 0, 1)  # (P, 2)
    side, ahead = x * np.cos(yaw) + z * np.sin(yaw), z * np.cos(yaw) - x * np.sin(yaw)
    near = ahead * np.cos(tilt) + (y - 0.9) * np.sin(tilt)
    zoom = scale * distance / (distance - near)
    up = y * np.cos(tilt) - ahead * np.sin(tilt)
    seen = np.sqrt(np.cos(yaw) ** 2 + (limbs[:, 10:11] * np.sin(yaw)) ** 2)  # width of the flat or deep ones
    out = limbs.copy()
    out[:, :6] = np.stack([left + side * zoom, base - up * zoom, near], -1).reshape(-1, 6)
    out[:, 6:9] *= seen * zoom.mean(1, keepdims=True)
    out[:, 9:10] /= seen
    return out[np.argsort(near.mean(1) + limbs[:, 11], kind="stable")]


def draw(
    canvas: np.ndarray, limbs: np.ndarray, materials: np.ndarray,
    yaw: float, light: np.ndarray, ambient: float, scale: float,
) -> None:  # fmt: skip
    """Paint projected limbs into canvas (3, H, W) float32.

    materials (M, 10) as in Person; light is a unit vector (right, down, to the viewer), ambient the share of light from
    everywhere; scale is pixels per metre.
    """
    x, y = limbs[:, [0, 3]], limbs[:, [1, 4]]
    reach = (limbs[:, 6:8].max(1) + np.maximum(limbs[:, 8], 0) + 1) * np.maximum(limbs[:, 9], 1)
    height, width = canvas.shape[1:]
    left, top = (np.clip(v.min(1) - reach, 0, n).astype(np.int64) for v, n in ((x, width), (y, height)))
    right, bottom = (np.clip(v.max(1) + reach + 1, 0, n).astype(np.int64) for v, n in ((x, width), (y, height)))
    wide = right - left
    size = wide * (bottom - top)
    stop = np.cumsum(size)

    along = np.stack([x[:, 1] - x[:, 0], y[:, 1] - y[:, 0]])
    length = np.sqrt((along * along).sum(0)) + 1e-3
    ux, uy = along / length
    ra, rb, bulge, cap = limbs[:, 6:10].T
    material = limbs[:, 12].astype(np.int64)
    sideways = light[1] * ux - light[0] * uy
    table = np.stack([
        stop - size, wide, left + 0.5 - x[:, 0], top + 0.5 - y[:, 0], ux, uy, length, ra, rb - ra + 4 * bulge,
        4 * bulge, 1 / cap, sideways, limbs[:, 13], material, *materials[material, :6].T,
    ]).astype(np.float32)  # fmt: skip
    table = np.repeat(table, size, axis=1)  # (20, N)
    start, wide, x0, y0, ux, uy, length, ra, slope, bulge, end, sideways, opacity, material = table[:14]

    index = np.arange(stop[-1], dtype=np.float32) - start
    row = np.floor((index + 0.5) / wide)
    x, y = x0 + index - row * wide, y0 + row
    distance, across = x * ux + y * uy, y * ux - x * uy  # across: positive to the right of an upward limb
    inside = np.minimum(np.maximum(distance, 0), length)
    t = inside / length
    radius = ra + t * (slope - t * bulge)
    beyond = (distance - inside) * end
    cover = np.minimum(np.maximum(radius - np.sqrt(across * across + beyond * beyond) + 0.5, 0), 1) * opacity

    inverse = 1 / np.maximum(radius, 0.5)
    s = np.minimum(np.maximum(across * inverse, -1), 1)  # sine of the angle around the limb
    beyond *= 0.6 * inverse
    lit = float(light[2]) * np.sqrt(np.maximum(1 - s * s - beyond * beyond, 0)) + sideways * s
    mix = np.zeros_like(s)
    for kind in np.flatnonzero(materials[:, 6]):
        chosen = np.flatnonzero((material == kind) & (cover > 0))
        mix[chosen] = _pattern(materials[kind], s[chosen], t[chosen], inside[chosen] / np.float32(scale), yaw)
    first, second = table[14:17], table[17:20]
    colour = (first + (second - first) * mix) * ((ambient + (1 - ambient) * np.maximum(lit, 0)) * cover)
    keep = 1 - cover
    for i in np.flatnonzero(size):
        part, box = slice(stop[i] - size[i], stop[i]), (..., slice(top[i], bottom[i]), slice(left[i], right[i]))
        shape = 3, bottom[i] - top[i], right[i] - left[i]
        canvas[box] *= keep[part].reshape(shape[1:])
        canvas[box] += colour[:, part].reshape(shape)


def _pattern(material: np.ndarray, s: np.ndarray, t: np.ndarray, metres: np.ndarray, yaw: float) -> np.ndarray:
    """How much of the second colour, 0..1: waves around the limb, u, and along it, v."""
    kind, around, along, share = material[6:10]
    angle = s + 0.57 * s * (s * s) ** 2 - np.float32(yaw)  # the arcsine, nearly; 0 is the person's front
    u, v = np.cos(around * angle), np.sin(along * metres)
    match kind:
        case looks.HOOPS:
            wave = v + share
        case looks.STRIPES:
            wave = u + share
        case looks.CHECKS:
            wave = 2 * u * v
        case looks.DOTS:
            wave = u + v - 0.8
        case looks.GRADIENT:
            wave = (t - 0.5) / 2
        case looks.YOKE:
            wave = 6 * (t - 0.6 - 0.2 * share)
        case looks.DIAGONAL:
            wave = np.sin(3 * angle + along * metres)
        case looks.ZIGZAG:
            wave = np.sin(along * metres + 1.8 * u)
        case looks.CAMOUFLAGE:
            wave = np.sin(2 * angle + 2 * v) + np.sin(0.45 * along * metres + 2 * u) + share
        case looks.OPEN:
            wave = 5 * (np.cos(angle) - 0.93)
        case looks.SIDES:
            wave = 4 * (np.abs(np.sin(angle)) - 0.86)
        case _:  # plaid: where the bands cross, twice as much
            return np.clip(2 * u - 0.1, 0, 1) / 2 + np.clip(2 * v - 0.1, 0, 1) / 2
    return np.clip(0.5 + 2 * wave, 0, 1)
