"""Thirty steps of the published recipe on the tiny composition, in double precision: losses, weights, features."""

import numpy as np
import pytest
import torch

from fusionreid.engine.config import SolverConfig
from fusionreid.engine.distributed import parallel
from fusionreid.engine.training.optim import Optimizer
from fusionreid.losses import reid_loss
from fusionreid.weights import published_names
from tests.numerics import assert_close, load_case
from tests.recorded import EXACT, STORED, fill
from tests.recorded_model import tiny_model


@pytest.mark.parametrize("name", ["tiny", "tiny_lr0005"])
def test_thirty_steps_follow_the_published_trajectory(name: str) -> None:
    case, arrays = load_case(f"trajectory/{name}")
    model = tiny_model(layers=2, share="none")
    names = published_names(model)
    ranks = parallel.start("cpu")
    model = parallel.shard(fill(model, names.__getitem__), ranks)
    solver = SolverConfig(
        BASE_LR=case["base_lr"], MAX_EPOCHS=case["max_epochs"], WARMUP_ITERS=case["warmup"], PRECISION="fp32"
    )
    optimizer = Optimizer(model, solver, ranks.device)
    generator = np.random.Generator(np.random.PCG64(case["image_seed"]))
    draw = generator.standard_normal(case["image_draw_shape"], np.float32)
    images = torch.from_numpy(draw).double()
    model.train()
    for step in range(case["steps"]):
        optimizer.set_epoch(step // case["steps_per_epoch"] + 1)
        batch = step % len(images)
        persons, cameras = torch.tensor(case["labels"][batch]), torch.tensor(case["cameras"][batch])
        loss = reid_loss(model(images[batch], cameras), persons)
        assert_close(f"loss at step {step}", loss.total.detach(), case["loss_f64"][step], EXACT)
        assert_close(f"heads at step {step}", (loss.identity + loss.triplet).detach(), case["heads_f64"][step], EXACT)
        optimizer.backward(loss.total)
        optimizer.step(torch.zeros(()))
    state = {names[entry]: parallel.full_tensor(t) for entry, t in model.state_dict().items()}
    for entry, (norm, total) in case["final_state_f64"].items():
        if entry in state:
            assert_close(entry, [state[entry].double().norm(), state[entry].sum()], [norm, total], 1e-8)
        if f"final_f64/{entry}" in arrays:
            assert_close(entry, state[entry], arrays[f"final_f64/{entry}"], STORED)
    model.eval()
    with torch.no_grad():
        features = model(images[0, :4], torch.tensor(case["cameras"][0][:4])).embedding()
    assert_close("features after training", features, arrays["eval_after_before_neck_f64"], EXACT)
