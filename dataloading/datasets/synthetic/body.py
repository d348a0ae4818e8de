"""The limbs of a person's body in one pose, clothed."""

from collections.abc import Iterable

import numpy as np
from numpy.random import Generator

from fusionreid.dataloading.datasets.synthetic.person import (
    BAG,
    BOTTOM,
    DARK,
    HAIR,
    HAT,
    LEGS,
    PRINT,
    SHOES,
    SKIN,
    SOLES,
    TOP,
    Person,
)


class Limbs:
    """Rows of 14: end a (3), end b (3), radius at a and at b, bulge, cap, depth, layer, material, opacity.

    Lengths are over the person's height; x is the person's left, y up, z ahead. a is the lower end. cap: length of the
    round end over the radius; depth: over the width; layer: how much nearer it counts when limbs are sorted.
    """

    def __init__(self) -> None:
        self.rows: list[tuple[float, ...]] = []

    def add(
        self, material: int, a: Iterable[float], b: Iterable[float], ra: float, rb: float, *, bulge: float = 0.0,
        cap: float = 1.0, depth: float = 1.0, layer: float = 0.0, opacity: float = 1.0,
    ) -> None:  # fmt: skip
        """Add a limb from a to b, with radii ra and rb."""
        self.rows.append((*a, *b, ra, rb, bulge, cap, depth, layer, material, opacity))


def body(person: Person, rng: Generator) -> np.ndarray:
    """The limbs (P, 14) of one random pose, in metres, feet on y = 0."""
    limbs = Limbs()
    phase, stride = rng.uniform(0, 2 * np.pi), min(0.55, abs(rng.normal(0.2, 0.2)))
    ground = 1.0
    for side in (-1, 1):
        swing, bend = side * stride * np.sin(phase), 0.1 + 1.1 * stride * max(0.0, side * np.cos(phase))
        hip = np.array([side * 0.052 * person.girth, 0.515, 0.0])
        knee = _reach(hip, 0.235, swing)
        ankle = _reach(knee, 0.235, swing - bend)
        ground = min(ground, ankle[1] - 0.045)
        _leg(limbs, person, side, hip, knee, ankle)
    limbs.add(DARK, (0, ground, 0), (0, ground + 0.01, 0), 0.17, 0.17, cap=0.28, layer=-9, opacity=0.45)  # shadow
    chest = _torso(limbs, person)
    for side in (-1, 1):
        swing, raised = -0.8 * side * stride * np.sin(phase), rng.random() < 0.14
        lift, bend = (0.5, 1.9) if raised else (swing, 0.25 + 0.5 * stride + 0.3 * rng.random())
        shoulder = np.array([side * 0.108 * person.shoulders * (0.8 + 0.2 * person.girth), 0.782, 0.0])
        elbow = _reach(shoulder, 0.165, lift, side * rng.uniform(0.1, 0.28))
        wrist = _reach(elbow, 0.15, lift + bend, -side * rng.uniform(0, 0.15))
        _arm(limbs, person, side, shoulder, elbow, wrist)
    _bag(limbs, person, chest)
    _head(limbs, person)
    rows = np.array(limbs.rows, np.float32)
    rows[:, [1, 4]] -= ground
    rows[:, :9] *= person.height
    return rows


def _reach(start: np.ndarray, length: float, angle: float, out: float = 0.0) -> np.ndarray:
    return start + length * np.array([out, -np.cos(angle), np.sin(angle)])


def _leg(limbs: Limbs, person: Person, side: int, hip: np.ndarray, knee: np.ndarray, ankle: np.ndarray) -> None:
    heel, toe = ankle - (0, 0.024, 0.012), ankle - (-0.01 * side, 0.028, -0.085)
    limbs.add(SOLES, heel - (0, 0.008, 0), toe - (0, 0.008, 0), 0.02, 0.017)
    limbs.add(SHOES, heel, toe, 0.023, 0.018)
    trousers, bare = person.lower == "trousers", LEGS if "skirt" in person.lower else SKIN
    cover, fit = (BOTTOM, person.fit) if trousers else (bare, 1.0)
    shin, thigh = 0.026 * person.limbs, 0.0275 * (person.limbs + person.girth)
    middle = 1.45 * shin * (0.7 + 0.3 * fit)
    calf = (ankle + knee) / 2
    limbs.add(SHOES if person.boots else cover, ankle, calf, shin * fit, 0.5 * (shin * fit + middle) + 0.004)
    limbs.add(cover, calf, knee, 0.5 * (shin * fit + middle) + 0.003, middle)
    limbs.add(cover, knee, hip, middle, thigh)
    if person.lower == "shorts":
        limbs.add(BOTTOM, 0.75 * knee + 0.25 * hip, hip, shin * 1.9 * person.fit, thigh * 1.05, cap=0.25)


