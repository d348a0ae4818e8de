"""The trainer: set-up, the loop over epochs, logs, evaluation and checkpoints; it resumes at every step."""

import signal
import time
from contextlib import ExitStack, nullcontext
from functools import cached_property
from pathlib import Path

import torch

from fusionreid.dataloading import read_split
from fusionreid.dataloading.bad_images import BadImages
from fusionreid.dataloading.loader import TestLoader, TrainLoader
from fusionreid.dataloading.records import check_batch, scarce_persons
from fusionreid.engine.checkpoints.checkpoint import step_of
from fusionreid.engine.checkpoints.load_model import build
from fusionreid.engine.checkpoints.store import CheckpointStore
from fusionreid.engine.config import Config
from fusionreid.engine.distributed import parallel, peers
from fusionreid.engine.distributed.agreement import check_shared
from fusionreid.engine.distributed.global_batch import check_mining
from fusionreid.engine.distributed.numerics import set_numerics
from fusionreid.engine.evaluation.cameras import Report, tested_in_training
from fusionreid.engine.evaluation.evaluator import evaluate
from fusionreid.engine.evaluation.extract import images_of
from fusionreid.engine.monitoring import manifest, memory
from fusionreid.engine.monitoring.loggers import logger_factories
from fusionreid.engine.monitoring.metrics import Metrics
from fusionreid.engine.monitoring.mfu import images_per_s_at_peak
from fusionreid.engine.monitoring.profiler import Profiler
from fusionreid.engine.monitoring.startup import Startup
from fusionreid.engine.signals import Stop
from fusionreid.engine.storage import lock
from fusionreid.engine.training.non_finite import not_finite, refuse, watched
from fusionreid.engine.training.optim import Optimizer
from fusionreid.engine.training.resume import find
from fusionreid.engine.training.state import StateCapture, restore
from fusionreid.engine.training.train_step import StepReport, TrainStep
from fusionreid.losses import CenterLoss
from fusionreid.weights import load_pretrained

SAVE_SECONDS = 600.0  # a checkpoint is also written at the end of an epoch that this much work would be lost with
READ_STEPS = {"cpu": 1, "cuda": 20}  # how often the host reads what the device found; no wait in between


