"""Exponential moving average of weights and statistics:  average <- decay average + (1 - decay) weights, every step.

Source: Polyak and Juditsky, Acceleration of Stochastic Approximation by Averaging, 1992, with forgetting.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fusionreid.engine.distributed.parallel import equalise, full_tensor, local_shard, shard_like


class EMA:
    """Exponential moving average of every floating entry of a model's state, as local shards on its device."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.entries = {name: t.detach() for name, t in model.state_dict().items() if t.is_floating_point()}
        self._own = [local_shard(t) for t in self.entries.values()]
        self._average = [t.clone() for t in self._own]

    def update(self) -> None:
        """Follow the model by one step."""
        torch._foreach_lerp_(self._average, self._own, 1 - self.decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Context manager: swap in the average as the model's weights. All ranks call it."""
        self._equalise()
        own = [t.clone() for t in self._own]
        torch._foreach_copy_(self._own, self._average)
        try:
            yield
        finally:
            torch._foreach_copy_(self._own, own)

    def state(self) -> dict[str, Tensor]:
        """The whole average on the CPU, by entry. All ranks call it."""
        return {name: full_tensor(t, like=like) for name, t, like in self.shards()}

    def shards(self) -> list[tuple[str, Tensor, Tensor]]:
        """Entry, local shard of its average, and the model's tensor that is sharded likewise. All ranks call it."""
        self._equalise()
        return [(name, t, like) for (name, like), t in zip(self.entries.items(), self._average)]

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` returned."""
        for (name, like), average in zip(self.entries.items(), self._average):
            average.copy_(shard_like(state[name], like))

    def _equalise(self) -> None:
        """Average over ranks what is not sharded: batch-norm statistics are those of each rank's own images."""
        equalise([own for own, like in zip(self._average, self.entries.values()) if not isinstance(like, DTensor)])
