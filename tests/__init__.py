"""The tests mirror the rooms of the project: tests/kernels for kernels/, tests/engine/training for engine/training/."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
