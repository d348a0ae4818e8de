"""An exported ONNX file in fp16 or int8, and what that costs in accuracy, measured on the test set."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusionreid.dataloading.decode import BILINEAR, decode_batch
from fusionreid.dataloading.records import Record, Split
from fusionreid.engine.config import Config
from fusionreid.engine.evaluation.evaluator import split_ids
from fusionreid.engine.evaluation.retrieval import check_matches, rank

Program = Callable[..., Tensor]
CALIBRATION = 64  # images that tell the ranges of activations
MOST = {"query": 200, "gallery": 2_000}  # images that the loss is measured on
BATCH = 32
LAYERS = ["Conv", "MatMul", "Gemm"]  # what int8 is for


def reduce_precision(
    whole: Path, reduced: Path, precision: str, cfg: Config, split: Split, cameras: Sequence[int]
) -> None:
    """Write the fp32 file `whole` in fp16, or in int8 calibrated on images of the data set."""
    if precision == "fp16":
        import onnx
        from onnxruntime.transformers.float16 import convert_float_to_float16

        onnx.save(convert_float_to_float16(onnx.load(whole), keep_io_types=True), reduced)
        return
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            records = spread(split.train or split.gallery, CALIBRATION)
            self.batches = (
                {name: x.numpy() for name, x in inputs.items()} for inputs in _batches(records, cfg, cameras)
            )

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.batches, None)

    quantize_static(whole, reduced, Reader(), QuantFormat.QDQ, op_types_to_quantize=LAYERS, per_channel=True)


def measure(whole: Program, reduced: Program, cfg: Config, split: Split, cameras: Sequence[int]) -> dict[str, Any]:
    """Measure mAP and Rank-1 of both programs on (part of) the test set, and the cosine of their vectors."""
    batches = [list(inputs.values()) for inputs in _batches([*split.query, *split.gallery], cfg, cameras)]
    vectors = [torch.cat([program(*inputs) for inputs in batches]) for program in (whole, reduced)]
    rankings = [rank(v[: len(split.query)], v[len(split.query) :], *split_ids(split)) for v in vectors]
    cosines = torch.nn.functional.cosine_similarity(*vectors)
    return {
        "queries": rankings[0].num_valid,
        "gallery": len(split.gallery),
        "mAP": {"fp32": rankings[0].mAP, "here": rankings[1].mAP},
        "Rank-1": {"fp32": rankings[0].cmc[0].item(), "here": rankings[1].cmc[0].item()},
        "cosine to fp32": {"median": cosines.median().item(), "least": cosines.min().item()},
    }


def sample(split: Split) -> Split:
    """Take the part of the test set that the loss is measured on: queries, their matches, and others among them."""
    query = spread(split.query, MOST["query"])
    persons = {record.person for record in query}
    matches = spread([record for record in split.gallery if record.person in persons], MOST["gallery"])
    others = [record for record in split.gallery if record.person not in persons]
    gallery = (*matches, *spread(others, MOST["gallery"] - len(matches)))
    taken = replace(split, query=tuple(query), gallery=gallery)
    check_matches(*split_ids(taken))
    return taken


def spread(records: Sequence[Record], most: int) -> Sequence[Record]:
    """Take so many records, evenly spread."""
    if len(records) <= most:
        return records
    return [records[i] for i in np.linspace(0, len(records) - 1, most).round().astype(int)] if most else []


def _batches(records: Sequence[Record], cfg: Config, cameras: Sequence[int]) -> Iterator[dict[str, Tensor]]:
    for start in range(0, len(records), BATCH):
        some = records[start : start + BATCH]
        inputs = {"images": decode_batch([record.path for record in some], cfg.INPUT.SIZE_TEST, BILINEAR)}
        if cameras:
            inputs["cameras"] = torch.tensor([r.camera if r.camera in cameras else -1 for r in some])
        yield inputs
