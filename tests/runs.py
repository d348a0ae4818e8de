"""A training run small enough for a test: eight rendered persons, images of 32 x 16, three steps an epoch."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests import ROOT

KEYS = {
    "MODEL.RES_NAME": "test_resnet",
    "MODEL.TRANSFORMER_TYPE": "test_vit",
    "MODEL.STRIDE_SIZE": "(16, 16)",
    "MODEL.MIX_DIM": "24",
    "MODEL.DROP_PATH": "0.1",
    "INPUT.SIZE_TRAIN": "(32, 16)",
    "INPUT.SIZE_TEST": "(32, 16)",
    "DATASETS.SYNTHETIC.PERSONS": "8",
    "DATASETS.SYNTHETIC.TEST_PERSONS": "4",
    "DATASETS.SYNTHETIC.CAMERAS": "2",
    "DATASETS.SYNTHETIC.SIZE": "(32, 16)",
    "DATALOADER.NUM_WORKERS": "0",
    "DATALOADER.NUM_INSTANCE": "4",
    "SOLVER.IMS_PER_BATCH": "16",
    "SOLVER.MAX_EPOCHS": "3",
    "SOLVER.CHECKPOINT_PERIOD": "1",
    "SOLVER.EVAL_PERIOD": "3",
    "SOLVER.LOG_PERIOD": "1",
}


def arguments(root: Path, output: Path, **keys: object) -> list[str]:
    """The command line of the small run; a key's dots are written as two underscores."""
    settings = {**KEYS, "DATASETS.ROOT_DIR": root, "OUTPUT_DIR": output}
    settings |= {key.replace("__", "."): value for key, value in keys.items()}
    return ["--config_file", str(ROOT / "configs/synthetic/tiny.yml"), *(f"{k}={v}" for k, v in settings.items())]


def command(*argv: str, processes: int = 1, script: str = "train", restarts: int = 0) -> subprocess.Popen[str]:
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        launcher += ["--max-restarts", str(restarts)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*launcher, str(ROOT / f"engine/{script}.py"), *argv], env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip


def finish(run: subprocess.Popen[str]) -> tuple[int, str]:
    text, _ = run.communicate(timeout=240)
    return run.returncode, text


def interrupt(run: subprocess.Popen[str], output: Path, step: int, number: signal.Signals) -> tuple[int, str]:
    """Send a signal once the run has logged this many steps."""
    lines = output / "metrics.jsonl"
    while run.poll() is None and (not lines.exists() or lines.read_text().count("\n") < step):
        time.sleep(0.005)
    run.send_signal(number)
    return finish(run)
