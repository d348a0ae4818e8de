"""The training loop: plan -> pixels -> model -> losses -> update, resumable at every step, on any number of ranks."""

import logging
import math
import signal
import time
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusionreid.dataloading import read_split
from fusionreid.dataloading.bad_images import BadImages
from fusionreid.dataloading.loader import TestLoader, TrainLoader
from fusionreid.dataloading.records import check_batch, scarce_persons
from fusionreid.engine.checkpoints import checkpoint
from fusionreid.engine.checkpoints.load_model import build, config_of, load_model
from fusionreid.engine.config import Config
from fusionreid.engine.distributed import parallel
from fusionreid.engine.evaluation.evaluator import Evaluation, NonFiniteError, check_cameras, evaluate, split_ids
from fusionreid.engine.evaluation.extract import images_of
from fusionreid.engine.evaluation.retrieval import check_matches
from fusionreid.engine.monitoring import manifest, memory
from fusionreid.engine.monitoring.loggers import boards
from fusionreid.engine.monitoring.metrics import Metrics
from fusionreid.engine.monitoring.mfu import images_per_s_at_peak
from fusionreid.engine.monitoring.profiler import Trace
from fusionreid.engine.monitoring.startup import Startup
from fusionreid.engine.signals import Stop
from fusionreid.engine.storage import StorageError, lock
from fusionreid.engine.training.optim import Optimizer
from fusionreid.engine.training.train_step import TrainStep
from fusionreid.files import write_json
from fusionreid.losses import CenterLoss
from fusionreid.weights import load_pretrained

SAVE_SECONDS = 600.0  # a checkpoint is also written at the end of an epoch that this much work would be lost with
FAILED_SAVES = 3  # in a row end the run
SKIPPED_STEPS = 20  # in a row, by the loss scaler of fp16
WATCH_STEPS = {"cpu": 1, "cuda": 20}  # how often the host looks at what the device found; no wait in between

log = logging.getLogger(__name__)


