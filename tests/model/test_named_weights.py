"""Weights by name: fetched by the hub's client, kept, pinned by their digest; a local file stands for the hub's."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file

from fusionreid import build_model
from fusionreid.config import ModelConfig
from fusionreid.weights import WeightsError, check_weights, load_pretrained, named
from fusionreid.weights.named import NotFetchedError, find_weights, pinned

SMALL = {
    "RES_NAME": "test_resnet",
    "TRANSFORMER_TYPE": "test_vit",
    "STRIDE_SIZE": (16, 16),
    "MIX_DIM": 24,
    "HTM_LAYER": 1,
}
AUTO = ModelConfig(PRETRAIN_PATH_R="auto", PRETRAIN_PATH_T="auto", **SMALL)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Files that stand for those of the hub, and what was asked for."""
    asked = []

    def fetch(repository: str, file: str) -> str:
        asked.append((repository, file))
        path = tmp_path / repository.replace("/", "--")
        if not path.exists():
            model = timm.create_model(repository.removeprefix("timm/").partition(".")[0])
            save_file({name: torch.rand(value.shape) for name, value in model.state_dict().items()}, path)
        return str(path)

    monkeypatch.setattr(named, "fetch", fetch)
    return asked


def model():
    return build_model(AUTO, image_size=(64, 32), num_classes=4, num_cameras=2)


def test_auto_and_names_load_timms_weights_of_the_backbone(hub: list[tuple[str, str]]) -> None:
    check_weights(AUTO)
    one, other = model(), model()
    reports = load_pretrained(one, AUTO)
    assert hub == [("timm/test_resnet.r160_in1k", named.FILE), ("timm/test_vit.r160_in1k", named.FILE)]
    assert [report.missing for report in reports] == [[], ["sie_embed"]]
    load_pretrained(other, ModelConfig(PRETRAIN_PATH_R="test_resnet", PRETRAIN_PATH_T="test_vit.r160_in1k", **SMALL))
    for branch in ("cnn", "transformer"):
        mine, theirs = (getattr(built, branch).state_dict() for built in (one, other))
        assert all(torch.equal(value, theirs[name]) for name, value in mine.items() if name != "sie_embed")


def test_a_digest_pins_the_file_and_another_one_is_refused(hub: list[tuple[str, str]], tmp_path: Path) -> None:
    section = pinned(AUTO)
    digest = hashlib.sha256((tmp_path / "timm--test_resnet.r160_in1k").read_bytes()).hexdigest()
    assert f"test_resnet.r160_in1k@sha256:{digest}" == section.PRETRAIN_PATH_R
    check_weights(section)
    assert pinned(section) == section
    assert load_pretrained(model(), section)[0].source == section.PRETRAIN_PATH_R
    (tmp_path / "timm--test_resnet.r160_in1k").unlink()  # published anew
    with pytest.raises(WeightsError, match=rf"has the digest sha256:\w+, {digest} is wanted: .*remove it to fetch it"):
        load_pretrained(model(), section)


def test_none_leaves_one_branch_as_it_was_drawn(hub: list[tuple[str, str]]) -> None:
    section = ModelConfig(PRETRAIN_PATH_R="none", PRETRAIN_PATH_T="auto", **SMALL)
    check_weights(section)
    built = model()
    before = {name: value.clone() for name, value in built.cnn.state_dict().items()}
    (report,) = load_pretrained(built, section)
    assert "test_vit.r160_in1k" in report.source
    assert all(torch.equal(value, before[name]) for name, value in built.cnn.state_dict().items())
    assert pinned(section).PRETRAIN_PATH_R == "none"


def test_a_file_wins_over_a_name(hub: list[tuple[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("resnet18").touch()
    assert find_weights(ModelConfig(PRETRAIN_PATH_R="resnet18"), "R") is None
    assert hub == []


def test_offline_the_address_and_the_key_for_the_file_are_told() -> None:
    """The client of the hub is offline in all tests."""
    with pytest.raises(NotFetchedError) as caught:
        find_weights(ModelConfig(PRETRAIN_PATH_R="auto", RES_NAME="resnet18"), "R")
    for text in ("MODEL.PRETRAIN_PATH_R: resnet18.a1_in1k cannot be fetched", "/timm/resnet18.a1_in1k/resolve/main/",
                 "and set MODEL.PRETRAIN_PATH_R to the file"):  # fmt: skip
        assert text in str(caught.value)
    assert len(named.addresses(AUTO)) == 2


@pytest.mark.parametrize(("keys", "words"), [
    ({"PRETRAIN_PATH_R": "resnet18k"}, "neither a file nor a model of timm with weights; did you mean resnet18"),
    ({"PRETRAIN_PATH_R": "auto", "RES_NAME": "resnet50_ibn_a"}, "timm has no weights of resnet50_ibn_a: name a file"),
])  # fmt: skip
def test_what_is_no_name_is_told(keys: dict, words: str) -> None:
    with pytest.raises(WeightsError, match=words):
        find_weights(ModelConfig(**keys), "R")


@pytest.mark.parametrize("path", ["resnet18.pth", "weights.safetensors", "a/resnet18", "your CNN", "", "r.pth.tar"])
def test_a_path_is_no_name(path: str) -> None:
    with pytest.raises(WeightsError, match="no such file"):
        check_weights(ModelConfig(PRETRAIN_PATH_R=path, TRANS_USE=False))


def test_names_are_checked_without_torch() -> None:
    code = "import sys, fusionreid.weights.named; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_download_is_announced_a_kept_file_is_not(monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    kept: set[str] = set()

    def download(repository: str, file: str, *, local_files_only: bool = False, **_: object) -> str:
        if local_files_only and repository not in kept:
            raise LocalEntryNotFoundError("not there")
        kept.add(repository)
        return f"{repository}/{file}"

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda url, timeout: None)
    caplog.set_level("INFO")
    assert named.fetch("timm/one", "model.safetensors") == named.fetch("timm/one", "model.safetensors")
    assert caplog.messages == ["downloading the weights timm/one"]


def test_without_a_network_the_reason_comes_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    address = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", address)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("it tries again"))
    with pytest.raises(Exception, match="refused"):
        named.fetch("timm/one", "model.safetensors")
    assert capfd.readouterr().err == ""
