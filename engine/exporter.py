"""Export to ONNX or torch.export: pixels and cameras in, test vectors out; checked against the model on three batches.

    images (B, H, W, 3) uint8, cameras (B,) int64 -> test vectors (B, D) fp32

B images, any number of them; cameras are asked for only where the model has an embedding of them; D width.
"""

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from warnings import catch_warnings, filterwarnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusionreid import FusionReID
from fusionreid.dataloading import DataError, Split, read_split
from fusionreid.engine.checkpoints.load_model import Trained, find_checkpoint, restore
from fusionreid.engine.config import Config
from fusionreid.engine.evaluation.cameras import number_as_trained
from fusionreid.engine.evaluation.extract import feature_vectors
from fusionreid.engine.reduced_precision import Program, measure, reduce_precision, sample
from fusionreid.errors import ReIDError
from fusionreid.files import write_json
from fusionreid.kernels.augmentation import normalize

ONNX_PACKAGES = "onnx", "onnxscript", "onnxruntime"
NAMES = ["images", "cameras"]
METADATA = "fusionreid"  # the entry of the file that says what it is, as JSON
MEASURES = "mAP", "Rank-1"
BATCHES = 1, 2, 5  # images of each check; what is traced has two
ALLOWED = 1e-4  # error of a vector, relative to its length: a deep model in fp32 is off by some 1e-6


class ExportError(ReIDError, ValueError):
    """The exported file cannot be written."""


class DifferentError(ReIDError, ArithmeticError):
    """The exported program does not compute what the model does; nothing was written."""

    exit_code = 1


class FromPixels(nn.Module):
    """The model with normalisation in front of it."""

    def __init__(self, model: FusionReID, cfg: Config) -> None:
        super().__init__()
        self.model, self.test = model, cfg.TEST
        for name, values in (("mean", cfg.INPUT.PIXEL_MEAN), ("std", cfg.INPUT.PIXEL_STD)):
            self.register_buffer(name, torch.tensor(values))

    def forward(self, images: Tensor, cameras: Tensor | None = None) -> Tensor:
        """Vectors (B, D) of images (B, H, W, 3), uint8."""
        pixels = (images.float() / 255 - self.mean) / self.std
        return feature_vectors(self.model, pixels.permute(0, 3, 1, 2), cameras, test=self.test)


def export_model(cfg: Config, output: Path, precision: str = "fp32") -> None:
    """Write the model of the configuration to `output`, and beside it, as .json, what it is and how it was checked.

    The file itself tells the same. In fp16 or int8 its loss of accuracy is measured on the test set.
    """
    folder = _check_output(output, precision)
    write, read = FORMATS[output.suffix]
    checkpoint = find_checkpoint(cfg)
    trained = restore(checkpoint, cfg)
    split = _split_for(cfg, trained) if precision != "fp32" else None
    model = trained.model.eval()
    embeds_cameras = model.transformer is not None and model.transformer.sie_embed is not None
    cameras = (-1, *trained.cameras) if embeds_cameras else ()
    names = dict(zip(trained.camera_names, trained.cameras)) if embeds_cameras else {}
    about = {**describe(cfg, names), "precision": precision, "checkpoint": str(checkpoint), "versions": _versions()}
    with TemporaryDirectory(dir=folder, prefix=f".{output.name}.") as aside, torch.no_grad():
        draft = Path(aside) / output.name
        write(FromPixels(model, cfg).eval(), examples(2, cfg, cameras), draft, about)
        error = largest_error(read(draft), model, cfg, cameras)
        about["check"] = {"batches": BATCHES, "error of a vector, relative to its length": error, "allowed": ALLOWED}
        if split is not None:
            whole, draft = draft, draft.with_name(f"{precision}.onnx")
            reduce_precision(whole, draft, precision, cfg, split, cameras)
            about["accuracy"] = measure(read(whole), read(draft), cfg, split, cameras)
        if output.suffix == ".onnx":
            _set_metadata(draft, about)
        with open(draft, "rb") as file:
            digest = hashlib.file_digest(file, "blake2b").hexdigest()
        os.replace(draft, output)
    write_json(output.with_name(f"{output.name}.json"), {**about, "blake2b": digest})
    size = f"{output}: {output.stat().st_size / 2**20:.0f} MiB"
    if split is None:
        print(f"{size}, vectors off by {error:.1e} of their length at most")
    else:
        print(f"{size}, {precision}; {_told(about['accuracy'])}")


def describe(cfg: Config, cameras: Mapping[str, int]) -> dict[str, Any]:
    """Say what goes in and what comes out, for the file itself and for the JSON beside it."""
    known = {"shape": ["B"], "dtype": "int64", "known": dict(cameras), "unknown": -1}
    return {
        "images": {"shape": ["B", *cfg.INPUT.SIZE_TEST, 3], "dtype": "uint8", "colours": "RGB",
                   "resized": "bilinear, antialiased"},
        "normalisation": {"mean": cfg.INPUT.PIXEL_MEAN, "std": cfg.INPUT.PIXEL_STD, "inside": True},
        "cameras": known if cameras else None,
        "result": {"dtype": "float32", "TEST": cfg.TEST.model_dump(mode="json")},
    }  # fmt: skip


