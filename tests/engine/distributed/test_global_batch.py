"""By default one, two, four and eight processes compute the same; so do FSDP2, HSDP and DDP, and a run passed on."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from fusionreid.engine.config import ParallelConfig
from fusionreid.engine.distributed import parallel
from fusionreid.engine.distributed.compile import blocks
from fusionreid.engine.distributed.global_batch import MiningError, NormError, check_mining, synchronise_norms
from tests.numerics import assert_close
from tests.ranks import STEPS, config, launch, train
from tests.runs import arguments, command, finish

LOCAL = {"PARALLEL": {"EXACT": False}}
DDP, HSDP = ({"PARALLEL": {"SHARD": share}, "SOLVER": {"EMA": 0.5}} for share in (1, 2))
PUBLISHED = {"SOLVER": {"IMS_PER_BATCH": 128}, "DATALOADER": {"NUM_INSTANCE": 16}}  # the batch: 8 persons x 16 images
SAVED = 2  # steps after which two processes hand their state to others


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What two processes, then four, made of the same work; float64 unless the name says otherwise."""
    folder = tmp_path_factory.mktemp("exact")
    double = {"dtype": "float64", "sections": {}}
    published = {"dtype": "float64", "sections": PUBLISHED}
    for processes, work in (
        (2, [{"name": "two", **double}, {"name": "two fp32", **double, "dtype": "float32"},
             {"name": "two, DDP", **double, "sections": DDP}, {"name": "two, local", **double, "sections": LOCAL},
             {"name": "published by two", **published},
             {"name": "saved", **double, "steps": [SAVED]}]),
        (4, [{"name": "four", **double}, {"name": "published by four", **published},
             {"name": "four, HSDP", **double, "sections": HSDP, "steps": [SAVED, STEPS], "start": "saved"}]),
    ):  # fmt: skip
        run = launch(processes, work, folder)
        text, _ = run.communicate(timeout=200)
        assert run.returncode == 0, text
    return folder


@pytest.fixture(scope="module")
def one() -> dict[str, Tensor]:
    return train(config(), torch.float64)


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], relative: float) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:  # where the true gradient is zero, what is left is rounding of larger numbers
        error, largest = (ours[name] - theirs[name]).abs().max().item(), theirs[name].abs().max().item()
        assert error <= relative * max(largest, 1e-2), f"{name}: error {error:.2e}, largest value {largest:.2e}"


@pytest.mark.parametrize("name", ["two", "four", "two, DDP"])
def test_more_processes_compute_the_same(folder: Path, one: dict[str, Tensor], name: str) -> None:
    assert_same(load_file(folder / name), one, 1e-9)


def test_without_exact_they_do_not(folder: Path, one: dict[str, Tensor]) -> None:
    with pytest.raises(AssertionError, match="error"):
        assert_same(load_file(folder / "two, local"), one, 1e-3)


def test_in_float32_they_agree_within_its_rounding(folder: Path, one: dict[str, Tensor]) -> None:
    assert_close("losses", load_file(folder / "two fp32")["losses"], one["losses"], 1e-4)


@pytest.fixture(scope="module")
def published() -> Tensor:
    """Losses of one process; in float64, since hard mining makes much of a rounding within three steps."""
    return train(config(**PUBLISHED), torch.float64)["losses"]


@pytest.mark.parametrize("processes", ["two", "four"])
def test_the_published_batch_trains_alike_on_any_number_of_processes(
    folder: Path, published: Tensor, processes: str
) -> None:
    losses = load_file(folder / f"published by {processes}")["losses"]
    assert_close("losses", losses, published, 1e-9)
    assert (losses[:, 6:12] > 0.1).all(), "triplet losses, by step and head"


@pytest.mark.slow
def test_the_published_batch_trains_alike_on_eight_processes_with_a_person_each(
    published: Tensor, tmp_path: Path
) -> None:
    run = launch(8, [{"name": "eight", "dtype": "float64", "sections": PUBLISHED}], tmp_path)
    text, _ = run.communicate(timeout=500)
    assert run.returncode == 0, text
    assert_close("losses", load_file(tmp_path / "eight")["losses"], published, 1e-9)


def test_mining_alone_among_less_than_two_persons_is_refused() -> None:
    with pytest.raises(MiningError, match=r"8 persons x 16 images on 8 processes leaves 1; .* to at least 256"):
        check_mining(128, 16, 8)
    check_mining(128, 16, 4)


@pytest.mark.slow
def test_a_run_that_would_mine_among_one_person_ends_before_its_first_step(tmp_path: Path) -> None:
    keys = {"SOLVER__IMS_PER_BATCH": 8, "PARALLEL__EXACT": "no"}
    code, text = finish(command(*arguments(tmp_path, tmp_path / "out", **keys), processes=2))
    assert code != 0
    assert "2 persons x 4 images on 2 processes leaves 1; set PARALLEL.EXACT auto" in text
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sections", [{}, {"SOLVER": {"ACCUMULATE": 2, "EMA": 0.5, "OPTIMIZER_NAME": "AdamW"}}])
def test_one_process_is_not_wrapped_and_computes_the_same_bits_as_if_it_were(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, sections: dict
) -> None:
    cfg, wrapped = config(**sections), []

    def wrap(model: nn.Module, ranks: parallel.Ranks, _: ParallelConfig) -> nn.Module:
        for part in (*blocks(model), model):
            fully_shard(part, mesh=ranks.mesh, reshard_after_forward=False)
        wrapped.append(model)
        return model

    plain = train(cfg, dtype)
    monkeypatch.setattr(parallel, "shard", wrap)
    theirs = train(cfg, dtype)
    assert wrapped
    assert plain.keys() == theirs.keys()
    assert all(torch.equal(plain[name], theirs[name]) for name in plain)
    monkeypatch.undo()
    model = parallel.shard(nn.Linear(2, 2), parallel.start("cpu"))
    assert not any(isinstance(part, FSDPModule) for part in model.modules())


@pytest.mark.parametrize("processes", ["one", "four"])
def test_what_two_processes_saved_others_take_over(folder: Path, one: dict[str, Tensor], processes: str) -> None:
    if processes == "one":
        saved = load_file(folder / "saved")
        loaded = train(config(), torch.float64, range(0), saved)
        assert all(torch.equal(tensor, saved[name]) for name, tensor in loaded.items())
        ours = train(config(), torch.float64, range(SAVED, STEPS), saved)
    else:
        ours = load_file(folder / "four, HSDP")
    assert_same(ours, one | {name: one[name][SAVED:] for name in ("losses", "gradient_norms")}, 1e-9)


def test_a_norm_of_an_unknown_kind_is_named() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm3d(2))
    with pytest.raises(NormError, match="1, a BatchNorm3d"):
        synchronise_norms(model)


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d, BatchNormAct2d])
@pytest.mark.parametrize("training", [True, False])
def test_a_synchronised_norm_of_one_process_is_the_plain_one(kind: type[nn.Module], training: bool) -> None:
    parallel.start("cpu")
    shape = (6, 5) if kind is nn.BatchNorm1d else (6, 5, 3, 2)
    x, upstream = torch.randn(2, *shape, dtype=torch.float64)
    ours, theirs = (kind(5).double().train(training) for _ in range(2))
    results = []
    for norm in (ours, theirs):
        nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(1))
        leaf = x.clone().requires_grad_()
        if norm is ours:
            synchronise_norms(norm)
        norm(leaf).backward(upstream)
        results.append((leaf.grad, norm.weight.grad, norm.bias.grad, *norm.buffers()))
    for i, (a, b) in enumerate(zip(*results)):
        assert_close(str(i), a, b, 1e-12)
