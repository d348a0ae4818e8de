"""One job of one tool in a process of its own, so that start-up and memory are its own: `python bench/peers.py JOB`.

JOB is JSON: the tool, what to do, and where things are. This engine follows the recipe of the others here; its triplets
are of features at unit length, as BoxMOT's are, while torchreid and fast-reid take them as they are.
"""

import json
import resource
import sys
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any
from unittest import mock

if __name__ == "__main__":  # a script's own folder must not hide modules, and its project need not be installed
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench.peer_tools import (
    BATCH,
    DECAY,
    HEIGHT,
    INSTANCES,
    MARGIN,
    MEAN,
    METRIC,
    RATE,
    STD,
    WIDTH,
    BoxMOT,
    Evaluator,
    FastReID,
    Features,
    Job,
    Tool,
    Torchreid,
)  # fmt: skip


class FinishedError(BaseException):
    """The last step that was wanted has been done; no tool catches it."""


class Ours(Tool):
    """This engine's own command, after its arguments."""

    trainer: Any

    def train(self) -> None:
        from fusionreid.engine.config import load_config
        from fusionreid.engine.train import train
        from fusionreid.engine.training import trainer

        tool = self

        class Kept(trainer.Trainer):
            def __init__(self, *arguments: Any) -> None:
                super().__init__(*arguments)
                tool.trainer = self

        with mock.patch.object(trainer, "Trainer", Kept):
            train(load_config("own/small", [f"{key}={value}" for key, value in self._settings().items()]))

    def _settings(self) -> dict[str, Any]:
        job = self.job
        return {
            "MODEL.TRANS_USE": "no", "MODEL.RES_NAME": "" if job["backbone"] == "resnet50" else job["backbone"],
            "MODEL.PRETRAIN_PATH_R": job["weights"], "MODEL.LAST_STRIDE": 2, "MODEL.METRIC_LOSS_TYPE": "unit_triplet",
            "MODEL.NO_MARGIN": "no", "MODEL.DEVICE": "cpu", "INPUT.SIZE_TRAIN": (HEIGHT, WIDTH),
            "INPUT.SIZE_TEST": (HEIGHT, WIDTH), "INPUT.RE_PROB": 0, "INPUT.PIXEL_MEAN": MEAN, "INPUT.PIXEL_STD": STD,
            "DATASETS.NAMES": "market1501", "DATASETS.ROOT_DIR": job["data"], "DATALOADER.NUM_WORKERS": 0,
            "DATALOADER.NUM_INSTANCE": INSTANCES,
            "SOLVER.OPTIMIZER_NAME": "Adam", "SOLVER.BASE_LR": RATE, "SOLVER.WEIGHT_DECAY": DECAY,
            "SOLVER.WEIGHT_DECAY_BIAS": DECAY, "SOLVER.WARMUP_ITERS": 0, "SOLVER.MARGIN": MARGIN,
            "SOLVER.PRECISION": "fp32", "SOLVER.IMS_PER_BATCH": BATCH, "SOLVER.MAX_EPOCHS": 1000,
            "SOLVER.EVAL_PERIOD": 1000, "SOLVER.CHECKPOINT_PERIOD": 1000, "TEST.IMS_PER_BATCH": BATCH,
            "OUTPUT_DIR": f"{job['folder']}/log",
        }  # fmt: skip

    def embed(self) -> Features:
        from fusionreid.engine.evaluation.evaluator import split_ids
        from fusionreid.engine.evaluation.extract import embed

        trainer, split = self.trainer, self.trainer.split
        features = embed(trainer.model, trainer.test_images[0], split.cameras, trainer.cfg, trainer.ranks).numpy()
        ids = [t.numpy() for t in split_ids(split)]
        return features[: len(split.query)], features[len(split.query) :], ids

    @staticmethod
    def evaluator(*, exact: bool) -> Evaluator:
        return our_evaluator(METRIC["ours"])


def our_evaluator(metric: Any) -> Evaluator:
    """Return our mAP by a metric."""
    from torch import from_numpy

    from fusionreid.engine.evaluation.retrieval import rank

    return lambda query, gallery, ids: rank(*map(from_numpy, (query, gallery, *ids)), metric=metric).mAP


TOOLS: dict[str, type[Tool]] = {"ours": Ours, "torchreid": Torchreid, "fast-reid": FastReID, "boxmot": BoxMOT}


def train(job: Job) -> Job:
    """Train so many steps, embed query and gallery, and evaluate by the tool's evaluator and by ours.

    Returns seconds from the command to the first step, of every further step and of the embedding, GiB, and mAP.
    """
    tool = TOOLS[job["tool"]](job)
    ends = train_steps(tool.train, job["steps"])
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    done: Job = {"start_s": ends[0] - job["began"], "steps_s": [b - a for a, b in pairwise(ends)], "peak_gib": peak_gib}
    if job["embed"]:
        began = perf_counter()
        query, gallery, ids = tool.embed()
        done |= {"embed_s": perf_counter() - began, "images": len(query) + len(gallery), "width": query.shape[1]}
        done |= {"mAP": tool.evaluator(exact=True)(query.astype("f8"), gallery.astype("f8"), ids)}
        done |= {"our_mAP": our_evaluator(METRIC[job["tool"]])(query, gallery, ids)}
    return done


def train_steps(train: Callable[[], None], steps: int) -> list[float]:
    """Call a tool's training and end it after so many steps; return when each step of its optimiser ended."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    ends: list[float] = []

    def note(*_: Any) -> None:
        ends.append(perf_counter())
        if len(ends) == steps:
            raise FinishedError

    hook = register_optimizer_step_post_hook(note)
    with suppress(FinishedError):
        train()
    hook.remove()
    return ends


def evaluate(job: Job) -> Job:
    """Evaluate made-up unit features; return seconds, GiB beyond the features, and mAP."""
    import torch

    from bench.peak_memory import peak_gib
    from bench.suite_evaluation import made_up
    from bench.timing import Settings

    torch.manual_seed(1111)
    features, ids = made_up(Settings("default", torch.device("cpu")), *job["sizes"])
    arrays = [t.numpy() for t in (*features, *ids)]
    call, done = TOOLS[job["tool"]].evaluator(exact=False), dict[str, float | None]()

    def timed() -> None:
        began = perf_counter()
        done["mAP"] = call(arrays[0], arrays[1], tuple(arrays[2:]))
        done["evaluate_s"] = perf_counter() - began

    done["peak_gib"] = peak_gib(timed, torch.device("cpu"))
    return done


def main() -> None:
    """Do the job and write its result to the file that it names."""
    job = json.loads(sys.argv[1])
    if job["source"]:
        sys.path.insert(0, job["source"])
    result = {"train": train, "evaluate": evaluate}[job["what"]](job)
    Path(job["result"]).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