def _torso(limbs: Limbs, person: Person) -> float:
    """Half the width of the chest."""
    waist, chest = 0.078 * person.girth, 0.098 * person.shoulders * (0.6 + 0.4 * person.girth)
    over = 0.15 if person.coat > 0.1 else 0.015  # over the legs
    if "skirt" in person.lower:
        hem, wide = (0.12, 1.2) if person.lower == "long skirt" else (0.3, 1.1)
        limbs.add(BOTTOM, (0, hem, 0), (0, 0.56, 0), waist * wide * person.fit, waist, cap=0.15, depth=0.85, layer=0.1)
    limbs.add(BOTTOM, (0, 0.5, 0), (0, 0.57, 0), waist * 1.06, waist, cap=0.5, depth=0.75, layer=0.01)
    limbs.add(TOP, (0, 0.55 - person.coat, 0), (0, 0.775, 0), waist * 1.05 + 0.12 * person.coat, chest,
              bulge=person.belly - 0.006, cap=0.45, depth=0.66, layer=over)  # fmt: skip
    limbs.add(SKIN, (0, 0.82, -0.005), (0, 0.87, 0.005), 0.032 * person.limbs, 0.028)
    if person.print:
        angle, y, width, height = person.print
        x, z = 0.68 * chest * np.sin(angle), 0.68 * chest * np.cos(angle)
        limbs.add(PRINT, (x, y - height, z), (x, y + height, z), width, width, cap=0.3, depth=0.2, layer=over + 0.01)
    return chest


def _arm(limbs: Limbs, person: Person, side: int, shoulder: np.ndarray, elbow: np.ndarray, wrist: np.ndarray) -> None:
    upper, lower = 0.03 * person.limbs, 0.021 * person.limbs
    long, bare = person.sleeves == "long", person.sleeves == "none"
    loose = 1.15 if long else 0.92
    limbs.add(SKIN, 1.28 * wrist - 0.28 * elbow, wrist, 0.016, 0.018)
    limbs.add(TOP if long else SKIN, wrist, elbow, lower * loose, upper * loose)
    limbs.add(SKIN if bare else TOP, elbow, shoulder, upper * loose, upper * 1.12)
    if person.sleeves == "short":
        limbs.add(SKIN, elbow, (elbow + shoulder) / 2, upper * 0.9, upper, layer=0.01)
    if person.bag in ("handbag", "case") and side == person.hand:
        size, depth = (0.05, 1.4) if person.bag == "handbag" else (0.07, 2.0)
        hand, low = wrist - (0, 0.05, 0), wrist - (0, 0.11 + size, 0)
        limbs.add(BAG, low, hand, 0.005, 0.004, layer=0.03)
        limbs.add(BAG, low - (0, 0.04, 0), low - (0, -0.03, 0), size, 0.85 * size, cap=0.25, depth=depth, layer=0.04)


def _bag(limbs: Limbs, person: Person, chest: float) -> None:
    front, back = 0.6 * chest, -0.7 * chest
    if person.bag == "backpack":
        limbs.add(BAG, (0, 0.59, back - 0.05), (0, 0.74, back - 0.045), 0.075, 0.07, cap=0.5, depth=0.6)
        for x in (-0.06, 0.06):
            limbs.add(BAG, (x, 0.64, front), (x, 0.8, front / 2), 0.011, 0.012, layer=0.03)
    elif person.bag == "satchel":
        for z in (front, back):
            limbs.add(BAG, (-0.075, 0.56, z), (0.075, 0.8, 0.7 * z), 0.01, 0.01, layer=0.03)
        limbs.add(BAG, (-0.1, 0.49, 0), (-0.1, 0.55, 0), 0.055, 0.055, cap=0.25, depth=1.4, layer=0.06)


def _head(limbs: Limbs, person: Person) -> None:
    """A skull from y 0.85 to 0.99; the hair is behind and above it, the face ahead."""
    if person.hair in ("long", "bob"):
        end = 0.77 if person.hair == "long" else 0.86
        limbs.add(HAIR, (0, end, -0.03), (0, 0.939, -0.014), 0.056, 0.057, cap=0.5, depth=0.8)
    limbs.add(SKIN, (0, 0.897, 0.002), (0, 0.939, 0), 0.044, 0.05)
    if person.hair != "bald":
        size = 0.072 if person.hair == "afro" else 0.055
        limbs.add(HAIR, (0, 0.909, -0.022), (0, 0.943, -0.014), size, size, layer=-0.005)
        limbs.add(HAIR, (0, 0.945, -0.02), (0, 0.951, 0.004), 0.052, 0.051, layer=0.006)
        limbs.add(SKIN, (0, 0.917, 0.028), (0, 0.925, 0.022), 0.043, 0.045, depth=0.7, layer=0.02)
    if person.hair == "bun":
        limbs.add(HAIR, (0, 0.979, -0.05), (0, 0.984, -0.05), 0.025, 0.025)
    if person.hair == "tail":
        limbs.add(HAIR, (0, 0.81, -0.085), (0, 0.939, -0.062), 0.015, 0.023)
    eye = 0.013 if person.face == "glasses" else 0.006
    for x in (-0.019, 0.019):
        limbs.add(DARK, (x, 0.923, 0.056), (x, 0.924, 0.056), eye, eye, layer=0.02, opacity=0.8)
    if person.face == "beard":
        limbs.add(HAIR, (0, 0.867, 0.022), (0, 0.885, 0.025), 0.034, 0.04, cap=0.6, layer=0.025)
    if person.hat == "hood":
        limbs.add(TOP, (0, 0.83, -0.02), (0, 0.85, -0.025), 0.062, 0.055, cap=0.7)
    elif person.hat:
        limbs.add(HAT, (0, 0.947, -0.008), (0, 0.961, -0.008), 0.059, 0.054, cap=0.6, layer=0.05)
    if person.hat == "cap":
        limbs.add(HAT, (0, 0.927, 0.035), (0, 0.927, 0.085), 0.04, 0.03, layer=0.055)
    if person.hat == "brim":
        limbs.add(HAT, (0, 0.937, 0), (0, 0.941, 0), 0.085, 0.08, cap=0.12, layer=0.055)
