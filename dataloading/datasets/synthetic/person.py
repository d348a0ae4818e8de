"""Who is seen: a person's lasting looks, drawn from (seed, person)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.random import Generator

LOOK_ALIKES = 4  # persons 4k .. 4k + 3 wear the same colours where k is odd

BRIGHT = ((28, 28, 32), (58, 60, 66), (128, 130, 134), (226, 226, 222), (28, 36, 72), (48, 88, 160), (120, 168, 210),
          (170, 34, 38), (98, 26, 42), (44, 96, 62), (98, 104, 62), (226, 190, 60), (222, 118, 42), (214, 130, 156),
          (104, 66, 130), (196, 176, 140), (116, 82, 56), (40, 132, 138))  # fmt: skip
MUTED = ((30, 30, 34), (66, 68, 74), (46, 60, 96), (86, 112, 152), (142, 160, 182), (176, 158, 122), (92, 84, 62),
         (206, 204, 198), (88, 58, 44), (132, 44, 48))  # fmt: skip
COMPLEXION = ((242, 206, 178), (226, 180, 146), (198, 146, 108), (156, 106, 74), (108, 70, 50), (78, 52, 40))
NATURAL = ((24, 20, 20), (52, 34, 26), (92, 60, 38), (150, 104, 58), (206, 172, 108), (150, 148, 146), (128, 52, 32))

PLAIN, HOOPS, STRIPES, CHECKS, DOTS, GRADIENT, YOKE, DIAGONAL, ZIGZAG, CAMOUFLAGE, OPEN, SIDES, PLAID = range(13)
ANY = (PLAIN, PLAIN, PLAIN, PLAIN, HOOPS, HOOPS, HOOPS, STRIPES, CHECKS, DOTS, GRADIENT, YOKE, DIAGONAL, ZIGZAG,
       CAMOUFLAGE, OPEN, OPEN, PLAID, PLAID)  # fmt: skip
TROUSERS = (PLAIN, PLAIN, PLAIN, PLAIN, PLAIN, PLAIN, GRADIENT, CAMOUFLAGE, SIDES, SIDES, STRIPES, CHECKS)

SKIN, HAIR, TOP, BOTTOM, SHOES, SOLES, LEGS, BAG, PRINT, HAT, DARK = range(11)  # rows of Person.materials


@dataclass(frozen=True)
class Person:
    """Build, clothes and things of a rendered person."""

    height: float  # metres
    girth: float  # this and the next three: over the mean build
    shoulders: float
    limbs: float
    fit: float  # of trousers and skirt
    belly: float  # this and the next: over the height
    coat: float  # length of the top below the hips
    hair: str
    hat: str
    face: str
    sleeves: str
    lower: str
    bag: str
    hand: int  # that carries: -1 or 1
    boots: bool
    print: tuple[float, float, float, float] | None  # direction; height, half width and half height over the height
    materials: np.ndarray  # (11, 10): two colours, pattern, waves around, waves along per metre * 2 pi, share


@lru_cache(maxsize=4096)
def person_of(seed: int, person: int) -> Person:
    """The looks of one person; look-alikes share the colours of top, bottom and shoes and differ in all else."""
    own = np.random.default_rng((seed, 1, person))
    group = person // LOOK_ALIKES
    clothes = np.random.default_rng((seed, 2, group)) if group % 2 else own

    def colour(palette: Sequence[tuple[int, int, int]], rng: Generator = own) -> np.ndarray:
        tint = np.exp(rng.normal(0, 0.09) + rng.normal(0, 0.04, 3))
        return np.clip(np.array(palette[int(rng.integers(len(palette)))]) * tint, 12, 245)

    def cloth(first: np.ndarray, second: np.ndarray, *patterns: int) -> list[float]:
        return [*first, *second, pick(*patterns), own.integers(4, 9), own.uniform(55, 120), own.uniform(-0.5, 0.5)]

    def pick(*options: Any) -> Any:
        return options[own.integers(len(options))]

    top, accent = colour(BRIGHT, clothes), colour(BRIGHT, clothes)
    bottom, shoes = colour(MUTED, clothes), colour(MUTED, clothes)
    skin, black, bag = colour(COMPLEXION), np.full(3, 26.0), colour(BRIGHT)
    lower = pick("trousers", "trousers", "trousers", "shorts", "skirt", "long skirt")
    materials = {
        SKIN: cloth(skin, skin, PLAIN),
        HAIR: cloth(colour(NATURAL), skin, PLAIN),
        TOP: cloth(top, accent, *ANY),
        BOTTOM: cloth(bottom, accent, *(ANY if "skirt" in lower else TROUSERS)),
        SHOES: cloth(shoes, shoes, PLAIN),
        SOLES: cloth(pick(np.full(3, 225.0), 0.6 * shoes), shoes, PLAIN),
        LEGS: cloth(pick(skin, black), skin, PLAIN),
        BAG: cloth(bag, 0.6 * bag, PLAIN, PLAIN, HOOPS, YOKE),
        PRINT: cloth(pick(accent, accent, colour(BRIGHT)), top, PLAIN, PLAIN, HOOPS, DOTS),
        HAT: cloth(colour(BRIGHT), skin, PLAIN),
        DARK: cloth(black, skin, PLAIN),
    }
    extent = pick(own.uniform(0.017, 0.045, 2), (0.011, 0.011))
    return Person(
        height=own.uniform(1.52, 1.94),
        girth=own.uniform(0.82, 1.22),
        shoulders=own.uniform(0.88, 1.12),
        limbs=own.uniform(0.82, 1.2),
        fit=own.uniform(0.95, 1.3),
        belly=pick(0.0, 0.0, 0.02),
        coat=pick(0.0, 0.0, 0.03, 0.17),
        hair=pick("short", "short", "long", "long", "bob", "bun", "tail", "bald", "afro"),
        hat=pick("", "", "", "", "cap", "beanie", "brim", "hood"),
        face=pick("", "", "glasses", "beard"),
        sleeves=pick("long", "long", "short", "none"),
        lower=lower,
        bag=pick("", "", "", "backpack", "backpack", "handbag", "satchel", "case"),
        hand=pick(-1, 1),
        boots=pick(True, False, False, False),
        print=pick(None, (pick(0.0, 0.0, np.pi), own.uniform(0.68, 0.73), *extent)),
        materials=np.array([materials[row] for row in range(len(materials))], np.float32),
    )
