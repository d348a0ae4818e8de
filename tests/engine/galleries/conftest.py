"""A small run with random weights and crops to embed; LanceDB is needed, and is an extra."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from fusionreid.engine import config_yaml
from fusionreid.engine.checkpoints import checkpoint
from fusionreid.engine.checkpoints.load_model import build
from fusionreid.engine.config import load_config
from tests.runs import arguments

CROPS = 40


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Settings `cfg` of a run that trained on two cameras, its configuration `file`, and a folder `crops`."""
    pytest.importorskip("lancedb", reason="LanceDB is not installed: pip install 'fusionreid[gallery]'")
    folder = tmp_path_factory.mktemp("galleries") / "run"
    _, path, *overrides = arguments(folder, folder)
    cfg = load_config(path, overrides)
    torch.manual_seed(3)
    state = {"classes": 5, "cameras": (0, 1), "camera_names": ["hall", "back door"],
             "config": cfg.model_dump(mode="json")}  # fmt: skip
    checkpoint.save(folder / "checkpoints", 1, {"model": build(cfg, 5, 2).state_dict()}, state)
    file, crops = folder / "config.yml", folder.parent / "crops"
    file.write_text(config_yaml.dump(cfg.model_dump(exclude_unset=True)))
    crops.mkdir()
    random = np.random.default_rng(0)
    for i in range(CROPS):
        Image.fromarray(random.integers(0, 256, (20 + i % 7, 10 + i % 5, 3), np.uint8)).save(crops / f"{i:02}.png")
    return SimpleNamespace(cfg=cfg, file=file, crops=crops)
