"""Weight files of any origin to the tensors in them: the format is told by the first bytes, and nothing is executed."""

import argparse
import os
import pickle
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fusionreid.weights.checkpoint_files import verify_around
from fusionreid.weights.pretrained import WeightsError
from fusionreid.weights.torchscript import read_torchscript

NESTS = (  # dictionaries of a training state that hold weights, the better ones first
    *("state_dict_ema", "model_ema", "ema_state_dict", "params_ema", "teacher", "state_dict", "model_state_dict"),
    *("model", "net", "network", "backbone", "encoder", "image_encoder", "module", "params", "weights"),
)
DEPTH = 32  # dictionaries in dictionaries that are looked into
HEAD = 512  # bytes that tell the format
QUOTED = 60  # of them in a message
PICKLE_LIMIT = 1 << 26  # bytes of the pickle in a file of torch.save: it holds names and shapes only
UNPACKED = 4  # times its size on the disk, and SLACK, may be the size of what a file holds
SLACK = 1 << 24
SAVED = "save it again where it was made, with torch.save(model.state_dict(), file) or safetensors"
CUT = "cut short or damaged: download or copy it again"
FOREIGN = {  # first bytes of what else is found under a weight file's name
    b"version https://git-lfs": "a pointer of Git LFS, not the file itself: run git lfs pull, or download the file",
    b"\x1f\x8b": "a gzip archive: unpack it",
    b"\x89HDF": f"an HDF5 file, as Keras writes it: {SAVED}",
    b"\x93NUMPY": f"a single NumPy array: {SAVED}",
    b"7z\xbc\xaf": "a 7z archive: unpack it",
    b"Rar!": "a RAR archive: unpack it",
    b"ONNX": f"an ONNX model: {SAVED}",
}
DAMAGE = (  # what reading a damaged file leads to
    *(SafetensorError, zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError),
    *(LookupError, TypeError, AttributeError, MemoryError, OverflowError, zlib.error, struct.error),
)
NUMPY = ("multiarray.scalar", "multiarray._reconstruct")  # of values such as a best accuracy; they run no code


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Return the named tensors of a weight file, out of whatever dictionaries they are wrapped in.

    Reads safetensors, torch.save in every format, and TorchScript, under any suffix. WeightsError says what else the
    file is, CheckpointError that it is of a checkpoint of ours and not as written. Memory: a small multiple of the
    file's size.
    """
    verify_around(Path(path))
    size, head, tail = _look(path)
    content = _content(Path(path), size, head, tail)
    state = _state(content, set())
    if state is None:
        raise _refusal(path, f"it holds {_described(content)}", "must hold a dictionary of tensors")
    return _checked(path, state, size)


def _look(path: str | Path) -> tuple[int, bytes, bytes]:
    """Read size, first and last bytes of a regular file, without waiting for a FIFO."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        raise WeightsError(f"{path}: no such weight file") from None
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read: {error.strerror}") from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise _refusal(path, "it is not a regular file" if not stat.S_ISDIR(status.st_mode) else "it is a folder")
    with open(descriptor, "rb") as file:
        head = file.read(HEAD)
        file.seek(max(0, status.st_size - HEAD))
        return status.st_size, head, file.read(HEAD)


def _content(path: Path, size: int, head: bytes, tail: bytes) -> object:
    if not head:
        raise _refusal(path, "it is empty: download or copy it again")
    for start, what in FOREIGN.items():
        if head.startswith(start):
            raise _refusal(path, f"it is {what}")
    if head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"<":
        raise _refusal(path, "it is a web page: the link has moved or wants a login, so download the file by hand")
    if head[257:262] == b"ustar":
        raise _refusal(path, "it is a tar archive: unpack it")
    header = int.from_bytes(head[:8], "little")
    try:
        if head[8:9] == b"{" and 2 <= header <= size - 8:
            return load_file(path)
        if head.startswith(b"PK\x03\x04"):
            return _zipped(path, size)
        if head[:1] == b"\x80":
            return _load(path)
    except WeightsError:
        raise
    except DAMAGE as error:
        raise _refusal(path, f"it is {CUT}") from error
    if head[8:9] == b"{":
        raise _refusal(path, f"it is {CUT}")
    if head.isascii() and b"\0" not in head:
        raise _refusal(path, f"it is a text that begins with {head[:QUOTED].decode()!a}")
    raise _refusal(path, "its first bytes are of no format of weights that is known here")


