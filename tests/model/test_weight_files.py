"""Files that people take for weights: what is harmless is loaded, all else is named in our own words."""

import argparse
import gzip
import io
import os
import pickle
import subprocess
import sys
import tarfile
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file
from torch import Tensor, nn

from fusionreid.backbones.resnet import ResNet
from fusionreid.weights import WeightsError, load_imagenet
from fusionreid.weights.formats import read_state
from tests.model.test_formats import Canary
from tests.model.test_weights import assert_loaded, random_state, vit

STATE = {"conv1.weight": torch.arange(6.0).view(2, 3), "bn1.bias": torch.ones(4)}
ADVICE = ("weights_only", "unsafe", "trust", "\x1b", "allowlist", "safe_globals", "arbitrary code execution")


def saved(content: object, **options: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def zipped(files: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return file.getvalue()


def tarred() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("pickle"))
    return file.getvalue()


def equal(state: dict[str, Tensor]) -> bool:
    return state.keys() == STATE.keys() and all(torch.equal(state[name], value) for name, value in STATE.items())


class Other:
    """A class that another program has and we have not."""


FOREIGN = {
    "empty": (b"", "it is empty"),
    "page": (b"\n<!DOCTYPE html><html>Sign in</html>", "a web page: the link has moved or wants a login"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n", "a pointer of Git LFS"),
    "gzip": (gzip.compress(b"x" * 999), "a gzip archive: unpack it"),
    "tar": (tarred(), "a tar archive: unpack it"),
    "keras": (b"\x89HDF\r\n\x1a\n" + bytes(999), "an HDF5 file"),
    "text": (b"MODEL:\n  NAME: x\n", "it is a text"),
    "zeros": (bytes(4096), "its first bytes are of no format"),
    "jax": (zipped({"a.npy": b"x", "b.npy": b"x"}), "a zip archive of NumPy arrays ('a.npy', 'b.npy')"),
    "archive": (zipped({"readme.txt": b"x"}), "a zip archive of other files ('readme.txt')"),
    "cut": (saved(STATE)[:-40], "cut short or damaged"),
    "cut legacy": (saved(STATE, _use_new_zipfile_serialization=False)[:-9], "cut short or damaged"),
    "cut safetensors": (save(STATE)[:-4], "cut short or damaged"),
    "pickle": (pickle.dumps({"a": 1}), "a pickle that torch.save did not write"),
    "objects": (saved({"model": Other()}), "objects of other programs ('tests.model.test_weight_files.Other')"),
    "numbers": (saved({"epoch": 3, "loss": [1.0]}), "a dictionary without tensors, with 'epoch', 'loss'"),
    "sparse": (saved({"w": torch.eye(3).to_sparse()}), "its entry 'w' is float32 on cpu, sparse_coo"),
    "meta": (saved({"w": torch.empty(3, device="meta")}), "its entry 'w' is float32 on meta"),
    "complex": (saved({"w": torch.zeros(3, dtype=torch.complex64)}), "its entry 'w' is complex64"),
    "no names": (saved({0: torch.zeros(3), ("a",): torch.zeros(3)}), "its tensors have no names"),
    "huge views": (saved({"w": torch.zeros(1).expand(10**10)}), "its tensors are far larger than its"),
}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_no_weight_file_is_named_in_our_words(tmp_path: Path, name: str, suffix: str) -> None:
    content, what = FOREIGN[name]
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    with pytest.raises(WeightsError) as caught:
        read_state(path)
    assert str(caught.value).startswith(f"{path}: must hold ")
    assert what in str(caught.value)
    assert not any(word in str(caught.value) for word in ADVICE)
    assert len(str(caught.value).splitlines()) == 1


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "weights.pth")
    code = f"from fusionreid.weights.formats import read_state; read_state({str(tmp_path / 'weights.pth')!r})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "it is not a regular file" in result.stderr.splitlines()[-1]


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    data = {"archive/data.pkl": saved(STATE), "archive/data/0": bytes(1 << 28), "archive/version": b"3"}
    (tmp_path / "bomb.pth").write_bytes(zipped(data, zipfile.ZIP_DEFLATED))
    code = (
        "import resource; from fusionreid.weights.formats import read_state\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"try: read_state({str(tmp_path / 'bomb.pth')!r})\n"
        "except ValueError as error: print(error)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    message, growth = result.stdout.splitlines()
    assert "bytes unpack to 268," in message
    assert int(growth) < 64 * 1024  # KiB


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".bin", ""])
def test_the_content_tells_the_format_not_the_name(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"weights{suffix}"
    for content in (saved(STATE), saved(STATE, _use_new_zipfile_serialization=False), save(STATE)):
        path.write_bytes(content)
        assert equal(read_state(path))


@pytest.mark.parametrize("key", ["model_state_dict", "net", "backbone", "state_dict", "model", "module", "G"])
def test_weights_are_found_in_what_trainers_save(tmp_path: Path, key: str) -> None:
    torch.save({key: STATE, "optimizer": {"state": {}}, "epoch": 3}, tmp_path / "weights.pth")
    assert equal(read_state(tmp_path / "weights.pth"))
    torch.save({"state": 1, "model": {key: STATE}}, tmp_path / "weights.pth")
    assert equal(read_state(tmp_path / "weights.pth"))


def test_a_dictionary_that_holds_itself_ends(tmp_path: Path) -> None:
    for content in (dict(STATE), {}):
        content |= dict.fromkeys(("state_dict", "model", "net", "module"), content)
        torch.save(content, tmp_path / "weights.pth")
        if "bn1.bias" in content:
            assert equal(read_state(tmp_path / "weights.pth"))
        else:
            with pytest.raises(WeightsError, match="a dictionary without tensors"):
                read_state(tmp_path / "weights.pth")


def test_what_numpy_made_is_harmless(tmp_path: Path) -> None:
    arrays = {name: value.numpy() for name, value in STATE.items()}
    extra = {"best": np.float64(0.5), "step": np.int64(3), "curve": np.arange(3), "args": argparse.Namespace(lr=1)}
    for weights in (STATE, arrays):
        torch.save({"state_dict": OrderedDict(weights), **extra}, tmp_path / "weights.pth.tar")
        assert equal(read_state(tmp_path / "weights.pth.tar"))


class Tower(nn.Module):
    """An image tower with CLIP's names."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        for name, value in state.items():
            owner: nn.Module = self
            for part in name.split(".")[:-1]:
                if part not in dict(owner.named_children()):
                    owner.add_module(part, nn.Module())
                owner = getattr(owner, part)
            owner.register_parameter(name.rpartition(".")[2], nn.Parameter(value, requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:
        return x


def clip_state(model: nn.Module, prefix: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Random weights of a model, and the same under CLIP's names."""
    from tests.model.test_weights import CLIP

    state = random_state(model)
    del state["sie_embed"]
    theirs = {}
    for name, value in state.items():
        for ours, clip in CLIP.items():
            name = name.replace(ours, clip)
        theirs[f"{prefix}{name}"] = value.squeeze() if "embedding" in name else value
    return state, theirs


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_clip_as_released_is_read_without_its_code(tmp_path: Path) -> None:
    model = vit(pre_norm=True)
    state, theirs = clip_state(model, "visual.")
    torch.jit.save(torch.jit.script(Tower({n: t.half() for n, t in theirs.items()})), str(tmp_path / "ViT-B-16.pt"))
    report = load_imagenet(model, tmp_path / "ViT-B-16.pt")
    assert report.missing == ["sie_embed"]
    assert_loaded(model, {name: value.half().float() for name, value in state.items()}, but=("sie_embed",))


def test_a_torchscript_archive_with_foreign_objects_is_refused(tmp_path: Path) -> None:
    data = {"a/data.pkl": pickle.dumps(Canary(tmp_path / "ran")), "a/constants.pkl": b"", "a/version": b"3"}
    (tmp_path / "weights.pt").write_bytes(zipped(data))
    with pytest.raises(WeightsError, match="cut short or damaged"):
        read_state(tmp_path / "weights.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("prefix", ["image_encoder.", "module.image_encoder.", "visual.", ""])
def test_clips_tower_under_any_prefix_is_loaded_whole(tmp_path: Path, prefix: str) -> None:
    model = vit(pre_norm=True)
    state, theirs = clip_state(model, prefix)
    torch.save(theirs | {"classifier.weight": torch.rand(7, 96)}, tmp_path / "clipreid.pth")
    report = load_imagenet(model, tmp_path / "clipreid.pth")
    assert (report.missing, report.skipped) == (["sie_embed"], ["classifier.weight"])
    assert_loaded(model, state, but=("sie_embed",))


def test_vit_of_torchvision(tmp_path: Path) -> None:
    from torchvision.models.vision_transformer import VisionTransformer

    source = VisionTransformer(224, 16, 1, 4, 96, 384, num_classes=10)
    model, theirs = vit(), random_state(source)
    torch.save(theirs, tmp_path / "vit_b_16.pth")
    report = load_imagenet(model, tmp_path / "vit_b_16.pth")
    assert (report.missing, report.resized) == (["sie_embed"], ["pos_embed"])
    assert report.skipped == ["heads.head.weight", "heads.head.bias"]
    layer = "encoder.layers.encoder_layer_0."
    for ours, name in {"attn.qkv.weight": "self_attention.in_proj_weight", "mlp.fc1.bias": "mlp.0.bias",
                       "mlp.fc2.weight": "mlp.3.weight", "norm2.bias": "ln_2.bias"}.items():  # fmt: skip
        assert torch.equal(model.state_dict()[f"blocks.0.{ours}"], theirs[f"{layer}{name}"])


@pytest.mark.parametrize("change", ["missing", "shape"])
@pytest.mark.parametrize(("kind", "first"), [("cnn", "conv1.weight"), ("vit", "patch_embed.proj.weight")])
def test_weights_without_the_first_layer_are_refused(tmp_path: Path, kind: str, first: str, change: str) -> None:
    model = vit() if kind == "vit" else ResNet((1, 1, 1, 1))
    before, state = {n: t.clone() for n, t in model.state_dict().items()}, random_state(model)
    state[first] = torch.rand(96, 1, 14, 14)
    if change == "missing":
        del state[first]
    save_file(state, tmp_path / "weights.safetensors")
    found = "is not in the file" if change == "missing" else r"has the shape \(96, 1, 14, 14\)"
    with pytest.raises(
        WeightsError, match=rf"its first layer {first} \(.*\) {found}: all after it would work on noise"
    ):
        load_imagenet(model, tmp_path / "weights.safetensors")
    assert_loaded(model, before)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn])
def test_quantised_weights_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    state = random_state(vit())
    save_file(state | {"pos_embed": torch.zeros(1, 197, 96).to(dtype)}, tmp_path / "weights.safetensors")
    with pytest.raises(WeightsError, match=r"1 entries hold torch\S+ .* the first is pos_embed; quantised"):
        load_imagenet(vit(), tmp_path / "weights.safetensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    state = random_state(vit())
    state["blocks.0.mlp.fc1.weight"][3, 5] = value
    save_file(state, tmp_path / "weights.safetensors")
    with pytest.raises(WeightsError, match=r"1 entries are not finite, the first is blocks\.0\.mlp\.fc1\.weight"):
        load_imagenet(vit(), tmp_path / "weights.safetensors")


@pytest.mark.parametrize("shape", [(), (1, 1, 1, 96), (0, 96)])
@pytest.mark.parametrize("name", ["cls_token", "pos_embed"])
def test_tables_of_a_wrong_rank_are_refused(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    save_file(random_state(vit()) | {name: torch.zeros(shape)}, tmp_path / "weights.safetensors")
    with pytest.raises(WeightsError, match=rf"{name}: must be \(1, rows, width\), got"):
        load_imagenet(vit(), tmp_path / "weights.safetensors")
