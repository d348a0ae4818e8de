"""The training loop: plan -> pixels -> model -> losses -> update, resumable at every step, on any number of ranks."""

import logging
import math
import signal
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dataloading import read_split
from dataloading.loader import Batch, TrainLoader
from dataloading.records import check_batch, check_images, scarce_persons
from engine import checkpoint, parallel
from engine.checkpoint import StorageError
from engine.config import Config
from engine.door import Stop, lock
from engine.evaluation import Evaluation, NonFiniteError, check_cameras, evaluate, split_ids
from engine.metrics import Metrics, write_json
from engine.optim import Optimizer
from engine.restore import build, load_model
from engine.retrieval import check_matches
from fusionreid.losses import CenterLoss, head_names, reid_loss
from fusionreid.weights import load_pretrained

SAVE_SECONDS = 600.0  # a checkpoint is also written at the end of an epoch that this much work would be lost with
FAILED_SAVES = 3  # in a row end the run
SKIPPED_STEPS = 20  # in a row, by the loss scaler of fp16
WATCH_STEPS = {"cpu": 1, "cuda": 20}  # how often the host looks at what the device found; no wait in between

log = logging.getLogger(__name__)


class Run:
    """One training run of this process and its peers, in cfg.OUTPUT_DIR."""

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg
        self.ranks = ranks = parallel.start(cfg.MODEL.DEVICE, required="DEVICE" in cfg.MODEL.model_fields_set)
        self.output = Path(cfg.OUTPUT_DIR)
        self.lock = lock(self.output) if ranks.main else None
        self.split = ranks.first(lambda: read_split(cfg.DATASETS))
        check_batch(self.split, cfg.SOLVER.IMS_PER_BATCH, cfg.DATALOADER.NUM_INSTANCE, ranks.world_size)
        check_cameras(self.split, self.split.cameras, cfg)
        check_matches(*split_ids(self.split))
        self.say(self.split.describe())
        if scarce := scarce_persons(self.split, cfg.DATALOADER.NUM_INSTANCE):
            self.say(f"{scarce} persons have fewer than {cfg.DATALOADER.NUM_INSTANCE} images: theirs repeat in a batch")
        if ranks.main:
            check_images((*self.split.train, *self.split.query, *self.split.gallery))
        torch.manual_seed(cfg.SOLVER.SEED)
        model = build(cfg, self.split.num_persons, self.split.num_cameras)
        for report in load_pretrained(model, cfg.MODEL):
            self.say(report.describe())
        self.model = parallel.shard(model.to(ranks.device), ranks)
        self.optimizer = Optimizer(self.model, cfg.SOLVER, ranks.device)
        self.loader = TrainLoader(
            self.split, cfg.INPUT, cfg.DATALOADER, batch_size=cfg.SOLVER.IMS_PER_BATCH, seed=cfg.SOLVER.SEED,
            rank=ranks.rank, world_size=ranks.world_size, device=ranks.device)  # fmt: skip
        self.center_loss = None
        if cfg.MODEL.IF_WITH_CENTER:
            self.center_loss = CenterLoss(self.split.num_persons, model.heads[0].classifier.in_features)
            self.center_loss.to(ranks.device)
        self.loss_options = loss_options(cfg, self.center_loss)
        self.heads = head_names(cfg.MODEL.RES_USE, cfg.MODEL.TRANS_USE)
        self.epoch, self.step_in_epoch, self.step = 1, 0, 0
        self.failed_saves, self.last_save = 0, time.monotonic()
        self.sums = torch.zeros(2 * len(self.heads) + 2, device=ranks.device)  # since the last log
        self.summed = 0  # steps in `sums`
        self.bad_step = torch.full((), -1, device=ranks.device)  # of this epoch, the first with a non-finite loss
        self.stop = Stop()
        self.resume()
        total = self.loader.steps(1) * cfg.SOLVER.MAX_EPOCHS  # about: epochs differ by a few steps
        self.metrics = Metrics(self.output, total, enabled=ranks.main, start_step=self.step)

    def train(self) -> Evaluation:
        """Train to the last epoch and return the last evaluation."""
        result = None
        try:
            while self.epoch <= self.cfg.SOLVER.MAX_EPOCHS:
                self.train_epoch()
                result = self.finish_epoch()
            return result or self.evaluate()
        finally:
            self.loader.close()
            self.metrics.close()
            self.stop.close()
            if self.lock:
                self.lock.close()

    def finish_epoch(self) -> Evaluation | None:
        solver = self.cfg.SOLVER
        evaluation_is_due = self.epoch % solver.EVAL_PERIOD == 0 or self.epoch == solver.MAX_EPOCHS
        save_is_due = evaluation_is_due or self.epoch % solver.CHECKPOINT_PERIOD == 0 or self.much_is_unsaved()
        self.epoch, self.step_in_epoch = self.epoch + 1, 0
        with self.metrics.paused():
            if save_is_due:  # before the evaluation, which may fail
                self.save()
            return self.evaluate() if evaluation_is_due else None

    def train_epoch(self) -> None:
        self.model.train()
        self.optimizer.set_epoch(self.epoch)
        batches = self.loader.batches(self.epoch, self.step_in_epoch)
        for batch in self.metrics.watch(batches):
            self.train_step(batch)
            self.step, self.step_in_epoch = self.step + 1, self.step_in_epoch + 1
            self.metrics.progress(self.step, self.cfg.SOLVER.IMS_PER_BATCH)
            last = self.step_in_epoch == self.loader.steps(self.epoch)
            log_is_due = self.step % self.cfg.SOLVER.LOG_PERIOD == 0
            stop = (last or log_is_due or self.step % WATCH_STEPS[self.ranks.device.type] == 0) and self.watch()
            if log_is_due:
                self.log()
            if stop:
                self.leave()

    def train_step(self, batch: Batch) -> None:
        """One update, enqueued without waiting for the device."""
        solver = self.cfg.SOLVER
        seed = self.step * self.ranks.world_size + self.ranks.rank
        torch.manual_seed(solver.SEED + (seed << 32))  # of drop path: nothing random has a state to resume
        with parallel.autocast(solver.PRECISION, self.ranks.device):
            outputs = self.model(batch.images, batch.cameras)
        loss = reid_loss(outputs, batch.persons, **self.loss_options)
        self.optimizer.backward(loss.total)
        hit = (outputs.logits[0].argmax(1) == batch.persons).float().mean()
        wants_stop = torch.full_like(hit, self.stop.flag)
        report = parallel.all_reduce_mean(
            torch.cat([loss.identity, loss.triplet, hit[None], wants_stop[None]]).detach().float()
        )
        is_bad = ~report.isfinite().all() & (self.bad_step < 0)
        self.bad_step = torch.where(is_bad, self.step_in_epoch, self.bad_step)
        self.optimizer.step(self.bad_step >= 0)  # once set, no weight moves any more
        if self.center_loss is not None:
            self.learn_centers(self.center_loss, outputs.features[0].detach(), batch.persons)
        self.sums += report
        self.summed += 1

    def learn_centers(self, center_loss: CenterLoss, features: Tensor, persons: Tensor) -> None:
        """Centers follow the unweighted center loss at a rate of their own, the same on all ranks."""
        centers = center_loss.centers
        (gradient,) = torch.autograd.grad(center_loss(features, persons), centers)
        parallel.all_reduce_mean(gradient)
        centers.data -= torch.where(self.bad_step < 0, self.cfg.SOLVER.CENTER_LR * gradient, 0)
        centers.grad = None

    def watch(self) -> bool:
        """Look at what the device found: beside the log the one wait for it. True if any rank was asked to stop."""
        *sums, wants_stop = self.sums.tolist()
        names = [f"{kind} loss of head {head}" for kind in ("identity", "triplet") for head in self.heads]
        bad = [name for name, value in zip(names, sums) if not math.isfinite(value)]
        if bad:
            self.report_non_finite(f"{', '.join(bad)} is not finite")
        if self.optimizer.skipped.item() >= SKIPPED_STEPS:
            self.report_non_finite(f"the fp16 gradient overflowed {SKIPPED_STEPS} times in a row")
        return wants_stop > 0

    def leave(self) -> None:
        """Every rank saves this very step and ends as its signal asks."""
        with self.metrics.paused():
            self.save()
        raise SystemExit(128 + (self.stop.flag or signal.SIGTERM))

    def report_non_finite(self, what: str) -> None:
        """Every rank comes here in the same step, before anything was updated or saved."""
        step, size = max(int(self.bad_step), 0), self.cfg.SOLVER.IMS_PER_BATCH
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
        count = len(self.heads)
        mean = self.sums / self.summed
        losses = {"loss": mean[: 2 * count].sum(), "identity": mean[:count], "triplet": mean[count : 2 * count]}
        rate = self.optimizer.rate
        self.metrics.log(self.step, epoch=self.epoch, **losses, accuracy=mean[-2], learning_rate=rate)
        self.sums.zero_()
        self.summed = 0

    def evaluate(self) -> Evaluation:
        """Evaluate the weights just saved; the best checkpoint is kept whatever comes."""
        parallel.equalise_statistics(self.model)
        result = evaluate(self.model, self.split, self.split.cameras, self.cfg, self.ranks)
        self.metrics.event(f"epoch {self.epoch - 1}: {result.ranking.summary()}")
        if self.ranks.main:
            folder, score = self.output / "checkpoints", result.ranking.mAP
            best = checkpoint.best(folder)
            if best is None or score > best.score:
                checkpoint.mark_best(folder, self.step, score)
        return result

    def much_is_unsaved(self) -> bool:
        """Whether rank 0's clock says so; all ranks save together."""
        late = time.monotonic() - self.last_save > SAVE_SECONDS
        return bool(parallel.all_reduce_max(torch.tensor(float(late and self.ranks.main), device=self.ranks.device)))

    def save(self) -> None:
        """Write a checkpoint of this very step; all ranks take part, rank 0 writes."""
        parallel.equalise_statistics(self.model)
        shards = self.optimizer.parameters
        tensors = {
            "model": {name: parallel.full_tensor(t) for name, t in self.model.state_dict().items()},
            "optimizer": {entry: parallel.full_tensor(t, like=shards.get(entry.rsplit("/", 1)[0]))
                          for entry, t in self.optimizer.state().items()},
        }  # fmt: skip
        if self.center_loss is not None:
            tensors["centers"] = {"centers": self.center_loss.centers.detach().cpu()}
        self.last_save = time.monotonic()
        if self.ranks.main:
            self.write(tensors)
        torch.distributed.barrier()

    def write(self, tensors: dict[str, dict[str, Tensor]]) -> None:
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
            if self.failed_saves >= FAILED_SAVES or not checkpoint.checkpoints(folder):
                raise
            log.warning("%s; training goes on from memory", error)

    def resume(self) -> None:
        """Go on from the newest whole checkpoint in the output folder, exactly where it was written."""
        folder = self.output / "checkpoints"
        if self.ranks.main:
            checkpoint.clean(folder)
        path = checkpoint.latest(folder)
        if path is None:
            return
        tensors, state = checkpoint.load(path)
        checkpoint.compare("the configuration", what_decides(self.cfg), what_decides(Config.from_dict(state["config"])))
        load_model(self.model, tensors["model"])
        shards = self.optimizer.parameters
        self.optimizer.load({entry: parallel.shard_like(t, shards.get(entry.rsplit("/", 1)[0], t))
                             for entry, t in tensors["optimizer"].items()})  # fmt: skip
        if self.center_loss is not None:
            self.center_loss.load_state_dict(tensors["centers"])
        self.epoch, self.step_in_epoch, self.step = state["epoch"], state["step_in_epoch"], state["step"]
        self.say(f"resumed from {path}: epoch {self.epoch}, step {self.step_in_epoch}")

    def say(self, text: str) -> None:
        if self.ranks.main:
            print(text, flush=True)


