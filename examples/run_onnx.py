"""Compute vectors with ONNX Runtime alone: no torch, and nothing of this project.

    pip install -e '.[export]'
    fusionreid export --config_file log/shop/config.yml --output shop.onnx
    python examples/run_onnx.py shop.onnx lost.jpg crops/0001.jpg

It prints the cosines of all pairs of images.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from onnxruntime import InferenceSession
from PIL import Image


class OnnxEmbedder:
    """An exported model: images in, vectors of unit length out."""

    def __init__(self, model: str | Path) -> None:
        self.session = InferenceSession(model)
        self.about = json.loads(Path(f"{model}.json").read_text(encoding="utf-8"))
        _, *size, _ = self.about["images"]["shape"]
        self.size = size[::-1]  # width, height

    def __call__(self, paths: Sequence[str | Path]) -> np.ndarray:
        """Return the vectors (N, D) float32 of N image files."""
        images = [Image.open(path).convert("RGB").resize(self.size, Image.Resampling.BILINEAR) for path in paths]
        inputs = {"images": np.stack([np.asarray(image) for image in images])}
        if self.about["cameras"]:
            inputs["cameras"] = np.full(len(paths), -1)  # -1: camera not known
        return np.asarray(self.session.run(None, inputs)[0])


if __name__ == "__main__":
    vectors = OnnxEmbedder(sys.argv[1])(sys.argv[2:])
    print((vectors @ vectors.T).round(3))
