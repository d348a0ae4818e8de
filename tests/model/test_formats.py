"""Weight files: containers, what must not be read, and position tables of every layout."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fusionreid.weights import WeightsError
from fusionreid.weights.formats import position_layout, read_state, resize_positions
from tests.numerics import FIXTURES, assert_close


class Canary:
    """Unpickling it would leave a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.path,)


def test_both_containers_hold_the_same(tmp_path: Path) -> None:
    state = {"conv1.weight": torch.rand(2, 3), "bn1.bias": torch.rand(4)}
    save_file(state, tmp_path / "weights.safetensors")
    torch.save({"model": state}, tmp_path / "weights.pth")
    for name in ("weights.safetensors", "weights.pth"):
        read = read_state(tmp_path / name)
        assert read.keys() == state.keys()
        assert all(torch.equal(read[key], state[key]) for key in state)


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", b"PK\x03\x04 cut", b"\x80\x02}q\x00.", b"\xff" * 64])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_unreadable_files_are_refused(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=r"weights\.\w+: must hold"):
        read_state(path)


def test_every_cut_of_a_file_is_refused(tmp_path: Path) -> None:
    torch.save({"weight": torch.rand(100)}, tmp_path / "whole.pth")
    whole = (tmp_path / "whole.pth").read_bytes()
    for length in range(0, len(whole), len(whole) // 20):
        (tmp_path / "cut.pth").write_bytes(whole[:length])
        with pytest.raises(WeightsError, match=r"cut\.pth: must hold"):
            read_state(tmp_path / "cut.pth")


def test_missing_file_and_file_without_tensors_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no such weight file"):
        read_state(tmp_path / "weights.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(WeightsError, match="must hold a dictionary of tensors; it holds a value of type list"):
        read_state(tmp_path / "list.pth")


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    torch.save({"conv1.weight": Canary(tmp_path / "ran")}, tmp_path / "weights.pth")
    with pytest.raises(WeightsError, match="must hold tensors only"):
        read_state(tmp_path / "weights.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", ["#!/bin/bash\n", "r() { local s; }\n", "q\n", "", "(1", "SOLVER:\n  A: 1\n"])
def test_a_text_is_no_weight_file(tmp_path: Path, content: str) -> None:
    (tmp_path / "weights.pth").write_text(content)
    with pytest.raises(WeightsError, match="must hold tensors only"):
        read_state(tmp_path / "weights.pth")


@pytest.mark.parametrize("source", ["", "_5x5"])
@pytest.mark.parametrize("grid", [(21, 10), (16, 8), (24, 8), (31, 10), (14, 14), (7, 3)])
def test_positions_are_resized_as_recorded(source: str, grid: tuple[int, int]) -> None:
    with np.load(FIXTURES / "modules/resize_pos_embed.npz") as arrays:
        table = torch.from_numpy(arrays[f"in/posemb{source}"]).double()
        expected = arrays[f"out64{source}/{grid[0]}x{grid[1]}"]
    assert_close("table", resize_positions(table, *position_layout(table.shape[1]), 1, grid), expected, 1e-9)


@pytest.mark.parametrize(
    ("rows", "prefix", "grid"),
    [
        (197, 1, (14, 14)),  # ImageNet
        (198, 2, (14, 14)),  # with a distillation token
        (196, 0, (14, 14)),  # without a class token
        (129, 1, (16, 8)),  # ReID pretraining at 256x128
        (193, 1, (24, 8)),  # and at 384x128
        (1370, 1, (37, 37)),  # DINOv2
        (211, 1, (21, 10)),  # published, 256x128 at stride 12
        (311, 1, (31, 10)),  # and 384x128
    ],
)
def test_layout_of_a_table_follows_from_its_rows(rows: int, prefix: int, grid: tuple[int, int]) -> None:
    assert position_layout(rows) == (prefix, grid)


def test_table_of_an_unknown_layout_is_refused() -> None:
    with pytest.raises(WeightsError, match="31x10, got 212"):
        position_layout(212)


def test_leading_rows_stay_and_new_ones_are_zero() -> None:
    table = torch.rand(1, 2 + 4, 3)
    assert torch.equal(resize_positions(table, 2, (2, 2), 1, (2, 2)), table[:, [0, 2, 3, 4, 5]])
    assert torch.equal(resize_positions(table[:, 2:], 0, (2, 2), 1, (2, 2))[:, 0], torch.zeros(1, 3))
