"""Every file that a run leaves, damaged in every way, under every command that reads it: nothing is believed unread."""

import random
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from pathlib import Path

import pytest

from tests.promises import Tally
from tests.sweep import damage, world
from tests.sweep.damage import Damage
from tests.sweep.world import Outcome, World

pytestmark = pytest.mark.sweep
FLIPS, CUTS, FORGED = 1000, 300, 300  # the last of every kind of JSON file
QUICKEST = 3  # commands that read it


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> World:
    return world.build(tmp_path_factory.mktemp("made"))


def pairs(made: World) -> Iterator[tuple[Path, str]]:
    """Files and the commands that read them: first every file once, then every file by its next command."""
    most = max(map(len, made.opened.values()))
    for turn in range(most):
        for path, readers in sorted(made.opened.items()):
            if turn < len(readers):
                yield path, readers[turn]


def inject(made: World, tally: Tally, count: int, how: Callable[[random.Random], Damage]) -> None:
    for number, (path, reader) in enumerate(islice(cycle(list(pairs(made))), count)):
        judge(made, tally, path, reader, how(random.Random(number)), f"number {number}")


def judge(made: World, tally: Tally, path: Path, reader: str, how: Damage, what: str) -> Outcome:
    outcome = world.judge(made, reader, path, how)
    tally.add(outcome.kind, f"{what}: {path}, {reader}: {outcome.text[-1000:]}")
    return outcome


def test_every_file_of_a_run_is_known_to_be_read_or_not(made: World) -> None:
    """What no command reads cannot mislead one: the others are listed here, so that a new kind is thought of."""
    unread = {"exit.json", "log.txt", "report.html", "bad_images.json", "config.yml"}
    names = {path.name for path in made.opened}
    for path in made.folder.rglob("*"):
        inside = path.relative_to(made.folder)
        if path.is_file() and inside not in made.opened and not world.UNREAD.fullmatch(f"/{inside}"):
            older = inside.parent.name.startswith("step-")  # than the checkpoint that is read
            known = inside.name in names | unread or "tensorboard" in inside.parts
            assert older or known, f"who reads {inside}?"
    assert names >= {"best.json", "manifest.json", "state.json", "metrics.json"}


@pytest.mark.promise("A flipped bit in any kept file is found, or changes nothing")
def test_flipped_bits(made: World, tally: Tally) -> None:
    inject(made, tally, FLIPS, damage.flip)


@pytest.mark.promise("A kept file that is cut short is found, or changes nothing")
def test_cuts(made: World, tally: Tally) -> None:
    inject(made, tally, CUTS, damage.cut)


@pytest.mark.promise("A pipe, a folder, a link, a socket or nonsense in place of a kept file is named; nothing hangs")
def test_what_stands_in_their_place(made: World, tally: Tally) -> None:
    for path, reader in pairs(made):
        for what, place in damage.PLACES.items():
            if (what, path.name) == ("a pipe", "config.yml"):
                continue  # a shell's <(...) is one, and is waited for
            judge(made, tally, path, reader, damage.replace(place), what)


@pytest.mark.promise("Forged JSON with fitting digests: no traceback, no hang, no memory, no control character")
def test_forged_json(made: World, tally: Tally) -> None:
    """The numbers of a forger cannot be told from ours: here another result is no silence, but all else is lost."""
    kinds: dict[str, list[tuple[Path, str]]] = {}
    for path, reader in pairs(made):
        if damage.is_json(path):
            step = "checkpoint " if path.parent.name.startswith("step-") else ""
            kinds.setdefault(f"{step}{path.name}", []).append((path, reader))
    for kind, own in kinds.items():
        quick = sorted(own, key=lambda pair: made.seconds[pair[1]])[:QUICKEST]
        for number, (path, reader) in enumerate(islice(cycle(quick), FORGED)):
            outcome = world.judge(made, reader, path, damage.forge(random.Random(f"{kind} {number}")))
            judged = "survived" if outcome.kind == "silent" else outcome.kind
            tally.add(judged, f"number {number}: {path}, {reader}: {outcome.text[-1000:]}")
