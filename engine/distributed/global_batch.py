"""Global batch: batch-norm statistics and the loss of the whole batch, so that N processes compute what one computes.

Every rank computes the same loss of the whole batch; a gather hands each rank the sum of all ranks' gradients of its
own rows, N times the true one, and the mean of the parameters' gradients over the ranks takes the N away.
"""

from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fusionreid.errors import ReIDError

all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.14
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, BatchNormAct2d)


class NormError(ReIDError, ValueError):
    """A model has a batch norm of a kind that cannot be synchronised."""


class MiningError(ReIDError, ValueError):
    """A process would mine triplets in a batch with a single person."""


def check_mining(batch_size: int, instances: int, world_size: int) -> None:
    """Raise MiningError if a process alone cannot form triplets of its part of the batch: that takes two persons."""
    share = batch_size // instances // world_size
    if share < 2:
        persons = batch_size // instances
        raise MiningError(
            "PARALLEL.EXACT no: each process mines triplets among its own persons and needs 2 or more, but a batch of "
            f"SOLVER.IMS_PER_BATCH {batch_size} = {persons} persons x {instances} images on {world_size} processes "
            f"leaves {share}; set PARALLEL.EXACT auto to mine over all processes, or SOLVER.IMS_PER_BATCH to at least "
            f"{2 * instances * world_size}"
        )


@torch.library.custom_op("fusionreid::gather_ranks", mutates_args=())
def gather_ranks(rows: Tensor) -> Tensor:
    """Equally many rows (n, ...) of every rank -> (ranks * n, ...), on every rank, with gradient."""
    whole = rows.new_empty(dist.get_world_size() * len(rows), *rows.shape[1:])
    all_gather(whole, rows.contiguous())
    return whole


@torch.library.custom_op("fusionreid::sum_own_rows", mutates_args=())
def sum_own_rows(whole: Tensor) -> Tensor:
    """The sum over ranks of (ranks * n, ...), of which each rank gets its n rows."""
    rows = whole.new_empty(len(whole) // dist.get_world_size(), *whole.shape[1:])
    reduce_scatter(rows, whole.contiguous())
    return rows


@gather_ranks.register_fake
def _(rows: Tensor) -> Tensor:
    return rows.new_empty(dist.get_world_size() * len(rows), *rows.shape[1:])


@sum_own_rows.register_fake
def _(whole: Tensor) -> Tensor:
    return whole.new_empty(len(whole) // dist.get_world_size(), *whole.shape[1:])


gather_ranks.register_autograd(lambda _, gradient: sum_own_rows(gradient))


def synchronise_norms(model: nn.Module) -> None:
    """From now on the model's batch norms normalise, in training, by the statistics of all ranks' images."""
    for name, norm in model.named_modules():
        if isinstance(norm, _BatchNorm):
            if type(norm) not in NORMS or norm.momentum is None:
                kind = type(norm).__name__
                raise NormError(f"PARALLEL.EXACT: cannot synchronise {name}, a {kind}: set PARALLEL.EXACT no")
            norm.forward = partial(_synchronised, norm)


def _synchronised(norm: _BatchNorm, x: Tensor) -> Tensor:
    """x is (B, C, ...); statistics in float32 at least."""
    if not norm.training:
        y = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps)
    else:
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        variance, mean = torch.var_mean(exact, [0, *range(2, x.ndim)], correction=0)
        means, variances = gather_ranks(torch.stack([mean, variance])[None]).unbind(1)  # (ranks, C)
        mean = means.mean(0)
        variance = (variances + (means - mean).square()).mean(0)
        if norm.track_running_stats:
            _follow(norm, mean.detach(), variance.detach(), len(means) * x.numel() // x.shape[1])
        scale = torch.rsqrt(variance + norm.eps)
        if norm.weight is not None:
            scale = scale * norm.weight
        shift = -mean * scale if norm.bias is None else norm.bias - mean * scale
        shape = (-1, *[1] * (x.ndim - 2))
        y = (exact * scale.view(shape) + shift.view(shape)).to(x.dtype)
    return norm.act(norm.drop(y)) if isinstance(norm, BatchNormAct2d) else y


def _follow(norm: _BatchNorm, mean: Tensor, variance: Tensor, count: int) -> None:
    """The running statistics, as torch keeps them: of the variance the unbiased one."""
    norm.num_batches_tracked.add_(1)
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), norm.momentum)
    norm.running_var.lerp_((variance * (count / max(count - 1, 1))).to(norm.running_var.dtype), norm.momentum)
