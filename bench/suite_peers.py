"""This engine against torchreid, fast-reid and BoxMOT's ReID trainer: the whole tools on Market-1501, one by one.

The same backbone from the same weights, at the same size, batch, number of steps and threads, fp32 on a CPU. Every job
is a process of its own (`bench/peers.py`). mAP is that of each tool's own evaluator, checked against ours on the same
features. Q queries, G gallery, D width.
"""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch
from torchvision import models

from bench.machine import ROOT
from bench.peers import BATCH, HEIGHT, WIDTH
from bench.timing import Case, Measurement, Settings, Work, WrongResultError

SOURCES = (
    "kernels/*.py",
    "fusionreid/**/*.py",
    "dataloading/**/*.py",
    "engine/**/*.py",
    "bench/peers.py",
    "bench/peer_tools.py",
    "bench/suite_evaluation.py",
    "bench/evaluators.py",
    "bench/machine.py",
)
PEERS = {  # the folder of each below --peers, and the file that says its version
    "torchreid": ("deep-person-reid", "torchreid/__init__.py"),
    "fast-reid": ("fast-reid", "fastreid/__init__.py"),
    "boxmot": ("boxmot", "boxmot/__init__.py"),
}
MARKET = "Market-1501-v15.09.15"
VERSION = re.compile(r"""^__version__ = ["'](.+)["']""", re.MULTILINE)


@dataclass(frozen=True)
class Training:
    """One training of every tool; on all images of so many persons, the first ones by number."""

    backbone: str
    steps: int
    persons: int
    test_persons: int


TRAININGS = {
    "quick": [Training("resnet18", 3, 16, 20)],
    "default": [Training("resnet50", 12, 64, 20), Training("resnet18", 60, 100, 50)],
}
EVALUATIONS = {  # queries, gallery, width, persons, cameras
    "quick": [(30, 200, 16, 10, 3)],
    "default": [(3368, 19732, 512, 751, 6), (3368, 19732, 2048, 751, 6)],  # Market-1501 with its junk
}
SHAPE = f"B {BATCH}, {HEIGHT} x {WIDTH}, float32"
FURTHER_STARTS = 2
EXACT = 1e-12  # of an mAP, from the order of a sum in fp64
ROUNDING = 1e-5  # of an mAP of fp32 distances, in which some neighbours change places
Result = dict[str, Any]


class Jobs:
    """Jobs of the tools that are there, each done once, in a folder that goes with this object."""

    def __init__(self, sources: Mapping[str, Path | None], market: Path | None) -> None:
        self.sources, self.market = sources, market
        self._opened = TemporaryDirectory()
        self.folder = Path(self._opened.name)
        self._done: dict[str, Result | RuntimeError] = {}

    def __call__(self, tool: str, what: str, **given: Any) -> Result:
        """Do a job, or return what it brought before; RuntimeError has the last line of a tool that failed."""
        key = json.dumps([tool, what, given])
        if key not in self._done:
            try:
                self._done[key] = self._do(tool, what, given)
            except RuntimeError as error:
                self._done[key] = error
        done = self._done[key]
        if isinstance(done, RuntimeError):
            raise done
        return done

    def _do(self, tool: str, what: str, given: Mapping[str, Any]) -> Result:
        result, log = self.folder / "result.json", self.folder / f"{tool}.log"
        result.unlink(missing_ok=True)
        with TemporaryDirectory(dir=self.folder) as folder, open(log, "w", encoding="utf-8") as output:
            job = {"tool": tool, "what": what, "source": str(self.sources[tool] or ""), "folder": folder, **given}
            text = json.dumps({**job, "result": str(result), "began": perf_counter()})
            command = [sys.executable, str(ROOT / "bench/peers.py"), text]
            code = subprocess.run(command, stdout=output, stderr=output, cwd=folder, check=False).returncode
        if code or not result.exists():
            *_, last = ["", *log.read_text(encoding="utf-8", errors="replace").strip().splitlines()]
            raise RuntimeError(f"exit code {code}: {last}")
        done: Result = json.loads(result.read_text(encoding="utf-8"))
        return done

    def train(self, tool: str, training: Training) -> Result:
        """Train, then embed and evaluate."""
        return self(tool, "train", **self._given(training), steps=training.steps, embed=True)

    def start(self, tool: str, training: Training, number: int) -> Result:
        """Train one step, for the time that it takes to come so far."""
        return self(tool, "train", **self._given(training), steps=1, embed=False, number=number)

    def _given(self, training: Training) -> dict[str, str]:
        data = self.folder / f"{training.persons}-{training.test_persons}" / "market1501"
        weights = self.folder / f"{training.backbone}.pth"
        if not data.exists():
            assert self.market is not None
            link_first(self.market, data / MARKET, training)
        if not weights.exists():
            torch.manual_seed(1111)
            state = getattr(models, training.backbone)().state_dict()
            torch.save({name: tensor for name, tensor in state.items() if not name.startswith("fc.")}, weights)
        return {"data": str(data), "weights": str(weights), "backbone": training.backbone}


def link_first(market: Path, folder: Path, training: Training) -> None:
    """Link all images of the first persons into a folder of the same layout; distractors and junk are left out."""
    parts = {"bounding_box_train": training.persons}
    parts |= dict.fromkeys(("query", "bounding_box_test"), training.test_persons)
    for part, count in parts.items():
        (folder / part).mkdir(parents=True)
        images = sorted((market / part).glob("[0-9]*.jpg"))
        persons = sorted({image.name[:4] for image in images} - {"0000"})[:count]
        for image in images:
            if image.name[:4] in persons:
                (folder / part / image.name).symlink_to(image)


