"""Reading again a file that failed during the run, then replacing it by another image of the same person."""

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fusionreid.dataloading.bad_images import BadImages, replacement_candidates
from fusionreid.dataloading.records import DataError, Record

WAITS_S = (0.1, 0.5, 2.0)  # before a file is read again: a disk across a network may come back


class FallbackReader:
    """Reads files one by one in the main process, for batches with a file that the decoder could not read.

    A file that turned bad is remembered, so that it costs its waits, 2.6 s, once.
    """

    def __init__(
        self, records: Sequence[Record], decode: Callable[[str], Tensor], bad_images: BadImages | None = None
    ) -> None:
        """Take the rule for training images as `bad_images`; without it no image may replace another."""
        self.records, self.decode, self.bad_images = records, decode, bad_images
        self.replacements: dict[int, int] = {}  # position of a record whose file turned bad -> of its replacement

    def __call__(self, positions: Sequence[int]) -> Tensor:
        """Return (B, H, W, 3) uint8. DataError: an image cannot be read and none may replace it."""
        return torch.stack([self._read(int(position)) for position in positions])

    def _read(self, position: int) -> Tensor:
        if position not in self.replacements:
            try:
                return self._read_with_retries(self.records[position].path)
            except DataError as error:
                if self.bad_images is None:
                    raise
                self.replacements[position] = self._replacement(position, self.bad_images, error.__cause__ or error)
        return self._read(self.replacements[position])

    def _read_with_retries(self, path: str) -> Tensor:
        for wait_s in WAITS_S:
            try:
                return self.decode(path)
            except DataError:
                time.sleep(wait_s)
        return self.decode(path)

    def _replacement(self, position: int, bad_images: BadImages, error: BaseException) -> int:
        others = replacement_candidates(self.records, position) if bad_images.on_bad == "skip" else []
        other = next((i for i in others if i not in self.replacements and self._can_be_read(i)), None)
        bad_images.report_late(self.records[position], error, None if other is None else self.records[other])
        assert other is not None  # else that was an error
        return other

    def _can_be_read(self, position: int) -> bool:
        try:
            self.decode(self.records[position].path)
        except DataError:
            return False
        return True
