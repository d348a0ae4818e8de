"""The server of the examples finds whom an image shows, reads no large body, and does nothing without the key."""

import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest

from fusionreid.engine import cli
from tests import ROOT
from tests.engine.galleries.conftest import CROPS


@pytest.fixture(scope="module")
def client(run: SimpleNamespace) -> Any:
    for module in ("fastapi", "httpx"):
        pytest.importorskip(module, reason=f"{module} is not installed: pip install fastapi httpx")
    from fastapi.testclient import TestClient

    shop = str(run.file.parent.parent / "served")
    assert cli.main(["embed", "--config_file", str(run.file), "--images", str(run.crops), "--to", shop]) == 0
    spec = importlib.util.spec_from_file_location("serve", ROOT / "examples/serve.py")
    assert spec is not None
    assert spec.loader is not None
    serve = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"RUN": str(run.file), "GALLERY": shop, "API_KEY": "secret"}.items():
            patch.setenv(name, value)
        spec.loader.exec_module(serve)
    return TestClient(serve.app)


def test_it_finds_an_image_and_nobody(run: SimpleNamespace, client: Any) -> None:
    crop, key = (run.crops / "03.png").read_bytes(), {"X-API-Key": "secret"}
    found = client.post("/search", params={"top": CROPS, "at_least": -1}, content=crop, headers=key)
    assert found.status_code == 200
    assert len(found.json()) == CROPS
    assert found.json()[0]["path"] == str(run.crops / "03.png")
    assert found.json()[0]["cosine"] == pytest.approx(1, abs=1e-5)
    other = client.post("/search", params={"at_least": 1}, content=(run.crops / "04.png").read_bytes(), headers=key)
    assert other.json() == []


@pytest.mark.parametrize(("key", "body", "status"), [
    ("", b"", 401), ("wrong", b"", 401), ("secret", bytes(2**20 + 1), 413), ("secret", b"no image", 400),
    ("secret", b"", 400),
])  # fmt: skip
def test_what_it_refuses(client: Any, key: str, body: bytes, status: int) -> None:
    assert client.post("/search", content=body, headers={"X-API-Key": key} if key else {}).status_code == status