def cases(settings: Settings) -> list[Case]:
    """List the cases whose tools and images are there, and say on standard error what is missing."""
    if settings.device.type != "cpu":
        left_out("everything is", "the tools are compared on a CPU", "--cpu")
        return []
    names, sources = find(settings.peers)
    if len(names) == 1:
        return []
    size = "quick" if settings.size == "quick" else "default"
    market = settings.data / MARKET if settings.data else None
    if market is None or not (market / "bounding_box_train").is_dir():
        left_out("training and embedding are", f"no {market or MARKET}", "--data FOLDER that holds it")
        market = None
    jobs = Jobs(sources, market and market.absolute())
    trainings = TRAININGS[size] if market else []
    found = []
    for training in trainings:
        name = f"{training.backbone}, {training.steps} steps, {SHAPE}"
        found.append(Case("training", name, partial(of_tools, names, partial(training_step, jobs, training), BATCH)))
        found.append(Case("embedding", name, partial(of_tools, names, partial(embedding, jobs, training), BATCH)))
    for training in trainings[:1]:
        name = f"{training.backbone}, {SHAPE}"
        found.append(Case("command to first step", name, partial(of_tools, names, partial(start, jobs, training))))
    for sizes in EVALUATIONS[size]:
        name = "Q {}, G {}, D {}, float32".format(*sizes)
        found.append(Case("evaluation", name, partial(of_tools, names, partial(evaluation, jobs, sizes))))
    return found


def find(peers: Path | None) -> tuple[dict[str, str], dict[str, Path | None]]:
    """Find the tools below a folder: their names with versions and their sources, ours first."""
    names, sources = {"ours": "ours"}, dict[str, Path | None](ours=None)
    for tool, (folder, version) in PEERS.items():
        file = (peers or Path()) / folder / version
        if peers is None or not file.is_file():
            remedy = f"--peers FOLDER that holds its source as {folder}"
            left_out(f"{tool} is", f"no {file if peers else folder}", remedy)
            continue
        match = VERSION.search(file.read_text(encoding="utf-8"))
        names[tool], sources[tool] = f"{tool} {match[1]}" if match else tool, (peers / folder).absolute()
    return names, sources


def left_out(what: str, why: str, remedy: str = "") -> None:
    """Say what is not measured."""
    print(f"peers: {what} left out: {why}{remedy and f'; give {remedy}'}", file=sys.stderr)


@contextmanager
def of_tools(names: Mapping[str, str], call: Callable[[str], Measurement], items: int | None = None) -> Iterator[Work]:
    """Prepare a call per tool that returns its measurement."""
    yield Work({name: partial(call, tool) for tool, name in names.items()}, ROUNDING, items=items)


def measure(case: Case, settings: Settings, seconds: float) -> tuple[Work, list[Measurement]]:
    """Measure the tools one after the other; one that fails is named and left out, whatever `seconds` says."""
    measured = []
    with case.setup() as work:
        for name, call in work.providers.items():
            try:
                measured.append(replace(call(), provider=name))
            except RuntimeError as reason:
                left_out(f"{name}, {case.name} is", str(reason))
    if len(measured) < 2 or measured[0].provider != "ours":
        raise WrongResultError(f"{case.name}: ours, or all that it could be compared with, failed")
    return work, measured


def training_step(jobs: Jobs, training: Training, tool: str) -> Measurement:
    """Time the steps after the first, the loading of their images included; the memory is the whole process's."""
    done = jobs.train(tool, training)
    if not abs(done["mAP"] - done["our_mAP"]) <= EXACT:
        raise WrongResultError(f"{tool}: its mAP is {done['mAP']}, by our evaluator {done['our_mAP']}")
    return measurement(done["steps_s"], done["peak_gib"], done["mAP"])


def embedding(jobs: Jobs, training: Training, tool: str) -> Measurement:
    """Time the embedding of all test images from their files; per batch."""
    done = jobs.train(tool, training)
    return measurement([done["embed_s"] * BATCH / done["images"]])


def start(jobs: Jobs, training: Training, tool: str) -> Measurement:
    """Time a new process up to the end of its first step."""
    begun = [jobs.train(tool, training), *(jobs.start(tool, training, i) for i in range(FURTHER_STARTS))]
    return measurement([done["start_s"] for done in begun])


def evaluation(jobs: Jobs, sizes: Sequence[int], tool: str) -> Measurement:
    """Time one evaluation of made-up features, with the memory that it takes beyond them."""
    done, ours = (jobs(name, "evaluate", sizes=sizes) for name in (tool, "ours"))
    if not abs(done["mAP"] - ours["mAP"]) <= ROUNDING:
        raise WrongResultError(f"{tool}: its mAP is {done['mAP']}, ours is {ours['mAP']}")
    return measurement([done["evaluate_s"]], done["peak_gib"], done["mAP"])


def measurement(times_s: Sequence[float], peak_gib: float | None = None, precision: float | None = None) -> Measurement:
    """Summarise times; one alone is its own quantiles."""
    times = [1e3 * t for t in times_s]
    fast, *_, slow = quantiles(times * 2, n=5, method="inclusive")
    return Measurement("", len(times), median(times), fast, slow, None, peak_gib, mAP=precision)
