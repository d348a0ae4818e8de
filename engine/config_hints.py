"""Nearest configuration keys: for a mistyped key, and for the options that people know from other programs."""

import difflib
import re
from collections.abc import Collection, Sequence

TRIED = {  # option of other programs -> the key or its last part, and the value where the option says it
    "epochs": "SOLVER.MAX_EPOCHS",
    "max-epoch": "SOLVER.MAX_EPOCHS",
    "num-epochs": "SOLVER.MAX_EPOCHS",
    "lr": "SOLVER.BASE_LR",
    "learning-rate": "SOLVER.BASE_LR",
    "batch": "IMS_PER_BATCH",
    "batch-size": "IMS_PER_BATCH",
    "train-batch-size": "SOLVER.IMS_PER_BATCH",
    "test-batch-size": "TEST.IMS_PER_BATCH",
    "seed": "SOLVER.SEED",
    "optim": "SOLVER.OPTIMIZER_NAME",
    "optimizer": "SOLVER.OPTIMIZER_NAME",
    "wd": "SOLVER.WEIGHT_DECAY",
    "clip-grad": "SOLVER.MAX_GRAD_NORM",
    "grad-accum": "SOLVER.ACCUMULATE",
    "gradient-accumulation-steps": "SOLVER.ACCUMULATE",
    "warmup": "SOLVER.WARMUP_ITERS",
    "warmup-epochs": "SOLVER.WARMUP_ITERS",
    "amp": "SOLVER.PRECISION bf16",
    "mixed-precision": "SOLVER.PRECISION bf16",
    "bf16": "SOLVER.PRECISION bf16",
    "fp16": "SOLVER.PRECISION fp16",
    "fp32": "SOLVER.PRECISION fp32",
    "dtype": "SOLVER.PRECISION",
    "model-ema": "SOLVER.EMA",
    "eval-freq": "SOLVER.EVAL_PERIOD",
    "save-freq": "SOLVER.CHECKPOINT_PERIOD",
    "save-interval": "SOLVER.CHECKPOINT_PERIOD",
    "print-freq": "SOLVER.LOG_PERIOD",
    "log-interval": "SOLVER.LOG_PERIOD",
    "wandb": "SOLVER.LOGGERS wandb",
    "tensorboard": "SOLVER.LOGGERS tensorboard",
    "device": "MODEL.DEVICE",
    "cpu": "MODEL.DEVICE cpu",
    "arch": "MODEL.RES_NAME",
    "backbone": "MODEL.RES_NAME",
    "pretrained": "MODEL.PRETRAIN_PATH",
    "stride": "MODEL.STRIDE_SIZE",
    "img-size": "INPUT.SIZE_TRAIN",
    "image-size": "INPUT.SIZE_TRAIN",
    "height": "INPUT.SIZE_TRAIN",
    "width": "INPUT.SIZE_TRAIN",
    "dataset": "DATASETS.NAMES",
    "data-dir": "DATASETS.ROOT_DIR",
    "data-path": "DATASETS.ROOT_DIR",
    "data-root": "DATASETS.ROOT_DIR",
    "root": "DATASETS.ROOT_DIR",
    "workers": "DATALOADER.NUM_WORKERS",
    "j": "DATALOADER.NUM_WORKERS",
    "num-instances": "DATALOADER.NUM_INSTANCE",
    "checkpoint": "TEST.WEIGHT",
    "ckpt": "TEST.WEIGHT",
    "weights": "TEST.WEIGHT",
    "model-path": "TEST.WEIGHT",
    "rerank": "TEST.RE_RANKING yes",
    "compile": "PARALLEL.COMPILE blocks",
    "sync-bn": "PARALLEL.EXACT yes",
    "out": "OUTPUT_DIR",
    "output": "OUTPUT_DIR",
    "save-dir": "OUTPUT_DIR",
    "log-dir": "OUTPUT_DIR",
    "work-dir": "OUTPUT_DIR",
}
PROCESSES = "torchrun starts one process per GPU: torchrun --nproc-per-node 4 engine/train.py --config_file FILE"
EVALUATE = "evaluation is a command of its own: fusionreid evaluate --config_file FILE"
OTHERWISE = {  # what is no key, and how it is done here
    "resume": "resuming is automatic: the same command, with the same OUTPUT_DIR, resumes from the newest checkpoint",
    "auto-resume": "resuming is automatic: the same command resumes from the newest checkpoint in OUTPUT_DIR",
    "eval": EVALUATE,
    "eval-only": EVALUATE,
    "evaluate": EVALUATE,
    "test": EVALUATE,
    "test-only": EVALUATE,
    "gpu": "CUDA_VISIBLE_DEVICES=0 in front of the command chooses the GPU",
    "gpus": f"CUDA_VISIBLE_DEVICES chooses GPUs, and {PROCESSES}",
    "gpu-ids": f"CUDA_VISIBLE_DEVICES chooses GPUs, and {PROCESSES}",
    "ngpu": PROCESSES,
    "num-gpus": PROCESSES,
    "nproc-per-node": PROCESSES,
    "world-size": PROCESSES,
    "distributed": PROCESSES,
    "local-rank": f"the processes are started by {PROCESSES.removeprefix('torchrun starts one process per GPU: ')}",
    "opts": "write KEY VALUE pairs without --opts",
    "dry-run": "the check before training is a command of its own: fusionreid doctor --config_file FILE",
}
KEY = re.compile(r"[A-Z]+\.[A-Z]")


def keys_like(word: str, keys: Collection[str]) -> list[str]:
    """The keys that a word may stand for: by what other programs call it, by its last part, by its spelling."""
    tried = TRIED.get(_plain(word), "").partition(" ")[0]
    asked = (tried or word).lstrip("-").upper().replace("-", "_")
    last = asked.rpartition(".")[2]
    by_last = {key: key.rpartition(".")[2] for key in keys}
    same = [key for key, name in by_last.items() if name == last]
    if asked in keys:
        return [asked]
    if same or "." in asked:
        return same or difflib.get_close_matches(asked, keys, n=1)
    close = difflib.get_close_matches(last, set(by_last.values()), n=1, cutoff=0.75)
    return [key for key, name in by_last.items() if name in close] or difflib.get_close_matches(asked, keys, n=1)


def instead_of(option: str, following: str | None, command: str, options: Sequence[str], keys: Collection[str]) -> str:
    """What to write instead of an option that a command does not have; `following` is the word behind it."""
    name, _, value = option.partition("=")
    plain = _plain(name)
    if close := [known for known in options if _plain(known) == plain] or difflib.get_close_matches(
        name, options, n=1, cutoff=0.8
    ):
        return f"did you mean {close[0]}?"
    if plain in OTHERWISE:
        return OTHERWISE[plain]
    trains = "train" in command.partition(" --config_file")[0]
    meant = sorted(keys_like(name, keys), key=lambda key: key.startswith("TEST.") == trains)
    if not meant:
        return f"{command} --print-config lists the keys, --help the options"
    if not value and following and not following.startswith("-") and not KEY.match(following):
        value = following
    value = TRIED.get(plain, "").partition(" ")[2] or value or "VALUE"
    return f"the key is {' or '.join(meant)}, as in: {command} {meant[0]} {value}"


def _plain(word: str) -> str:
    return word.lstrip("-").lower().replace("_", "-")