def _zipped(path: Path, size: int) -> object:
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        names = [entry.filename for entry in entries]
        unpacked = sum(entry.file_size for entry in entries)
        pickles = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
        if unpacked > UNPACKED * size + SLACK or any(entry.file_size > PICKLE_LIMIT for entry in pickles):
            raise _refusal(path, f"its {size:,} bytes unpack to {unpacked:,}, which weights do not")
        if any(name.endswith("/constants.pkl") or "/code/" in name for name in names):
            return read_torchscript(archive)
    if not pickles:
        what = "NumPy arrays" if names and all(name.endswith(".npy") for name in names) else "other files"
        listed = ", ".join(map(ascii, names[:3]))
        raise _refusal(path, f"it is a zip archive of {what} ({listed}): unpack it, or {SAVED}")
    return _load(path)


def _load(path: Path) -> object:
    """Read what torch.save wrote; only tensors, plain values and what NumPy makes of a number are allowed."""
    try:
        harmless = torch.serialization.safe_globals(
            [argparse.Namespace, *_numpy_globals()]
        )  # DeiT, DINO save arguments
        with harmless, path.open("rb") as file:  # of a path torch would believe the suffix
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        try:
            with path.open("rb") as file:
                foreign = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        except Exception:  # no file of torch.save at all
            foreign = []
        if not foreign:
            raise _refusal(path, f"it is a pickle that torch.save did not write, or is {CUT}; else {SAVED}") from error
        listed = ", ".join(map(ascii, sorted(foreign)[:5]))
        raise _refusal(
            path, f"it holds objects of other programs ({listed}), which could run code and are not loaded: {SAVED}"
        ) from error


def _numpy_globals() -> Iterator[Any]:
    """Yield what pickled NumPy numbers and arrays are made with, under the names of old and new versions."""
    multiarray = np._core.multiarray if hasattr(np, "_core") else np.core.multiarray  # type: ignore[attr-defined]
    for name in NUMPY:
        for package in ("numpy.core", "numpy._core"):
            yield getattr(multiarray, name.partition(".")[2]), f"{package}.{name}"
    yield from (np.ndarray, np.dtype)
    yield from {type(np.dtype(code)) for code in "?bBhHiIlLqQefd"}
    yield _encode, "_codecs.encode"


def _encode(text: str, encoding: str) -> bytes:
    """Turn text into the bytes that Python 2 pickled."""
    if encoding != "latin1":
        raise pickle.UnpicklingError("bytes are pickled as latin1")
    return text.encode("latin1")


def _state(content: object, seen: set[int]) -> Mapping[object, object] | None:
    """Find the dictionary of weights among the dictionaries of a training state, which may hold each other."""
    if not isinstance(content, Mapping) or id(content) in seen or len(seen) > DEPTH:
        return None
    seen.add(id(content))
    for key in NESTS:
        if (found := _state(content.get(key), seen)) is not None:
            return found
    if _has_tensors(content):
        return content
    others = [value for value in content.values() if isinstance(value, Mapping) and _has_tensors(value)]
    return others[0] if len(others) == 1 else None


def _has_tensors(content: Mapping[object, object]) -> bool:
    return any(isinstance(value, Tensor | np.ndarray) for value in content.values())


def _checked(path: str | Path, state: Mapping[object, object], size: int) -> dict[str, Tensor]:
    """Keep the tensors under a name; refuse those that hold no plain numbers."""
    tensors: dict[str, Tensor] = {}
    for name, value in state.items():
        if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
            value = torch.from_numpy(np.ascontiguousarray(value))
        if isinstance(value, Tensor) and isinstance(name, str):
            tensors[name] = value
    for name, value in tensors.items():
        if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized or value.is_complex():
            kind = "quantised" if value.is_quantized else f"{value.dtype} on {value.device}, {value.layout}"
            raise _refusal(path, f"its entry {name!a} is {kind.replace('torch.', '')}: {SAVED} as dense float")
    if not tensors:
        raise _refusal(path, "its tensors have no names", "must hold a dictionary of tensors")
    if sum(value.numel() * value.element_size() for value in tensors.values()) > UNPACKED * size + SLACK:
        raise _refusal(path, f"its tensors are far larger than its {size:,} bytes, which weights are not")
    return tensors


def _described(content: object) -> str:
    if isinstance(content, Mapping):
        keys = ", ".join(ascii(key)[:40] for key in list(content)[:5])
        return f"a dictionary without tensors, with {keys or 'nothing'}"
    return f"a value of type {type(content).__name__}"


def _refusal(
    path: str | Path, what: str, rule: str = "must hold tensors only, saved by torch.save or safetensors"
) -> WeightsError:
    return WeightsError(f"{path}: {rule}; {what}")