def loss_options(cfg: Config, center_loss: CenterLoss | None) -> dict[str, Any]:
    """What `reid_loss` is asked for."""
    model, solver = cfg.MODEL, cfg.SOLVER
    return {
        "margin": None if model.NO_MARGIN else solver.MARGIN,
        "label_smoothing": 0.1 if model.IF_LABELSMOOTH else 0.0,
        "id_weight": model.ID_LOSS_WEIGHT,
        "triplet_weight": model.TRIPLET_LOSS_WEIGHT,
        "center_loss": center_loss,
        "center_weight": solver.CENTER_LOSS_WEIGHT,
        "product_dtype": parallel.DTYPES[solver.PRECISION] if solver.TRIPLET_PRODUCTS == "amp" else None,
    }


def what_decides(cfg: Config) -> dict[str, Any]:
    """The keys that a resumed run must share with the one it continues, because the weights depend on them."""
    free = {
        "MODEL": {"DEVICE", "PRETRAIN_PATH", "PRETRAIN_PATH_R", "PRETRAIN_PATH_T"},
        "INPUT": {"SIZE_TEST"},
        "DATASETS": {"ROOT_DIR"},
        "DATALOADER": {"NUM_WORKERS"},
        "SOLVER": {"CHECKPOINT_PERIOD", "EVAL_PERIOD", "LOG_PERIOD"},
    }
    values = cfg.model_dump(mode="json")
    return {f"{section}.{key}": value for section in free for key, value in values[section].items()
            if key not in free[section]}  # fmt: skip
