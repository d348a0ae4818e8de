"""OUTPUT_DIR/manifest.json: all that a run was made from, and how a start that went on with it differed."""

import hashlib
import json
import logging
import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import uuid4

from fusionreid.dataloading import Split
from fusionreid.dataloading.records import PARTS
from fusionreid.engine.config import Config
from fusionreid.engine.config_yaml import flat
from fusionreid.sealed import check_file, unsealed, write_sealed

if TYPE_CHECKING:
    import torch

FILE = "manifest.json"
PACKAGES = ("fusionreid", "torch", "torchvision", "triton", "timm", "numpy")
ROOT = Path(__file__).parents[2]
START = ("started", "step")  # of one start; the rest is compared between starts
SHOWN = 8  # differences in a line

log = logging.getLogger(__name__)


class Recorded(NamedTuple):
    """The name of the run, the same for as long as it is resumed, and a line about differences or nothing."""

    run: str
    note: str


def record(output: Path, cfg: Config, split: Split, device: "torch.device", ranks: int, step: int) -> Recorded:
    """Write the manifest of a start after `step` steps; earlier starts of the run stay in it, as what was different."""
    path = output / FILE
    new = json.loads(json.dumps(_describe(cfg, split, device, ranks)))
    old = _load(path) if step else {}
    run, earlier, note = old.pop("run", uuid4().hex[:12]), old.pop("earlier", []), ""
    if old:
        before, now = dict(flat(old)), dict(flat(new))
        start = {key: before.pop(key, None) for key in START}
        changed = [key for key in before | now if before.get(key) != now.get(key)]
        earlier = [*earlier, start | {"differed": {key: before.get(key) for key in changed}}]
        note = _line([f"{key} {before.get(key)} -> {now.get(key)}" for key in changed])
    started = datetime.now(UTC).isoformat(timespec="seconds")
    try:
        write_sealed(path, {"run": run, "started": started, "step": step, **new, "earlier": earlier})
    except OSError as error:
        log.warning("%s was not written: %s; training continues", path, error)
    return Recorded(run, note)


def _describe(cfg: Config, split: Split, device: "torch.device", ranks: int) -> dict[str, Any]:
    import torch

    from fusionreid.engine.distributed.numerics import describe_numerics

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "commit": commit(),
        "versions": versions(),
        "precision": cfg.SOLVER.PRECISION,
        "numerics": describe_numerics(),
        "device": name,
        "ranks": ranks,
        "data": describe_data(split),
        "config": cfg.model_dump(mode="json"),
    }


def describe_data(split: Split) -> dict[str, Any]:
    """Count images by part, and digest each image's part, name in the data set, size, person and camera."""
    digest, folder = hashlib.blake2b(digest_size=16), f"{split.root}{os.sep}"
    parts: dict[str, dict[str, int]] = {}
    for part in PARTS:
        records = getattr(split, part)
        persons, cameras = {r.person for r in records}, {r.camera for r in records}
        parts[part] = {"images": len(records), "persons": len(persons), "cameras": len(cameras)}
        for record in records:
            name = os.fsencode(record.path.removeprefix(folder))
            digest.update(
                b"%b %b\0%d %d %d\n" % (part.encode(), name, _size(record.path), record.person, record.camera)
            )
    edition = re.match(r"MSMT17 (V[12]),", split.note)
    about = {"name": split.name, "edition": edition and edition[1], "root": split.root, "note": split.note}
    return {**about, **parts, "digest": digest.hexdigest()}


def recorded_data(output: Path) -> dict[str, Any]:
    """Read what `describe_data` found when the run in `output` started; empty where that is not known."""
    data: dict[str, Any] = _load(output / FILE).get("data", {})
    return data


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:  # gone since it was checked: the loader has a rule for that
        return -1


def versions() -> dict[str, str | None]:
    """Versions of the packages that compute; None: not installed."""
    import torch

    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found | {"torch": str(torch.__version__), "cuda": torch.version.cuda}  # with its build


def commit() -> str | None:
    """Commit of this source, with -dirty if a file of it differs; None where it is no repository of its own."""
    if not (ROOT / ".git").exists():
        return None
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def _load(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        check_file(path)
        found = unsealed(path.read_bytes(), required=False)
        if isinstance(found.get("run", ""), str) and isinstance(found.get("earlier", []), list):
            return found
        raise ValueError("it does not name the run, or its starts")
    except (OSError, ValueError) as error:
        log.warning("%s of the start before cannot be read: %s; it is rewritten", path, error)
    return {}


def _line(differences: list[str]) -> str:
    if not differences:
        return ""
    more = f" and {len(differences) - SHOWN} more" if len(differences) > SHOWN else ""
    return f"differs from the start before: {', '.join(differences[:SHOWN])}{more}"
