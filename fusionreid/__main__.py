"""`python -m fusionreid`: the parameters of the published models, as built and as the paper's figure counts them."""

import torch

from fusionreid.config import ModelConfig
from fusionreid.model import build_model

CLASSES, CAMERAS = 1041, 15  # of MSMT17
PUBLISHED: tuple[tuple[str, dict[str, object], float], ...] = (  # name, settings, millions in the figure
    ("ResNet-50 + ViT-B", {}, 153.8),
    ("ResNet-101 + ViT-B", {"RES_MODE": 2}, 172.8),
    ("ResNet-152 + ViT-B", {"RES_MODE": 3}, 188.5),
    ("ResNet-50 + T2T-ViT-14", {"TRANSFORMER_TYPE": "t2t_vit_t_14"}, 89.0),
)


def counts(settings: dict[str, object]) -> tuple[float, float]:
    """Return the millions of parameters of a model: all of them, and those that the figure counts."""
    config = ModelConfig.model_validate(settings)
    with torch.device("meta"):
        model = build_model(config, num_classes=CLASSES, num_cameras=CAMERAS)
    return model.num_parameters / 1e6, model.num_parameters_in_paper / 1e6


def main() -> None:
    """Print the table."""
    print(f"millions of parameters; all: with {CLASSES} persons and {CAMERAS} cameras;")
    print("counted: without classifiers, class token, and tables of positions and cameras, as in the paper's figure\n")
    print(f"{'':24}{'all':>8}{'counted':>10}{'paper':>8}")
    for name, settings, paper in PUBLISHED:
        total, counted = counts(settings)
        print(f"{name:24}{total:8.2f}{counted:10.2f}{paper:8.1f}")


if __name__ == "__main__":
    main()
