"""Files are there whole or not at all."""

import json
import os
from pathlib import Path

import pytest

from fusionreid.files import write_json


def test_json_is_replaced_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "best.json"
    write_json(path, {"step": 1})
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            write_json(path, {"step": 2})
    assert json.loads(path.read_text()) == {"step": 1}
    write_json(path, {"step": 3})
    assert json.loads(path.read_text()) == {"step": 3}
    assert list(tmp_path.iterdir()) == [path]
