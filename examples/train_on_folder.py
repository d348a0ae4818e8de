"""Train on your own images and print how well the model finds people.

    python examples/train_on_folder.py crops shop SOLVER.MAX_EPOCHS 30

`crops` is a folder with a folder per person, or any other layout of docs/own-cameras.md; the run lies in log/shop. The
same command resumes a run that was interrupted.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusionreid.engine.cli import main


def train(data: str, name: str, settings: Sequence[str] = ()) -> dict[str, Any]:
    """Train a model on `data` and return the measures of its last evaluation, on persons that it was not trained on."""
    if code := main(["train", "--data", data, "--name", name, *settings]):
        sys.exit(code)  # the command has said what is wrong
    metrics = json.loads(Path("log", name, "metrics.json").read_text(encoding="utf-8"))
    results: dict[str, Any] = metrics["results"]["FusionReID"]
    return results


if __name__ == "__main__":
    results = train(sys.argv[1], sys.argv[2], sys.argv[3:])
    print(f"mAP {results['mAP']:.1%}, Rank-1 {results['cmc'][0]:.1%}, {results['valid_queries']} queries")
