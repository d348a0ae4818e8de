"""Account of a data set as JSON: what was found, used and left out, and what to make of it."""

from pathlib import Path
from typing import Any

from fusionreid.dataloading.config import DatasetsConfig
from fusionreid.dataloading.image_files import find_files
from fusionreid.dataloading.records import PARTS, Split, printable


def account_as_json(split: Split) -> dict[str, Any]:
    """Return `found`, `used`, `left_out`, `persons`, `cameras`, `parts`, `warnings` and `verdict`, ok or warning.

    Persons and cameras are names; `left_out` holds the paths by reason.
    """
    records = [record for part in PARTS for record in getattr(split, part)]
    persons, cameras = sorted({record.person for record in records}), sorted({record.camera for record in records})
    return {
        "name": split.name,
        "root": printable(split.root),
        "found": split.found,
        "used": split.used,
        "left_out": {reason: [printable(path) for path in paths] for reason, paths in split.left_out.items()},
        "parts": {part: len(getattr(split, part)) for part in PARTS},
        "persons": [printable(split.person_names.get(person, str(person))) for person in persons],
        "cameras": [printable(split.camera_names.get(camera, str(camera))) for camera in cameras],
        "warnings": [*split.warnings],
        "verdict": split.verdict,
    }


def refusal_as_json(cfg: DatasetsConfig, error: Exception) -> dict[str, Any]:
    """Return the same account of a data set that cannot be used: all that was found is left out, verdict wrong."""
    root = Path(cfg.ROOT_DIR).expanduser()
    found, left_out = find_files(root) if root.is_dir() else ([], {})
    reasons = {str(error).splitlines()[0]: found} if found else {}
    account = {reason: [printable(path) for path in paths] for reason, paths in (reasons | left_out).items()}
    return {
        "name": cfg.NAMES,
        "root": printable(root),
        "found": sum(map(len, account.values())),
        "used": 0,
        "left_out": account,
        "parts": dict.fromkeys(PARTS, 0),
        "persons": [],
        "cameras": [],
        "warnings": str(error).splitlines(),
        "verdict": "wrong",
    }
