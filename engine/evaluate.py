"""The door of evaluation, and its path: checkpoint -> embeddings of query and gallery -> ranks -> mAP, mINP, CMC.

`python engine/evaluate.py --config_file FILE [--baselines] [KEY VALUE ...]`. The embeddings stay in
OUTPUT_DIR/embeddings; `TEST.EMBEDDINGS FOLDER` ranks such a folder again, without a model.
"""

import sys
from contextlib import nullcontext
from pathlib import Path

if __name__ == "__main__":  # a script's own folder must not hide modules, and its project need not be installed
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from fusionreid.engine import command
from fusionreid.engine.config import Config


def main(argv: list[str] | None = None) -> int:
    return command.run(
        evaluate, argv, flags={"--baselines": "also rank by an untrained network and by colour histograms"}
    )


def evaluate(cfg: Config, *, baselines: bool = False) -> None:
    with command.lock(Path(cfg.OUTPUT_DIR)) if command.RANK == 0 else nullcontext():
        from fusionreid.engine.reporting.evaluate_run import evaluate_checkpoint, evaluate_stored

        if cfg.TEST.EMBEDDINGS:
            evaluate_stored(cfg)
        else:
            evaluate_checkpoint(cfg, baselines=baselines)


if __name__ == "__main__":
    sys.exit(main())
