"""Features that are NaN or infinite are named and never scored."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fusionreid.dataloading.records import Record
from fusionreid.errors import ReIDError

ROWS_AT_ONCE = 4096  # looked at, or written


class NonFiniteError(ReIDError, ArithmeticError):
    """A loss or a feature is NaN or infinite; nothing was updated or scored with it."""

    exit_code = 5


def check_finite(features: Tensor, records: Sequence[Record]) -> None:
    """Raise NonFiniteError, which names the images, if features (N, D) are not finite."""
    fine = torch.cat([rows.isfinite().all(1) for rows in features.split(ROWS_AT_ONCE)])
    refuse_non_finite(fine.tolist(), records)


def refuse_non_finite(fine: Sequence[bool], records: Sequence[Record]) -> None:
    """Raise NonFiniteError, which names the images, unless each of them is fine."""
    bad = [record.path for record, is_fine in zip(records, fine, strict=True) if not is_fine]
    if bad:
        raise NonFiniteError(
            f"features of {len(bad)} of {len(records)} images are not finite, the first: {bad[:5]}; nothing was "
            "scored: look at these images, or evaluate with SOLVER.PRECISION fp32"
        )
