"""Images per second of a training at the peak of its GPUs; the share that is reached is the model FLOPs utilisation."""

import torch

from fusionreid.config import ModelConfig
from fusionreid.engine.config import Config

# Forward and backward of the published code at 256 x 128, products and convolutions, as torch's flop counter finds it.
# A step that saves operations is faster, not less utilised: this number stays.
GFLOP_PER_IMAGE = 174.0
DECIDES = ("LAST_STRIDE", "RES_USE", "TRANS_USE", "RES_MODE", "RES_NAME", "TRANSFORMER_TYPE", "STRIDE_SIZE",
           "HTM_LAYER", "MIX_DIM", "HTM_MODE")  # fmt: skip
SIZE = (256, 128)

# TFLOP/s of dense bf16 or fp16 products summed in fp32, by the name torch gives a device, less "NVIDIA". Sources: the
# data sheets of A100, H100, H200 and HGX B200, which from H100 on give the double, with sparsity; the white paper of
# the Ada architecture for RTX 4090. A part of a GPU has another name, and no entry.
PEAKS = {
    "A100-SXM4-40GB": 312.0,
    "A100-SXM4-80GB": 312.0,
    "A100-PCIE-40GB": 312.0,
    "A100 80GB PCIe": 312.0,
    "H100 80GB HBM3": 989.5,
    "H100 PCIe": 756.5,
    "H100 NVL": 835.5,
    "H200": 989.5,
    "H200 NVL": 835.5,
    "B200": 2250.0,
    "GeForce RTX 4090": 165.2,
}


def images_per_s_at_peak(cfg: Config, devices: int, name: str | None = None) -> float | None:
    """Images per second of the published model with every device at its peak, or None if that is not known.

    `name` is that of the devices; None: the current one's.
    """
    if name is None:
        name = torch.cuda.get_device_name() if torch.cuda.is_initialized() else ""
    published = ModelConfig()
    is_published = all(getattr(cfg.MODEL, key) == getattr(published, key) for key in DECIDES)
    peak = PEAKS.get(name.removeprefix("NVIDIA "))
    if peak is None or not is_published or cfg.INPUT.SIZE_TRAIN != SIZE or cfg.SOLVER.PRECISION == "fp32":
        return None
    return devices * peak * 1e3 / GFLOP_PER_IMAGE
