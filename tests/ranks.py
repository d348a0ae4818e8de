"""A few training steps of a small model on fixed batches, on this process or on several that are started for it."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fusionreid.dataloading.loader import Batch
from fusionreid.engine.checkpoints.load_model import build
from fusionreid.engine.config import Config
from fusionreid.engine.distributed import parallel
from fusionreid.engine.training.optim import Optimizer
from fusionreid.engine.training.state import Parts, restore
from fusionreid.engine.training.train_step import TrainStep
from tests.runs import ROOT

MODEL = {"RES_NAME": "test_resnet", "TRANSFORMER_TYPE": "test_vit", "STRIDE_SIZE": [16, 16], "MIX_DIM": 24,
         "HTM_LAYER": 1, "DROP_PATH": 0.3, "DEVICE": "cpu"}  # fmt: skip
IMAGES, PERSONS, STEPS = 16, 4, 3


def config(**sections: dict[str, Any]) -> Config:
    solver = {"IMS_PER_BATCH": IMAGES, "PRECISION": "fp32", "BASE_LR": 0.02, "WARMUP_ITERS": 0}
    return Config.from_dict(
        {
            "MODEL": MODEL | sections.get("MODEL", {}),
            "INPUT": {"SIZE_TRAIN": [32, 16], "SIZE_TEST": [32, 16]},
            "DATALOADER": {"NUM_INSTANCE": IMAGES // PERSONS} | sections.get("DATALOADER", {}),
            "SOLVER": solver | sections.get("SOLVER", {}),
            "PARALLEL": {"COMPILE": "off"} | sections.get("PARALLEL", {}),
        }
    )


def batch(
    step: int, part: slice, dtype: torch.dtype, num_images: int = IMAGES, instances: int = IMAGES // PERSONS
) -> Batch:
    """A part of the batch of a step, the same everywhere."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(num_images, 3, 32, 16, generator=generator).to(dtype)
    persons, places = torch.arange(num_images) // instances, torch.arange(num_images)
    return Batch(
        images[part].contiguous(memory_format=torch.channels_last), persons[part], places[part] % 2, places[part]
    )


def train(
    cfg: Config, dtype: torch.dtype, steps: range = range(STEPS), start: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Losses, weights, statistics and optimiser state after these steps, whole, by name; `start` is such a result."""
    ranks = parallel.start("cpu")
    size = cfg.SOLVER.IMS_PER_BATCH, cfg.DATALOADER.NUM_INSTANCE
    torch.manual_seed(5)
    model = parallel.shard(build(cfg, size[0] // size[1], 2).to(dtype), ranks, cfg.PARALLEL)
    optimizer = Optimizer(model, cfg.SOLVER, ranks.device)
    optimizer.set_epoch(2)
    model.train()
    step = TrainStep(model, optimizer, cfg, ranks)
    if start:
        restore(_parts(start) if ranks.main else None, model, step, ranks)
    losses, norms = [], []
    share = size[0] // ranks.world_size
    for number in steps:
        step.clear()
        step(batch(number, slice(ranks.rank * share, (ranks.rank + 1) * share), dtype, *size), number)
        report = step.read()
        losses.append(torch.tensor([*report.identity, *report.triplet, report.accuracy], dtype=torch.float64))
        norms.append(optimizer.take_gradient_norm())
        if step.ema:  # as in an evaluation between two steps, which must leave no trace
            with step.ema.applied(), torch.no_grad():
                model.eval()(batch(0, slice(2), dtype).images, torch.zeros(2, dtype=torch.int64))
            parallel.reshard(model.train())
    parallel.equalise_statistics(model)
    result = {f"model/{name}": parallel.full_tensor(t) for name, t in model.state_dict().items()}
    for entry, t in optimizer.state().items():
        result[f"optimizer/{entry}"] = parallel.full_tensor(t, like=optimizer.parameters[entry.rsplit("/", 1)[0]])
    return result | {"losses": torch.stack(losses), "gradient_norms": torch.stack(norms)} if losses else result


def _parts(result: dict[str, Tensor]) -> Parts:
    """What a checkpoint of this state holds; the average of the weights is theirs."""
    parts: Parts = {"model": {}, "optimizer": {}}
    for name, tensor in result.items():
        part, _, entry = name.partition("/")
        if part in parts:
            parts[part][entry] = tensor
    return parts | {"average": {name: t for name, t in parts["model"].items() if t.is_floating_point()}}


def launch(processes: int, work: list[dict[str, Any]], folder: Path) -> subprocess.Popen[str]:
    """Start processes that do each piece of work, `{"name", "dtype", "sections", "steps", "start"}`, in turn."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                   "WORLD_SIZE": str(processes), "WORK": json.dumps(work), "FOLDER": str(folder)}  # fmt: skip
    return subprocess.Popen([sys.executable, "-m", "tests.ranks"], env=environment, text=True, cwd=ROOT,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip


def main() -> None:
    """Become WORLD_SIZE processes, forks of one that has imported torch, and do the work."""
    rank, children = 0, list[int]()
    for other in range(1, int(os.environ["WORLD_SIZE"])):
        if not (child := os.fork()):
            rank, children = other, []
            break
        children.append(child)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    folder = Path(os.environ["FOLDER"])
    for piece in json.loads(os.environ["WORK"]):
        start = load_file(folder / piece["start"]) if piece.get("start") else None
        steps = range(*piece.get("steps", (STEPS,)))
        result = train(config(**piece.get("sections", {})), getattr(torch, piece["dtype"]), steps, start)
        if rank == 0:
            save_file({name: t.clone() for name, t in result.items()}, folder / piece["name"])
        torch.distributed.barrier()
    parallel.finish()
    assert not any(os.waitpid(child, 0)[1] for child in children)


if __name__ == "__main__":
    main()
