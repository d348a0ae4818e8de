"""The trainer: set-up, the loop over epochs, logs, evaluation and checkpoints; it resumes at every step."""

import logging
import math
import signal
import time
from contextlib import ExitStack, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from fusionreid.dataloading import read_split
from fusionreid.dataloading.bad_images import BadImages
from fusionreid.dataloading.loader import TestLoader, TrainLoader
from fusionreid.dataloading.records import check_batch, scarce_persons
from fusionreid.engine.checkpoints import checkpoint
from fusionreid.engine.checkpoints.load_model import build, config_of
from fusionreid.engine.config import Config
from fusionreid.engine.distributed import parallel, peers
from fusionreid.engine.distributed.global_batch import check_mining
from fusionreid.engine.evaluation.evaluator import NonFiniteError, check_cameras, evaluate, split_ids
from fusionreid.engine.evaluation.extract import images_of
from fusionreid.engine.evaluation.retrieval import Ranking, check_matches
from fusionreid.engine.monitoring import manifest, memory
from fusionreid.engine.monitoring.loggers import logger_factories
from fusionreid.engine.monitoring.metrics import Metrics
from fusionreid.engine.monitoring.mfu import images_per_s_at_peak
from fusionreid.engine.monitoring.profiler import Profiler
from fusionreid.engine.monitoring.startup import Startup
from fusionreid.engine.signals import Stop
from fusionreid.engine.storage import StorageError, lock
from fusionreid.engine.training.optim import Optimizer
from fusionreid.engine.training.state import Parts, capture, restore
from fusionreid.engine.training.train_step import StepReport, TrainStep
from fusionreid.files import write_json
from fusionreid.losses import CenterLoss
from fusionreid.weights import load_pretrained

SAVE_SECONDS = 600.0  # a checkpoint is also written at the end of an epoch that this much work would be lost with
FAILED_SAVES = 3  # in a row end the run
SKIPPED_STEPS = 20  # in a row, by the loss scaler of fp16
READ_STEPS = {"cpu": 1, "cuda": 20}  # how often the host reads what the device found; no wait in between
EVALUATION_RANKS = 1, 5, 10  # logged after each evaluation

log = logging.getLogger(__name__)


