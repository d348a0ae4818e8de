"""A file that cannot be read during the run: tried again, then replaced by another image of the same person."""

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fusionreid.dataloading.bad_images import BadImages, candidates
from fusionreid.dataloading.records import DataError, Record

WAITS_S = (0.1, 0.5, 2.0)  # before a file is read again: a disk across a network may come back


class Reader:
    """Files one by one, in the main process: what a batch falls back on when one of its files cannot be read.

    What turned bad is remembered, so that a file costs its waits, 2.6 s, once.
    """

    def __init__(
        self, records: Sequence[Record], decode: Callable[[str], Tensor], bad_images: BadImages | None = None
    ) -> None:
        """`bad_images` is the rule for training images; without it nothing may stand in for another."""
        self.records, self.decode, self.bad_images = records, decode, bad_images
        self.instead: dict[int, int] = {}  # position of a record whose file turned bad -> of the one that stands in

    def __call__(self, positions: Sequence[int]) -> Tensor:
        """(B, H, W, 3) uint8; DataError where an image cannot be read and none may stand in."""
        return torch.stack([self._read(int(position)) for position in positions])

    def _read(self, position: int) -> Tensor:
        if position not in self.instead:
            try:
                return self._patiently(self.records[position].path)
            except DataError as error:
                if self.bad_images is None:
                    raise
                self.instead[position] = self._stand_in(position, self.bad_images, error.__cause__ or error)
        return self._read(self.instead[position])

    def _patiently(self, path: str) -> Tensor:
        for wait_s in WAITS_S:
            try:
                return self.decode(path)
            except DataError:
                time.sleep(wait_s)
        return self.decode(path)

    def _stand_in(self, position: int, bad_images: BadImages, error: BaseException) -> int:
        others = candidates(self.records, position) if bad_images.on_bad == "skip" else []
        other = next((i for i in others if i not in self.instead and self._can_be_read(i)), None)
        bad_images.late(self.records[position], error, None if other is None else self.records[other])
        assert other is not None  # else that was an error
        return other

    def _can_be_read(self, position: int) -> bool:
        try:
            self.decode(self.records[position].path)
        except DataError:
            return False
        return True
