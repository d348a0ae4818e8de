"""MFU is shown for the published model on a device whose peak is known, and nowhere else."""

import pytest

from fusionreid.engine.config import Config
from fusionreid.engine.monitoring.mfu import images_per_s_at_peak

H200 = "NVIDIA H200"


def config(**sections: object) -> Config:
    return Config.from_dict(sections)


def test_the_published_model_on_known_devices() -> None:
    assert images_per_s_at_peak(config(), 1, H200) == pytest.approx(989.5e12 / 174.0e9)
    assert images_per_s_at_peak(config(), 8, "A100-SXM4-80GB") == pytest.approx(8 * 312e12 / 174.0e9)  # an older driver
    assert images_per_s_at_peak(config(SOLVER={"PRECISION": "fp16"}), 1, H200) is not None
    assert images_per_s_at_peak(config(MODEL={"DROP_PATH": 0.0, "HTM_SHARE": "none"}), 1, H200) is not None


@pytest.mark.parametrize("name", ["", "Tesla T4", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA GeForce RTX 4090 D"])
def test_a_device_without_an_entry(name: str) -> None:
    assert images_per_s_at_peak(config(), 1, name) is None


@pytest.mark.parametrize("sections", [
    {"MODEL": {"HTM_LAYER": 3}}, {"MODEL": {"RES_NAME": "resnet18"}}, {"MODEL": {"TRANS_USE": False}},
    {"MODEL": {"STRIDE_SIZE": [16, 16]}}, {"MODEL": {"LAST_STRIDE": 2}}, {"SOLVER": {"PRECISION": "fp32"}},
    {"INPUT": {"SIZE_TRAIN": [384, 128], "SIZE_TEST": [384, 128]}},
])  # fmt: skip
def test_another_model_size_or_precision(sections: dict[str, dict[str, object]]) -> None:
    assert images_per_s_at_peak(config(**sections), 1, H200) is None


def test_every_peak_is_that_of_dense_products() -> None:
    """The data sheets' figures with sparsity, which are the double, would halve every MFU."""
    per_s = {name: images_per_s_at_peak(config(), 1, f"NVIDIA {name}") for name in ("H100 80GB HBM3", "B200")}
    assert per_s["B200"] / per_s["H100 80GB HBM3"] == pytest.approx(4500 / 1979)