class Trainer:
    """One training run of this process and its peers, in cfg.OUTPUT_DIR; all call `report` with each evaluation.

    Signals are not its business: `train` is given a `Stop`, which whoever owns the process makes.
    """

    def __init__(self, cfg: Config, startup: Startup | None = None, report: Report = lambda *_: None) -> None:
        self.cfg, self.startup, self.report = cfg, startup or Startup(), report
        self.ranks = parallel.start(cfg.MODEL.DEVICE, required="DEVICE" in cfg.MODEL.model_fields_set)
        set_numerics(cfg.SOLVER.PRECISION, deterministic=cfg.PARALLEL.DETERMINISTIC)
        self.output = Path(cfg.OUTPUT_DIR)
        self.stop: Stop | None = None
        self.epoch, self.step_in_epoch, self.step = 1, 0, 0
        self.evaluation_due = False  # at this very step
        self.last_save = time.monotonic()
        with ExitStack() as opened:  # closed here if a part fails, by `close` if none does
            self._open_output(opened)
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
            if self.evaluation_due:  # and cut short when this run ended
                with self.metrics.paused():
                    self._evaluate()
            elif self._is_finished:
                self._say(f"this run has finished its {self.cfg.SOLVER.MAX_EPOCHS} epochs")
            while not self._is_finished:
                self._train_epoch()
                self._finish_epoch()

    @property
    def _is_finished(self) -> bool:
        return self.epoch > self.cfg.SOLVER.MAX_EPOCHS

    def close(self) -> None:
        """Close logs, loader and output folder of a trainer that does not train."""
        self._opened.close()

    def _open_output(self, opened: ExitStack) -> None:
        """Lock the output folder; rank 0 alone writes there, but all must see it."""
        self.store = None
        if self.ranks.main:
            opened.enter_context(lock(self.output))
            self.store = CheckpointStore(self.output / "checkpoints")
            opened.callback(self.store.close)
        check_shared(self.output, self.ranks)

    def _read_data(self) -> None:
        cfg, ranks = self.cfg, self.ranks
        self.bad_images = BadImages(cfg.DATASETS.ON_BAD, self.output, ranks.main)
        self.split = ranks.first(lambda: self.bad_images.check(read_split(cfg.DATASETS)))
        batch, instances, balance = cfg.SOLVER.IMS_PER_BATCH, cfg.DATALOADER.NUM_INSTANCE, cfg.DATALOADER.BALANCE_SETS
        check_batch(self.split, batch, instances, ranks.world_size, balance=balance)
        if ranks.world_size > 1 and not parallel.is_exact(cfg.PARALLEL, ranks):
            check_mining(batch, instances, ranks.world_size)
        self.tests = tested_in_training(self.split, cfg)
        self._say(self.split.describe())
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
        self.capture = StateCapture(self.model, self.train_step, ranks)
        self.startup.lap("model")

    def _resume(self) -> None:
        """Go on from the newest whole checkpoint in the output folder, exactly where it was written."""
        position, tensors = find(self.store, self.cfg, self.ranks)
        if position is not None:
            restore(tensors, self.model, self.train_step, self.ranks)
            self.epoch, self.step_in_epoch, self.step = position.epoch, position.step_in_epoch, position.step
            self.evaluation_due = position.evaluation_due
            peers.goes_on_from(self.step)
            self._say(f"resumed from {position.path}: epoch {self.epoch}, step {self.step_in_epoch}")
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
        total_steps = self.loader.total_steps(cfg.SOLVER.MAX_EPOCHS)
        if ranks.main:
            run, note = manifest.record(self.output, cfg, self.split, ranks.device, ranks.world_size, self.step)
            if note:
                self._say(note)
            self.metrics = Metrics(
                self.output, total_steps, start_step=self.step, log_period=cfg.SOLVER.LOG_PERIOD,
                evaluate_again=self.evaluation_due, startup=self.startup,
                loggers=logger_factories(cfg.SOLVER.LOGGERS, self.output, self.step, run, cfg.model_dump(mode="json")),
                peak_images_per_s=images_per_s_at_peak(cfg, ranks.world_size),
            )  # fmt: skip
        else:
            self.metrics = Metrics(self.output, total_steps, enabled=False)
        opened.callback(self.metrics.close)
        self.profiler = Profiler(self.output, cfg.SOLVER.PROFILE, self.metrics)
        opened.callback(lambda: self.profiler.close(self.step))
        self.memory_before = memory.held()
        self.startup.lap("logs")

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
                    if what := not_finite(report, self.train_step.heads):
                        self._refuse(what, report.bad_step)
                    if self.store is not None and self.store.is_written():
                        self._finish_writing()
                    if log_is_due:
                        self._log(report)
                    if report.stop_wanted:
                        self._leave()
        except (MemoryError, RuntimeError) as error:
            memory.explain(error, "training", self.cfg, self.memory_before, self.metrics.steps)
            raise

    def _finish_epoch(self) -> None:
        solver = self.cfg.SOLVER
        self.evaluation_due = self.epoch % solver.EVAL_PERIOD == 0 or self.epoch == solver.MAX_EPOCHS
        save_is_due = self.evaluation_due or self.epoch % solver.CHECKPOINT_PERIOD == 0 or self._much_is_unsaved()
        self.epoch, self.step_in_epoch = self.epoch + 1, 0
        with self.metrics.paused():
            if save_is_due:  # before the evaluation, which may fail
                self._save()
            if self.evaluation_due:
                self._evaluate()

    def _log(self, report: StepReport) -> None:
        losses = {"loss": report.loss, "identity": report.identity, "triplet": report.triplet}
        update = {"gradient_norm": self.optimizer.take_gradient_norm(), "learning_rate": self.optimizer.rate}
        self.metrics.log(self.step, epoch=self.epoch, **losses, accuracy=report.accuracy, **update)
        self.train_step.clear()

    def _refuse(self, what: str, bad_step: int) -> None:
        """End the training; every rank comes here in the same step, before anything was updated or saved."""
        step = (bad_step if bad_step >= 0 else self.step - 1) - (self.step - self.step_in_epoch)  # in this epoch
        with watched(self.model) as found:
            self.train_step.replay(next(self.loader.batches(self.epoch, step)), self.step - self.step_in_epoch + step)
        refuse(what, self.epoch, step, found, self.loader.paths(self.epoch, step), self.output, self.ranks)

    def _leave(self) -> None:
        """Save this very step and end as the signal asks; every rank comes here in the same step."""
        with self.metrics.paused():
            if not self._is_saved():
                self._save()
            self._finish_writing(last=True)
        parallel.finish()
        raise SystemExit(128 + ((self.stop and self.stop.flag) or signal.SIGTERM))

    def _evaluate(self) -> None:
        """Evaluate the weights being saved on every set; by the first one the best checkpoint is kept."""
        parallel.equalise_statistics(self.model)
        scores: list[float] = []
        for test, images in zip(self.tests, self.test_images):
            average = ema.applied() if (ema := self.train_step.ema) else nullcontext()
            with memory.explained("evaluation", self.cfg), average:
                result = evaluate(
                    self.model, test.split, images, test.cameras, self.cfg, self.ranks,
                    before_batch=self._leave_if_asked,
                )  # fmt: skip
            parallel.reshard(self.model)
            epoch, of = self.epoch - 1, test.name and f", {test.name}"
            self.metrics.event(f"epoch {epoch}{of}: {result.ranking.summary()}")
            self.metrics.log_evaluation(self.step, epoch, result.measures, "" if test.first else f"{test.name}/")
            scores.append(result.ranking.mAP)
            if len(scores) == len(self.tests):
                self._finish_writing(last=self._is_finished)
                if self.store is not None:
                    self.store.evaluated(self.step, scores[0])
            self.report(self.cfg, test, result, self.step, self.ranks, self._is_finished)
        self.evaluation_due = False

    def _leave_if_asked(self) -> None:
        """End an evaluation if any rank was asked to stop; it is made when the run goes on."""
        if self._any_rank(bool(self.stop and self.stop.flag)):
            self._leave()

    @cached_property
    def test_images(self) -> list[TestLoader]:
        """Queries and galleries, cached at the first evaluation, when training memory is already allocated."""
        loaders = [images_of(t.records, self.cfg, self.ranks, root=t.split.root, fill=True) for t in self.tests]
        self._say("\n".join(images.note for images in loaders))
        return loaders

    def _much_is_unsaved(self) -> bool:
        """Whether rank 0's clock says so; all ranks save together."""
        return self._any_rank(self.ranks.main and time.monotonic() - self.last_save > SAVE_SECONDS)

    def _is_saved(self) -> bool:
        """Whether the checkpoint of this very step is whole; all ranks get the same answer."""
        self._finish_writing()
        return not self._any_rank(self.store is not None and self.store.saved_step != self.step)

    def _any_rank(self, condition: bool) -> bool:
        return bool(parallel.all_reduce_max(torch.tensor(float(condition))))

    def _save(self) -> None:
        """Capture the state of this very step, on all ranks; rank 0 writes it while training goes on."""
        self._finish_writing()
        tensors = self.capture()
        self.last_save = time.monotonic()
        if self.store is not None:
            state = {
                "epoch": self.epoch, "step_in_epoch": self.step_in_epoch, "evaluation_due": self.evaluation_due,
                "classes": self.split.num_persons, "cameras": self.split.cameras,
                "camera_names": self.split.names_of_cameras, "config": self.cfg.model_dump(mode="json"),
            }  # fmt: skip
            self.store.save(self.step, tensors, state)

    def _finish_writing(self, *, last: bool = False) -> None:
        """Wait for the checkpoint being written, if there is one; StorageError if the `last` one is lost."""
        path = self.store.wait(last=last) if self.store is not None else None
        if path is not None:
            peers.goes_on_from(step_of(path))
            self.metrics.event(f"step {step_of(path)}: saved {path}")

    def _say(self, text: str) -> None:
        if self.ranks.main:
            print(text, flush=True)
