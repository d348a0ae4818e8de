"""Tensors of a TorchScript archive, such as CLIP as released, read without running or compiling its code."""

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

STORAGES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
DEPTH = 64
LISTS = ("build_intlist", "build_tensorlist", "build_doublelist", "build_boollist")


class _Module:
    """Attributes of a scripted module; its class and its code are not looked at."""

    def __setstate__(self, state: object) -> None:
        self.attributes = state if isinstance(state, dict) else {}


def read_torchscript(archive: zipfile.ZipFile) -> dict[str, Tensor]:
    """Return parameters and buffers by their dotted names. UnpicklingError: the archive is no TorchScript."""
    data = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
    with archive.open(data) as file:
        root = _Unpickler(file, archive, data.removesuffix("data.pkl") + "data/").load()
    found: dict[str, Tensor] = {}
    waiting: list[tuple[str, object]] = [("", root)]
    seen: set[int] = set()
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, Tensor):
            found[name] = value
        elif isinstance(value, _Module) and id(value) not in seen:
            seen.add(id(value))
            if name.count(".") > DEPTH:
                raise pickle.UnpicklingError(f"modules lie more than {DEPTH} deep in each other")
            attributes = getattr(value, "attributes", {})
            waiting += [(f"{name}.{key}".lstrip("."), child) for key, child in reversed(attributes.items())]
    return found


class _Unpickler(pickle.Unpickler):
    """Makes tensors, lists and empty shells of modules; whatever else a pickle asks for is refused."""

    def __init__(self, file: Any, archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(file)
        self._archive, self._folder = archive, folder
        self._storages: dict[tuple[str, torch.dtype], Tensor] = {}  # each is read once, however often it is named

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__"):
            return _Module
        allowed: dict[tuple[str, str], Callable[..., object]] = {
            # Functions of this call alone: a pickle may put attributes on what it is given.
            ("torch._utils", "_rebuild_tensor_v2"): lambda storage, offset, size, stride, *_: torch.as_strided(
                storage, size, stride, offset
            ),
            ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
            ("collections", "OrderedDict"): OrderedDict,
            **{("torch.jit._pickle", builder): list for builder in LISTS},
        }
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(f"{module}.{name} is not of a TorchScript archive")
        return allowed[module, name]

    def persistent_load(self, pid: Any) -> Tensor:
        """Return the elements of a storage, (N,)."""
        kind, dtype, key, _, count = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(key, str):
            raise pickle.UnpicklingError("a storage has a type and a name")
        if (key, dtype) not in self._storages:
            data = bytearray(self._archive.read(f"{self._folder}{key}"))
            self._storages[key, dtype] = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return self._storages[key, dtype][:count]
