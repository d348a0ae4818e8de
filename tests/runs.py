"""A training run small enough for a test: eight rendered persons, images of 32 x 16, three steps an epoch."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fusionreid.engine import config_yaml
from fusionreid.engine.checkpoints import checkpoint
from fusionreid.engine.checkpoints.load_model import build
from fusionreid.engine.config import load_config
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


def untrained(folder: Path, cameras: tuple[str, ...], **keys: object) -> Path:
    """A run with settings and a checkpoint of random weights, and seven crops of noise beside it, in `crops`."""
    _, path, *overrides = arguments(folder, folder, **keys)
    cfg = load_config(path, overrides)
    torch.manual_seed(3)
    state = {"classes": 5, "cameras": tuple(range(len(cameras))), "camera_names": cameras}
    model = build(cfg, 5, len(cameras))
    weights = {"model": model.state_dict()}
    checkpoint.save(folder / "checkpoints", 1, weights, {**state, "config": cfg.model_dump(mode="json")})
    (folder / "config.yml").write_text(config_yaml.dump(cfg.model_dump(exclude_unset=True)))
    (folder.parent / "crops").mkdir(exist_ok=True)
    random = np.random.default_rng(0)
    for i in range(7):
        pixels = random.integers(0, 256, (20 + i, 10 + i, 3), np.uint8)
        Image.fromarray(pixels).save(folder.parent / f"crops/{i}.{'jpg' if i % 2 else 'png'}")
    return folder


def draw_crops(folder: Path) -> None:
    """Images of eight persons, two by each of two cameras, in folders as `train --data` takes them."""
    for person in range(8):
        for camera in ("hall", "door"):
            for number in range(2):
                path = folder / f"anna {person}" / camera / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (16, 32), (20 * person, 90 * number, 50 + 100 * (camera == "hall"))).save(path)


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