class Trainer:
    """One training run of this process and its peers, in cfg.OUTPUT_DIR.

    Signals are not its business: `train` is given a `Stop`, which whoever owns the process makes.
    """

    def __init__(self, cfg: Config, startup: Startup | None = None) -> None:
        self.cfg, self.startup = cfg, startup or Startup()
        self.ranks = parallel.start(cfg.MODEL.DEVICE, required="DEVICE" in cfg.MODEL.model_fields_set)
        self.output = Path(cfg.OUTPUT_DIR)
        self.stop: Stop | None = None
        self.epoch, self.step_in_epoch, self.step = 1, 0, 0
        self.failed_saves, self.last_save = 0, time.monotonic()
        with ExitStack() as opened:  # closed here if a part fails, by `close` if none does
            if self.ranks.main:
                opened.enter_context(lock(self.output))
            self._read_data()
            self._build_model()
            self._resume()
            self._load_images(opened)  # after all that may be refused: it may have every image to decode
            self._open_logs(opened)
            self._opened = opened.pop_all()

    def train(self, stop: Stop | None = None) -> None:
        """Train to the last epoch, then close; SystemExit with the signal's exit code once `stop` asks for it."""
        self.stop = stop
        with self._opened:
            if self._is_finished:
                with self.metrics.paused():
                    self._evaluate()
            while not self._is_finished:
                self._train_epoch()
                self._finish_epoch()

    @property
    def _is_finished(self) -> bool:
        return self.epoch > self.cfg.SOLVER.MAX_EPOCHS

    def close(self) -> None:
        """Close logs, loader and output folder of a trainer that does not train."""
        self._opened.close()

    # Set-up, in order

    def _read_data(self) -> None:
        cfg, ranks = self.cfg, self.ranks
        self.bad_images = BadImages(cfg.DATASETS.ON_BAD, self.output, ranks.main)
        self.split = ranks.first(lambda: self.bad_images.check(read_split(cfg.DATASETS)))
        check_batch(self.split, cfg.SOLVER.IMS_PER_BATCH, cfg.DATALOADER.NUM_INSTANCE, ranks.world_size)
        if ranks.world_size > 1 and not parallel.is_exact(cfg.PARALLEL, ranks):
            check_mining(cfg.SOLVER.IMS_PER_BATCH, cfg.DATALOADER.NUM_INSTANCE, ranks.world_size)
        check_cameras(self.split, self.split.cameras, cfg)
        check_matches(*split_ids(self.split))
        self._say(self.split.describe())
        instances = cfg.DATALOADER.NUM_INSTANCE
        if scarce := scarce_persons(self.split, instances):
            self._say(f"{scarce} persons have fewer than {instances} images: theirs repeat in a batch")
        self.startup.lap("data set")

    def _build_model(self) -> None:
        cfg, ranks = self.cfg, self.ranks
        torch.manual_seed(cfg.SOLVER.SEED)
        model = build(cfg, self.split.num_persons, self.split.num_cameras)
        for report in load_pretrained(model, cfg.MODEL):
            self._say(report.describe())
        self.model = parallel.shard(model.to(ranks.device), ranks, cfg.PARALLEL)
        self.optimizer = Optimizer(self.model, cfg.SOLVER, ranks.device)
        center_loss = None
        if cfg.MODEL.IF_WITH_CENTER:
            center_loss = CenterLoss(self.split.num_persons, model.heads[0].classifier.in_features).to(ranks.device)
        self.train_step = TrainStep(self.model, self.optimizer, cfg, ranks, center_loss)
        self.startup.lap("model")

    def _resume(self) -> None:
        """Go on from the newest whole checkpoint in the output folder, exactly where it was written."""
        folder = self.output / "checkpoints"
        if self.ranks.main:
            checkpoint.clean(folder)
            checkpoint.best(folder)  # a damaged mark is told now, and not by the first save
        path = checkpoint.latest(folder)
        if path is not None:
            parts, state = checkpoint.load(path)
            checkpoint.compare("the configuration", what_decides(self.cfg), what_decides(config_of(state, path)))
            restore(parts, self.model, self.train_step)
            self.epoch, self.step_in_epoch, self.step = state["epoch"], state["step_in_epoch"], state["step"]
            peers.goes_on_from(self.step)
            self._say(f"resumed from {path}: epoch {self.epoch}, step {self.step_in_epoch}")
        self.startup.lap("resuming")

    def _load_images(self, opened: ExitStack) -> None:
        cfg, ranks = self.cfg, self.ranks
        self.loader = TrainLoader(
            self.split, cfg.INPUT, cfg.DATALOADER, batch_size=cfg.SOLVER.IMS_PER_BATCH, seed=cfg.SOLVER.SEED,
            rank=ranks.rank, world_size=ranks.world_size, device=ranks.device, bad_images=self.bad_images,
        )  # fmt: skip
        opened.callback(self.loader.close)
        self._say(self.loader.note)
        self.startup.lap("images")

    def _open_logs(self, opened: ExitStack) -> None:
        """Open metrics, profiler and manifest of this start; the other ranks only count."""
        cfg, ranks = self.cfg, self.ranks
        total_steps = self.loader.steps(1) * cfg.SOLVER.MAX_EPOCHS  # about: epochs differ by a few steps
        if ranks.main:
            run, note = manifest.record(self.output, cfg, self.split, ranks.device, ranks.world_size, self.step)
            if note:
                self._say(note)
            settings = cfg.model_dump(mode="json")
            self.metrics = Metrics(
                self.output, total_steps, start_step=self.step, evaluate_again=self._is_finished, startup=self.startup,
                loggers=logger_factories(cfg.SOLVER.LOGGERS, self.output, self.step, run, settings),
                peak_images_per_s=images_per_s_at_peak(cfg, ranks.world_size),
            )  # fmt: skip
        else:
            self.metrics = Metrics(self.output, total_steps, enabled=False)
        opened.callback(self.metrics.close)
        self.profiler = Profiler(self.output, cfg.SOLVER.PROFILE, self.metrics)
        opened.callback(lambda: self.profiler.close(self.step))
        self.memory_before = memory.held()
        self.startup.lap("logs")

    # The loop

    def _train_epoch(self) -> None:
        solver = self.cfg.SOLVER
        self.model.train()
        self.optimizer.set_epoch(self.epoch)
        try:
            for batch in self.metrics.timed(self.loader.batches(self.epoch, self.step_in_epoch)):
                self.train_step(batch, self.step, self.stop.flag if self.stop else 0)
                self.step, self.step_in_epoch = self.step + 1, self.step_in_epoch + 1
                self.metrics.progress(self.step, solver.IMS_PER_BATCH)
                self.profiler.step(self.step)
                log_is_due = self.step % solver.LOG_PERIOD == 0
                is_last = self.step_in_epoch == self.loader.steps(self.epoch)
                if log_is_due or is_last or self.step % READ_STEPS[self.ranks.device.type] == 0:
                    report = self.train_step.read()  # besides the log, the only host sync
                    self._check_finite(report)
                    if log_is_due:
                        self._log(report)
                    if report.stop_wanted:
                        self._leave()
        except (MemoryError, RuntimeError) as error:
            memory.explain(error, "training", self.cfg, self.memory_before, self.metrics.steps)
            raise

    def _finish_epoch(self) -> None:
        solver = self.cfg.SOLVER
        evaluation_is_due = self.epoch % solver.EVAL_PERIOD == 0 or self.epoch == solver.MAX_EPOCHS
        save_is_due = evaluation_is_due or self.epoch % solver.CHECKPOINT_PERIOD == 0 or self._much_is_unsaved()
        self.epoch, self.step_in_epoch = self.epoch + 1, 0
        with self.metrics.paused():
            if save_is_due:  # before the evaluation, which may fail
                self._save(last=self._is_finished)
            if evaluation_is_due:
                self._evaluate()

    def _log(self, report: StepReport) -> None:
        losses = {"loss": report.loss, "identity": report.identity, "triplet": report.triplet}
        update = {"gradient_norm": self.optimizer.take_gradient_norm(), "learning_rate": self.optimizer.rate}
        self.metrics.log(self.step, epoch=self.epoch, **losses, accuracy=report.accuracy, **update)
        self.train_step.clear()

    def _check_finite(self, report: StepReport) -> None:
        losses = {"identity": report.identity, "triplet": report.triplet}
        bad = [
            f"{kind} loss of head {head}"
            for kind, values in losses.items()
            for head, value in zip(self.train_step.heads, values)
            if not math.isfinite(value)
        ]
        if bad:
            self._report_non_finite(f"{', '.join(bad)} is not finite", report.bad_step)
        if report.skipped >= SKIPPED_STEPS:
            self._report_non_finite(f"the fp16 gradient overflowed {SKIPPED_STEPS} times in a row", report.bad_step)

    def _report_non_finite(self, what: str, bad_step: int) -> None:
        """Raise NonFiniteError; every rank comes here in the same step, before anything was updated or saved."""
        first = self.step - self.step_in_epoch  # of this epoch
        step, size = (bad_step if bad_step >= 0 else self.step - 1) - first, self.cfg.SOLVER.IMS_PER_BATCH
        path = self.output / "non_finite.json"
        if self.ranks.main:
            batch = self.loader.plan(self.epoch).image[step * size : (step + 1) * size]
            images = [self.split.train[i].path for i in batch]
            write_json(path, {"what": what, "epoch": self.epoch, "step": step, "images": images})
        raise NonFiniteError(
            f"epoch {self.epoch}, step {step}: {what}; no weight was changed by it. Its images are named in {path}; "
            "try a lower SOLVER.BASE_LR or SOLVER.PRECISION fp32"
        )

    def _leave(self) -> None:
        """Save this very step and end as the signal asks; every rank comes here in the same step."""
        with self.metrics.paused():
            self._save(last=True)
        self._exit()

    def _exit(self) -> None:
        parallel.finish()
        raise SystemExit(128 + ((self.stop and self.stop.flag) or signal.SIGTERM))

    # Evaluation

    def _evaluate(self) -> None:
        """Evaluate the weights just saved; the best checkpoint is kept whatever comes."""
        parallel.equalise_statistics(self.model)
        ema = self.train_step.ema
        with memory.explained("evaluation", self.cfg), ema.applied() if ema else nullcontext():
            ranking = evaluate(
                self.model, self.split, self.test_images, self.split.cameras, self.cfg, self.ranks,
                before_batch=self._leave_evaluation_if_asked,
            ).ranking  # fmt: skip
        parallel.reshard(self.model)
        epoch, score = self.epoch - 1, ranking.mAP
        self.metrics.event(f"epoch {epoch}: {ranking.summary()}")
        self.metrics.log_evaluation(self.step, epoch, measures_of(ranking, score))
        if self.ranks.main:
            folder = self.output / "checkpoints"
            best = checkpoint.best(folder)
            if not self.failed_saves and (best is None or score > best.score):
                checkpoint.mark_best(folder, self.step, score)

    def _leave_evaluation_if_asked(self) -> None:
        """End here if any rank was asked to stop: the checkpoint of this step is written, unless the disk was full."""
        flag = torch.tensor(float(self.stop.flag if self.stop else 0))
        if parallel.all_reduce_max(flag) > 0:
            if self.failed_saves:
                self._leave()
            self._exit()

    @cached_property
    def test_images(self) -> TestLoader:
        """Query and gallery, cached at the first evaluation, when training memory is already allocated."""
        records = (*self.split.query, *self.split.gallery)
        images = images_of(records, self.cfg, self.ranks, root=self.split.root, fill=True)
        self._say(images.note)
        return images

    # Checkpoints

    def _much_is_unsaved(self) -> bool:
        """Whether rank 0's clock says so; all ranks save together."""
        late = time.monotonic() - self.last_save > SAVE_SECONDS
        return bool(parallel.all_reduce_max(torch.tensor(float(late and self.ranks.main), device=self.ranks.device)))

    def _save(self, *, last: bool) -> None:
        """Write a checkpoint of this very step; all ranks take part, rank 0 writes. After the last one the run ends."""
        parts = capture(self.model, self.train_step)
        self.last_save = time.monotonic()
        if self.ranks.main:
            self._write(parts, last)
        torch.distributed.barrier()

    def _write(self, parts: Parts, last: bool) -> None:
        folder = self.output / "checkpoints"
        state = {
            "epoch": self.epoch, "step_in_epoch": self.step_in_epoch,
            "classes": self.split.num_persons, "cameras": self.split.cameras,
            "config": self.cfg.model_dump(mode="json"),
        }  # fmt: skip
        try:
            path = checkpoint.save(folder, self.step, parts, state)
            checkpoint.purge(folder)
            self.failed_saves = 0
            peers.goes_on_from(self.step)
            self.metrics.event(f"step {self.step}: saved {path}")
        except StorageError as error:
            self.failed_saves += 1
            if last or self.failed_saves >= FAILED_SAVES or not checkpoint.checkpoints(folder):
                raise
            log.warning("%s; training goes on from memory", error)

    def _say(self, text: str) -> None:
        if self.ranks.main:
            print(text, flush=True)


def measures_of(ranking: Ranking, mAP: float) -> dict[str, float]:
    """Measures that are logged after an evaluation."""
    ranks = {f"rank{k}": ranking.cmc[k - 1].item() for k in EVALUATION_RANKS}
    return {"mAP": mAP, **ranks, "mINP": ranking.mINP}


def what_decides(cfg: Config) -> dict[str, Any]:
    """The keys that a resumed run must share with the one it continues, because the weights depend on them."""
    free = {
        "MODEL": {"DEVICE", "PRETRAIN_PATH", "PRETRAIN_PATH_R", "PRETRAIN_PATH_T"},
        "INPUT": {"SIZE_TEST"},
        "DATASETS": {"ROOT_DIR", "ON_BAD"},
        "DATALOADER": {"NUM_WORKERS", "CACHE"},
        "SOLVER": {"CHECKPOINT_PERIOD", "EVAL_PERIOD", "LOG_PERIOD", "LOGGERS", "PROFILE"},
        "PARALLEL": {"CHECKPOINT", "COMPILE", "GRAPH", "SHARD"},
    }
    values = cfg.model_dump(mode="json")
    return {f"{section}.{key}": value for section in free for key, value in values[section].items()
            if key not in free[section]}  # fmt: skip