def _check_output(output: Path, precision: str) -> Path:
    if output.suffix not in FORMATS:
        raise ExportError(f"--output must end in {' or '.join(FORMATS)}, got {output}")
    if precision != "fp32" and output.suffix != ".onnx":
        raise ExportError(f"--precision {precision} is for .onnx, got --output {output}")
    if not (folder := output.absolute().parent).is_dir():
        raise ExportError(f"--output {output}: there is no folder {folder}")
    if output.is_dir() or not os.access(folder, os.W_OK):
        raise ExportError(f"--output {output} is a folder or in one that cannot be written: name another file")
    return folder


def _split_for(cfg: Config, trained: Trained) -> Split:
    """Return the images to calibrate with and to measure on, cameras numbered as in training."""
    try:
        return sample(number_as_trained(read_split(cfg.DATASETS), trained.cameras, trained.camera_names))
    except DataError as error:
        raise ExportError(
            f"--precision measures what it costs on the data set of the configuration: {error}"
        ) from error


def _told(accuracy: Mapping[str, Any]) -> str:
    texts = [f"{name} {100 * accuracy[name]['fp32']:.1f} -> {100 * accuracy[name]['here']:.1f} %" for name in MEASURES]
    where = f"{accuracy['queries']:,} queries in {accuracy['gallery']:,} images"
    return f"{', '.join(texts)} by {where}, median cosine to fp32 {accuracy['cosine to fp32']['median']:.4f}"


def examples(count: int, cfg: Config, cameras: Sequence[int]) -> tuple[Tensor, ...]:
    """Make images, smooth as photographs are, with some noise; and cameras, if there are any to choose from."""
    generator = torch.Generator().manual_seed(count)
    coarse = torch.rand(count, 3, 8, 4, generator=generator)
    smooth = F.interpolate(coarse, cfg.INPUT.SIZE_TEST, mode="bicubic")
    pixels = (smooth + 0.05 * torch.randn(smooth.shape, generator=generator)).clamp(0, 1).mul(255).byte()
    images = pixels.permute(0, 2, 3, 1).contiguous()
    return (images, torch.tensor([cameras[i % len(cameras)] for i in range(count)])) if cameras else (images,)


def largest_error(program: Program, model: FusionReID, cfg: Config, cameras: Sequence[int]) -> float:
    """Largest error of a vector, relative to its length, against evaluation's; DifferentError above ALLOWED."""
    errors = []
    for count in BATCHES:
        images, *ids = examples(count, cfg, cameras)
        pixels = normalize(images, cfg.INPUT.PIXEL_MEAN, cfg.INPUT.PIXEL_STD)
        expected = feature_vectors(model, pixels, ids[0] if ids else None, test=cfg.TEST)
        difference = (program(images, *ids) - expected).norm(dim=1) / expected.norm(dim=1)
        errors.append(difference.max().item())
        if not errors[-1] <= ALLOWED:
            raise DifferentError(
                f"the program's vectors of a batch of {count} are off by {errors[-1]:.1e} of their length, "
                f"{ALLOWED:.0e} is allowed. Nothing was written: try the other format, or other versions; "
                f"here are {_versions()}"
            )
    return max(errors)


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("torch", *ONNX_PACKAGES) if find_spec(name)}


def _any_batch(inputs: tuple[Tensor, ...]) -> dict[str, Any]:
    batch = torch.export.Dim("batch", min=1)
    return {"dynamic_shapes": tuple({0: batch} for _ in inputs)}


def _write_torch(module: nn.Module, inputs: tuple[Tensor, ...], path: Path, about: Mapping[str, Any]) -> None:
    program = torch.export.export(module, inputs, **_any_batch(inputs))
    torch.export.save(program, path, extra_files={f"{METADATA}.json": json.dumps(about)})


def _read_torch(path: Path) -> Program:
    program: Program = torch.export.load(path).module()
    return program


def _set_metadata(path: Path, about: Mapping[str, Any]) -> None:
    import onnx

    model = onnx.load(path)
    onnx.helper.set_model_props(model, {METADATA: json.dumps(about)})
    onnx.save(model, path)


def _write_onnx(module: nn.Module, inputs: tuple[Tensor, ...], path: Path, _about: Mapping[str, Any]) -> None:
    """Write the program; `_set_metadata` adds what it is, once it is checked."""
    if missing := [name for name in ONNX_PACKAGES if not find_spec(name)]:
        raise ExportError(f"--output {path.name}: {', '.join(missing)} not installed: pip install 'fusionreid[export]'")
    names = {"input_names": NAMES[: len(inputs)], "output_names": ["vectors"]}
    with catch_warnings():
        filterwarnings("ignore", "# The axis name: batch will not be used")  # once for all inputs is enough
        program = torch.onnx.export(module, inputs, dynamo=True, verbose=False, **names, **_any_batch(inputs))
    program.save(path)


def _read_onnx(path: Path) -> Program:
    from onnxruntime import InferenceSession

    session = InferenceSession(path, providers=["CPUExecutionProvider"])

    def program(*inputs: Tensor) -> Tensor:
        (vectors,) = session.run(None, {name: given.numpy() for name, given in zip(NAMES, inputs)})
        return torch.from_numpy(vectors)

    return program


FORMATS = {".onnx": (_write_onnx, _read_onnx), ".pt2": (_write_torch, _read_torch)}
