"""How many values of a row come before each of its matches: by buckets, then pair by pair where that leaves it open.

b queries in a block, G columns of values, T most matches of one query, P pairs.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

ROWS, PAIRS = 128, 4096  # looked at and decided at once
FEW = 1 / 16  # share of near values below which they are picked out
BUCKETS = 2048

Measure = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # rows, columns (P,) -> fp64 distances, their bound (P,)


class Matches(NamedTuple):
    """The matches of a block of queries, nearest first, padded to T."""

    distances: Tensor  # (b, T) fp64, padding inf
    indices: Tensor  # (b, T) in the gallery
    counts: Tensor  # (b,)


class Counter:
    """Counts in a few passes over the values, whatever T.

    A row's range from its first match to its last is cut into buckets; rounded as it is, x -> bucket(x) is monotone, so
    what lies in different buckets has the order of the buckets. Values are held in their buckets, but for the buckets
    that the band around a match reaches into: those are compared one by one, and measured anew if inside the band.
    """

    def __init__(self, matches: Matches, centre: Tensor, bound: Tensor | float, dtype: torch.dtype) -> None:
        """A value below centre - bound (b, T) comes before the match, one above centre + bound after it; ascending."""
        self.matches, padding = matches, matches.distances.isinf()
        self.lower, self.upper = ((centre + side).masked_fill(padding, torch.inf).to(dtype) for side in (-bound, bound))
        self.looked_at = torch.zeros_like(matches.indices)  # (b, T): of those measured, how many come before a match
        self.ahead_of = matches.indices.new_zeros(len(padding), padding.shape[1] + 1)  # and of the others, by the first
        self.last = self.upper.masked_fill(padding, -torch.inf).amax(1, keepdim=True)
        self.first = self.lower[:, :1].masked_fill(padding[:, :1], 0).to(torch.promote_types(dtype, torch.float32))
        span = (self.last - self.first).clamp(1e-30, torch.finfo(self.first.dtype).max)
        self.per_unit = (BUCKETS - 3) / span
        self.place, real = self._bucket(self.lower), (~padding).int()
        edges = real.new_zeros(len(real), BUCKETS + 1).scatter_add_(1, self.place, real)
        edges.scatter_add_(1, self._bucket(self.upper) + 1, -real)
        self.reached = edges.cumsum(1)[:, :BUCKETS] > 0  # (b, BUCKETS)
        self.held = real.new_zeros(len(real), BUCKETS)

    def _bucket(self, values: Tensor, rows: slice = slice(None)) -> Tensor:
        place = (values - self.first[rows]).mul_(self.per_unit[rows]).add_(1)  # 0: before all, BUCKETS - 1: after all
        return place.clamp_(0, BUCKETS - 1).long()

    def add(self, values: Tensor, measures: Sequence[Measure], first_column: int = 0) -> int:
        """Values (b, w) of consecutive columns; how many had to be measured."""
        asked = 0
        for start in range(0, len(values), ROWS):
            own = slice(start, start + ROWS)
            value = values[own]
            single = value <= self.last[own]  # the others come after every match
            if single.count_nonzero() > FEW * single.numel():  # not as for a trained model
                place = self._bucket(value, own)
                self.held[own].scatter_add_(1, place, self.held.new_ones(1, 1).expand_as(place))
                single = self.reached[own].gather(1, place)
            r, c = single.nonzero(as_tuple=True)
            for rows, columns in zip((r + start).split(PAIRS), c.split(PAIRS)):
                asked += self._look_at(values, rows, columns, measures, first_column)
        return asked

    def _look_at(
        self, values: Tensor, rows: Tensor, columns: Tensor, measures: Sequence[Measure], first_column: int
    ) -> int:
        """Decide the pairs (P,) by their values, then by one measure after the other; the last one is exact."""
        value, width = values[rows, columns, None], self.lower.shape[1]
        after = torch.searchsorted(self.upper[rows], value)  # (P, 1): so many matches it comes after, surely
        before = torch.searchsorted(self.lower[rows], value, right=True)  # surely before this one and all behind it
        at = rows * (width + 1) + before[:, 0]
        self.ahead_of.view(-1).index_add_(0, at, torch.ones_like(at))
        some = (after < before).nonzero()[:, 0]
        match = torch.arange(width, device=rows.device)
        is_open = (match >= after[some]) & (match < before[some])  # (P, T)
        rows, columns = rows[some], columns[some] + first_column
        asked = len(rows)
        for measure in measures if asked else ():
            distance, bound = (t[:, None] for t in measure(rows, columns))
            threshold = self.matches.distances[rows]
            before = distance < threshold - bound
            if measure is measures[-1]:
                before |= (distance == threshold) & (columns[:, None] < self.matches.indices[rows])
            self.looked_at.index_add_(0, rows, (before & is_open).long())
            is_open = is_open & (threshold - bound <= distance) & (distance <= threshold + bound)
            some = is_open.any(1)
            rows, columns, is_open = rows[some], columns[some], is_open[some]
            if not len(rows):
                break
        return asked

    def tally(self) -> Tensor:
        """How many of all values come before each match (b, T)."""
        held = self.held.masked_fill(self.reached, 0).cumsum(1).gather(1, self.place)
        return self.looked_at + self.ahead_of.cumsum(1)[:, :-1] + held
