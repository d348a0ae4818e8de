"""Weights go to torch.distributed.checkpoint and come back, as the manual says."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fusionreid.engine.checkpoints import checkpoint
from fusionreid.engine.checkpoints.load_model import build, restore
from fusionreid.engine.config import load_config
from tests import ROOT
from tests.runs import arguments


def test_weights_go_to_distributed_checkpoints_and_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, path, *overrides = arguments(tmp_path, tmp_path, MODEL__SIE_CAMERA="no")
    cfg = load_config(path, overrides)
    model = build(cfg, 5, 2)
    state = {"classes": 5, "cameras": (0, 1), "config": cfg.model_dump(mode="json")}
    saved = checkpoint.save(tmp_path, 1, {"model": model.state_dict()}, state)
    section = (ROOT / "docs/training.md").read_text().partition("## Weights for other trainers")[2]
    snippet = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert snippet is not None
    code, count = re.subn(r'"log/.*?"', f"{str(saved / 'model.safetensors')!r}", snippet[1])
    assert count == 1
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "training.md", "exec"), {})
    convert = re.search(r"`python (-m torch\S+ dcp_to_torch \S+ (\S+))`", section)
    assert convert is not None
    subprocess.run([sys.executable, *convert[1].split()], check=True, capture_output=True)
    found = restore(Path(convert[2]), cfg).model.state_dict()
    assert list(found) == list(model.state_dict())
    assert all(torch.equal(tensor, found[name]) for name, tensor in model.state_dict().items())
