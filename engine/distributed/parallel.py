"""Processes and shards: how a run starts, how a model is spread over ranks, and what crosses between them."""

import logging
import math
import os
import platform
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from fusionreid.engine.config import ParallelConfig
from fusionreid.engine.distributed import peers
from fusionreid.engine.distributed.compile import blocks, compile_model, compile_parts
from fusionreid.engine.distributed.global_batch import all_gather, synchronise_norms
from fusionreid.errors import ReIDError

T = TypeVar("T")
Model = TypeVar("Model", bound=nn.Module)
log = logging.getLogger(__name__)
UNCOMPILED = ParallelConfig(COMPILE="off")
LAUNCHED = "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"  # beside WORLD_SIZE, what torchrun tells a process
TIMEOUT = timedelta(minutes=10)  # of one collective; a wait that may be longer is a `peers.meet`


class DeviceError(ReIDError, ValueError):
    """The configuration asks for a device that is not there."""


class MeetingError(ReIDError, RuntimeError):
    """The address where the processes of a run meet cannot be used or is not reached."""


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, and which of them this one is."""

    rank: int
    world_size: int
    device: torch.device
    mesh: DeviceMesh

    @property
    def main(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def first(self, work: Callable[[], T]) -> T:
        """Do the work on rank 0, however long it takes, then on the others, which find on disk what it left there."""
        result = work() if self.main else None
        peers.meet()
        return work() if result is None else result


def start(device_type: str, *, required: bool = False) -> Ranks:
    """Join the processes that torchrun started, or be the only one.

    `device_type` is cuda or cpu; without a GPU, cuda means cpu and says so, or is an error if it is `required`.
    """
    world_size, local_rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    if device_type == "cuda" and not torch.cuda.is_available():
        if required:
            raise DeviceError("MODEL.DEVICE is cuda and torch finds no GPU: check the driver, or set MODEL.DEVICE cpu")
        log.warning("torch finds no GPU: computing on the CPU")
        device_type = "cpu"
    if device_type == "cuda" and local_rank >= (count := torch.cuda.device_count()):
        raise DeviceError(f"torch finds {count} GPUs here, for process {local_rank + 1} there is none: "
                          f"start torchrun with --nproc-per-node {count}")  # fmt: skip
    device = torch.device(device_type, local_rank) if device_type == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True  # shapes are few and stay
    if "WORLD_SIZE" in os.environ and (missing := [name for name in LAUNCHED if name not in os.environ]):
        raise DeviceError(f"WORLD_SIZE is set and {', '.join(missing)} not: start with torchrun, or unset WORLD_SIZE")
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        if "WORLD_SIZE" in os.environ:
            store, rank, _ = _meet()
            # A restarted run must not find the addresses of its dead predecessors, which torchrun's store keeps.
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
            dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=TIMEOUT)
            peers.start(store, rank, world_size)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return Ranks(dist.get_rank(), world_size, device, init_device_mesh(device.type, (world_size,)))


def _meet() -> tuple[dist.Store, int, int]:
    try:
        return next(dist.rendezvous("env://", timeout=TIMEOUT))
    except dist.DistNetworkError as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise MeetingError(f"the processes of this run cannot meet at {place}: {error}; set another MASTER_PORT, or "
                           "start torchrun with --standalone where all are on one host") from error  # fmt: skip


def finish() -> None:
    """Wait for all processes, then destroy the process group."""
    peers.meet()
    peers.stop()
    if dist.get_world_size() > 1:
        dist.barrier()  # an orphan has not met the others
    dist.destroy_process_group()


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Where activations are computed in bf16 or fp16; weights, norms' statistics and losses stay fp32.

    bf16 becomes fp32 on a CPU that would have to imitate it, which is slower and less exact.
    """
    enabled = precision == "fp16" or (precision == "bf16" and (device.type != "cpu" or cpu_has_bf16()))
    return torch.autocast(device.type, dtype=DTYPES[precision], enabled=enabled)


@cache
def cpu_has_bf16() -> bool:
    """Instructions for it, not only software; says so once if not."""
    has = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if has and platform.machine().lower() in ("x86_64", "amd64"):  # there it means AVX-512 of any kind
        has = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if not has:
        log.warning("this CPU has no bf16 instructions: SOLVER.PRECISION bf16 computes in fp32 here")
    return has


def is_exact(cfg: ParallelConfig, ranks: Ranks) -> bool:
    """Whether batch norm and mining span all processes: PARALLEL.EXACT auto or yes, and more than one process."""
    return cfg.EXACT is not False and ranks.world_size > 1


def shard(model: Model, ranks: Ranks, cfg: ParallelConfig = UNCOMPILED) -> Model:
    """Apply what PARALLEL asks for, in the one order that works: batch norms, checkpointing, compile, FSDP2.

    One process is not wrapped: FSDP2 would copy every parameter and gradient in each step. Parameters stay gathered
    between forward and backward: a model of this size fits, and one gather is saved. A mesh of two dimensions, where
    SHARD is not all processes, is HSDP.
    """
    if is_exact(cfg, ranks):
        synchronise_norms(model)
    if ranks.world_size == 1 and ranks.device.type == "cuda":
        model.to(memory_format=torch.channels_last)
    compile_parts(model, cfg, ranks.device)
    if ranks.world_size == 1:
        _check_share(ranks, cfg.SHARD)
        return model
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # nothing writes into an output
    mesh = _mesh(ranks, cfg.SHARD)
    for part in (*(blocks(model) if cfg.COMPILE != "whole" else ()), model):  # a whole graph has no place for gathers
        fully_shard(part, mesh=mesh, reshard_after_forward=False)
    return model