class Run:
    """One training run of this process and its peers, in cfg.OUTPUT_DIR."""

    def __init__(self, cfg: Config, startup: Startup | None = None) -> None:
        startup = startup or Startup()
        self.cfg = cfg
        self.ranks = ranks = parallel.start(cfg.MODEL.DEVICE, required="DEVICE" in cfg.MODEL.model_fields_set)
        self.output = Path(cfg.OUTPUT_DIR)
        self.lock = lock(self.output) if ranks.main else None
        self.bad = BadImages(cfg.DATASETS.ON_BAD, self.output, ranks.main)
        self.split = ranks.first(lambda: self.bad.check(read_split(cfg.DATASETS)))
        check_batch(self.split, cfg.SOLVER.IMS_PER_BATCH, cfg.DATALOADER.NUM_INSTANCE, ranks.world_size)
        check_cameras(self.split, self.split.cameras, cfg)
        check_matches(*split_ids(self.split))
        self.say(self.split.describe())
        if scarce := scarce_persons(self.split, cfg.DATALOADER.NUM_INSTANCE):
            self.say(f"{scarce} persons have fewer than {cfg.DATALOADER.NUM_INSTANCE} images: theirs repeat in a batch")
        startup.lap("data set")
        torch.manual_seed(cfg.SOLVER.SEED)
        model = build(cfg, self.split.num_persons, self.split.num_cameras)
        for report in load_pretrained(model, cfg.MODEL):
            self.say(report.describe())
        self.model = parallel.shard(model.to(ranks.device), ranks, cfg.PARALLEL)
        self.optimizer = Optimizer(self.model, cfg.SOLVER, ranks.device)
        startup.lap("model")
        self.center_loss = None
        if cfg.MODEL.IF_WITH_CENTER:
            self.center_loss = CenterLoss(self.split.num_persons, model.heads[0].classifier.in_features)
            self.center_loss.to(ranks.device)
        self.train_step = TrainStep(self.model, self.optimizer, cfg, ranks, self.center_loss)
        self.epoch, self.step_in_epoch, self.step = 1, 0, 0
        self.failed_saves, self.last_save = 0, time.monotonic()
        self.resume()
        startup.lap("resuming")
        self.loader = TrainLoader(  # after all that may be refused: it may have every image to decode
            self.split, cfg.INPUT, cfg.DATALOADER, batch_size=cfg.SOLVER.IMS_PER_BATCH, seed=cfg.SOLVER.SEED,
            rank=ranks.rank, world_size=ranks.world_size, device=ranks.device, bad_images=self.bad)  # fmt: skip
        self.say(self.loader.note)
        startup.lap("images")
        self.stop = Stop().__enter__()
        total = self.loader.steps(1) * cfg.SOLVER.MAX_EPOCHS  # about: epochs differ by a few steps
        self.metrics = self.open_metrics(total, startup)
        self.trace = Trace(self.output, cfg.SOLVER.PROFILE, self.metrics)
        self.loaded = memory.held()
        startup.lap("logs")

    def train(self) -> Evaluation:
        """Train to the last epoch and return the last evaluation."""
        result = None
        try:
            while self.epoch <= self.cfg.SOLVER.MAX_EPOCHS:
                self.train_epoch()
                result = self.finish_epoch()
            return result or self.evaluate()
        except (MemoryError, RuntimeError) as error:
            memory.explain(error, self.cfg, self.loaded, self.metrics.steps)
            raise
        finally:
            self.trace.close(self.step)
            self.loader.close()
            self.metrics.close()
            self.stop.__exit__()
            if self.lock:
                self.lock.close()

    def open_metrics(self, total_steps: int, startup: Startup) -> Metrics:
        """Logs and manifest of this start; the other ranks only count."""
        if not self.ranks.main:
            return Metrics(self.output, total_steps, enabled=False)
        cfg, ranks = self.cfg, self.ranks
        run, note = manifest.record(self.output, cfg, self.split, ranks.device, ranks.world_size, self.step)
        if note:
            self.say(note)
        settings = cfg.model_dump(mode="json")
        return Metrics(
            self.output, total_steps, start_step=self.step, startup=startup,
            boards=boards(cfg.SOLVER.LOGGERS, self.output, self.step, run, settings),
            peak_images_per_s=images_per_s_at_peak(cfg, ranks.world_size),
        )  # fmt: skip

    def finish_epoch(self) -> Evaluation | None:
        solver = self.cfg.SOLVER
        evaluation_is_due = self.epoch % solver.EVAL_PERIOD == 0 or self.epoch == solver.MAX_EPOCHS
        save_is_due = evaluation_is_due or self.epoch % solver.CHECKPOINT_PERIOD == 0 or self.much_is_unsaved()
        self.epoch, self.step_in_epoch = self.epoch + 1, 0
        with self.metrics.paused():
            if save_is_due:  # before the evaluation, which may fail
                self.save(last=self.epoch > solver.MAX_EPOCHS)
            return self.evaluate() if evaluation_is_due else None

    def train_epoch(self) -> None:
        self.model.train()
        self.optimizer.set_epoch(self.epoch)
        batches = self.loader.batches(self.epoch, self.step_in_epoch)
        for batch in self.metrics.watch(batches):
            self.train_step(batch, self.step, self.stop.flag)
            self.step, self.step_in_epoch = self.step + 1, self.step_in_epoch + 1
            self.metrics.progress(self.step, self.cfg.SOLVER.IMS_PER_BATCH)
            self.trace.step(self.step)
            last = self.step_in_epoch == self.loader.steps(self.epoch)
            log_is_due = self.step % self.cfg.SOLVER.LOG_PERIOD == 0
            stop = (last or log_is_due or self.step % WATCH_STEPS[self.ranks.device.type] == 0) and self.watch()
            if log_is_due:
                self.log()
            if stop:
                self.leave()

    def watch(self) -> bool:
        """Look at what the device found: beside the log the one wait for it. True if any rank was asked to stop."""
        *sums, wants_stop = self.train_step.sums.tolist()
        names = [f"{kind} loss of head {head}" for kind in ("identity", "triplet") for head in self.train_step.heads]
        bad = [name for name, value in zip(names, sums) if not math.isfinite(value)]
        if bad:
            self.report_non_finite(f"{', '.join(bad)} is not finite")
        if self.optimizer.skipped.item() >= SKIPPED_STEPS:
            self.report_non_finite(f"the fp16 gradient overflowed {SKIPPED_STEPS} times in a row")
        return wants_stop > 0

    def leave(self) -> None:
        """Every rank saves this very step and ends as its signal asks."""
        with self.metrics.paused():
            self.save(last=True)
        parallel.finish()
        raise SystemExit(128 + (self.stop.flag or signal.SIGTERM))

    def report_non_finite(self, what: str) -> None:
        """Every rank comes here in the same step, before anything was updated or saved."""
        first, bad = self.step - self.step_in_epoch, int(self.train_step.bad_step)  # first of this epoch
        step, size = (bad if bad >= 0 else self.step - 1) - first, self.cfg.SOLVER.IMS_PER_BATCH
        path = self.output / "non_finite.json"
        if self.ranks.main:
            batch = self.loader.plan(self.epoch).image[step * size : (step + 1) * size]
            images = [self.split.train[i].path for i in batch]
            write_json(path, {"what": what, "epoch": self.epoch, "step": step, "images": images})
        raise NonFiniteError(
            f"epoch {self.epoch}, step {step}: {what}; no weight was changed by it. Its images are named in {path}; "
            "try a lower SOLVER.BASE_LR or SOLVER.PRECISION fp32"
        )

    def log(self) -> None:
        count = len(self.train_step.heads)
        mean = self.train_step.sums / self.train_step.summed
        losses = {"loss": mean[: 2 * count].sum(), "identity": mean[:count], "triplet": mean[count : 2 * count]}
        update = {"gradient_norm": self.optimizer.take_gradient_norm(), "learning_rate": self.optimizer.rate}
        self.metrics.log(self.step, epoch=self.epoch, **losses, accuracy=mean[-2], **update)
        self.train_step.clear()

    def evaluate(self) -> Evaluation:
        """Evaluate the weights just saved; the best checkpoint is kept whatever comes."""
        parallel.equalise_statistics(self.model)
        average = self.train_step.average
        with average.shown() if average else nullcontext():
            result = evaluate(self.model, self.split, self.test_images, self.split.cameras, self.cfg, self.ranks)
        parallel.reshard(self.model)
        self.metrics.event(f"epoch {self.epoch - 1}: {result.ranking.summary()}")
        if self.ranks.main:
            folder, score = self.output / "checkpoints", result.ranking.mAP
            best = checkpoint.best(folder)
            if not self.failed_saves and (best is None or score > best.score):
                checkpoint.mark_best(folder, self.step, score)
        return result

    @cached_property
    def test_images(self) -> TestLoader:
        """Query and gallery, resident from the first evaluation on: training has taken its memory by then."""
        records = (*self.split.query, *self.split.gallery)
        images = images_of(records, self.cfg, self.ranks, root=self.split.root, fill=True)
        self.say(images.note)
        return images

    def much_is_unsaved(self) -> bool:
        """Whether rank 0's clock says so; all ranks save together."""
        late = time.monotonic() - self.last_save > SAVE_SECONDS
        return bool(parallel.all_reduce_max(torch.tensor(float(late and self.ranks.main), device=self.ranks.device)))

    def save(self, *, last: bool) -> None:
        """Write a checkpoint of this very step; all ranks take part, rank 0 writes. After the last one the run ends."""
        parallel.equalise_statistics(self.model)
        shards = self.optimizer.parameters
        tensors = {
            "model": {name: parallel.full_tensor(t) for name, t in self.model.state_dict().items()},
            "optimizer": {entry: parallel.full_tensor(t, like=shards.get(entry.rsplit("/", 1)[0]))
                          for entry, t in self.optimizer.state().items()},
        }  # fmt: skip
        if self.center_loss is not None:
            tensors["centers"] = {"centers": self.center_loss.centers.detach().cpu()}
        if self.train_step.average is not None:
            tensors["average"] = self.train_step.average.state()
        self.last_save = time.monotonic()
        if self.ranks.main:
            self.write(tensors, last)
        torch.distributed.barrier()

    def write(self, tensors: dict[str, dict[str, Tensor]], last: bool) -> None:
        folder = self.output / "checkpoints"
        state = {
            "epoch": self.epoch, "step_in_epoch": self.step_in_epoch,
            "classes": self.split.num_persons, "cameras": self.split.cameras,
            "config": self.cfg.model_dump(mode="json"),
        }  # fmt: skip
        try:
            path = checkpoint.save(folder, self.step, tensors, state)
            checkpoint.purge(folder)
            self.failed_saves = 0
            self.metrics.event(f"step {self.step}: saved {path}")
        except StorageError as error:
            self.failed_saves += 1
            if last or self.failed_saves >= FAILED_SAVES or not checkpoint.checkpoints(folder):
                raise
            log.warning("%s; training goes on from memory", error)

    def resume(self) -> None:
        """Go on from the newest whole checkpoint in the output folder, exactly where it was written."""
        folder = self.output / "checkpoints"
        if self.ranks.main:
            checkpoint.clean(folder)
            checkpoint.best(folder)  # a damaged mark is told now, and not by the first save
        path = checkpoint.latest(folder)
        if path is None:
            return
        tensors, state = checkpoint.load(path)
        checkpoint.compare("the configuration", what_decides(self.cfg), what_decides(config_of(state, path)))
        load_model(self.model, tensors["model"])
        shards = self.optimizer.parameters
        self.optimizer.load({entry: parallel.shard_like(t, shards.get(entry.rsplit("/", 1)[0], t))
                             for entry, t in tensors["optimizer"].items()})  # fmt: skip
        if self.center_loss is not None:
            self.center_loss.load_state_dict(tensors["centers"])
        if self.train_step.average is not None:
            self.train_step.average.load(tensors["average"])
        self.epoch, self.step_in_epoch, self.step = state["epoch"], state["step_in_epoch"], state["step"]
        self.say(f"resumed from {path}: epoch {self.epoch}, step {self.step_in_epoch}")

    def say(self, text: str) -> None:
        if self.ranks.main:
            print(text, flush=True)


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