def replicate(model: Model, ranks: Ranks, cfg: ParallelConfig) -> Model:
    """The model for inference: a whole copy on every rank's device, compiled as PARALLEL.COMPILE says."""
    model.to(ranks.device)
    compile_model(model, cfg.COMPILE, ranks.device)
    return model


def _mesh(ranks: Ranks, share: int) -> DeviceMesh:
    """Processes that share one copy of the weights, in one or more such groups."""
    share = share or _processes_per_node(ranks.world_size)
    if share == ranks.world_size:
        return ranks.mesh
    _check_share(ranks, share)
    shape = ranks.world_size // share, share
    return init_device_mesh(ranks.device.type, shape, mesh_dim_names=("replicate", "shard"))


def _check_share(ranks: Ranks, share: int) -> None:
    if share and ranks.world_size % share:
        raise DeviceError(f"PARALLEL.SHARD must divide the {ranks.world_size} processes, got {share}")


def _processes_per_node(world_size: int) -> int:
    """Number of processes on each host as torchrun started them; all processes where hosts differ in it."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    numbers = gather_rows(torch.tensor([local]))
    return local if (numbers == local).all() and world_size % local == 0 else world_size


def local_shard(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor; a tensor that is not sharded as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shards_of(tensor: Tensor) -> int:
    """Into how many parts a tensor is cut; 1 if it is not sharded."""
    if not isinstance(tensor, DTensor):
        return 1
    sizes = zip(tensor.device_mesh.shape, tensor.placements, strict=True)
    return math.prod(size for size, placement in sizes if placement.is_shard())


def full_tensor(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """Gather a sharded tensor on the CPU; `like` lends its sharding to a plain local shard. All ranks call it."""
    return gather(tensor, like).cpu()


def gather(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """Gather a sharded tensor on the device, as `full_tensor` does on the CPU."""
    if isinstance(like, DTensor) and not isinstance(tensor, DTensor) and tensor.ndim == like.ndim and tensor.ndim > 0:
        tensor = DTensor.from_local(tensor, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def shard_like(full: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a whole CPU tensor, sharded as `like` is."""
    full = full.to(like.device)
    if isinstance(like, DTensor) and full.ndim == like.ndim:
        return distribute_tensor(full, like.device_mesh, like.placements).to_local()
    return full


def all_reduce_mean(tensor: Tensor) -> Tensor:
    """Mean over ranks, in place."""
    if dist.get_world_size() > 1:
        dist.all_reduce(tensor)
        tensor.div_(dist.get_world_size())
    return tensor


def all_reduce_max(tensor: Tensor) -> Tensor:
    """Maximum over ranks, in place."""
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor


def gather_rows(rows: Tensor) -> Tensor:
    """The rows (n, ...) of all ranks, one rank's below the other's, on every rank and on the device of the rows.

    Ranks may have different numbers of rows. Equal numbers need no memory but the rows and the result.
    """
    world_size = dist.get_world_size()
    if world_size == 1:
        return rows
    counts = torch.empty(world_size, dtype=torch.int64)
    all_gather(counts, torch.tensor([len(rows)]))
    numbers = counts.tolist()
    most = max(numbers)
    if len(rows) < most:
        rows = torch.cat([rows, rows.new_zeros(most - len(rows), *rows.shape[1:])])
    whole = rows.new_empty(world_size * most, *rows.shape[1:])
    if whole.numel():
        all_gather(whole, rows.contiguous())
    if min(numbers) == most:
        return whole
    return torch.cat([part[:number] for part, number in zip(whole.split(most), numbers)])


def all_agree(condition: bool) -> bool:
    """Whether the condition holds on every rank; the answer is the same on all."""
    return bool(gather_rows(torch.tensor([condition], dtype=torch.uint8)).all())


def fits_on_device(num_bytes: int, ranks: Ranks) -> bool:
    """Whether every rank computes on a GPU with room for so much more; the answer is the same on all ranks."""
    return all_agree(ranks.device.type == "cuda" and num_bytes <= free_memory(ranks.device))


def free_memory(device: torch.device) -> int:
    """Bytes of a GPU that nobody uses, those included that torch holds ready."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


@torch.no_grad()
def equalise_statistics(model: nn.Module) -> None:
    """Batch-norm running statistics become their mean over ranks."""
    equalise([buffer for buffer in model.buffers() if buffer.is_floating_point()])


@torch.no_grad()
def equalise(tensors: Sequence[Tensor]) -> None:
    """Each becomes its mean over ranks, in place: one flat reduction."""
    if dist.get_world_size() == 1 or not tensors:
        return
    flat = all_reduce_mean(torch.cat([t.flatten() for t in tensors]))
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def reshard(model: nn.Module) -> None:
    """Let go of the gathered weights: no backward pass has done so after an evaluation, and they may be old by then."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
