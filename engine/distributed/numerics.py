"""Arithmetic of a process: IEEE fp32 and the same bits in every run, where they are asked for."""

import os

import torch


def set_numerics(precision: str, *, deterministic: bool) -> None:
    """Apply SOLVER.PRECISION and PARALLEL.DETERMINISTIC to torch, before anything is computed on a GPU.

    By itself torch computes fp32 convolutions in TF32 there: fp32 turns that off.
    """
    is_ieee = precision == "fp32"
    torch.backends.cudnn.allow_tf32 = not is_ieee  # the older switch: the newer one leaves the two in contradiction
    if is_ieee:
        torch.backends.cuda.matmul.allow_tf32 = False
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        torch.backends.cudnn.benchmark = False  # it may choose another algorithm in each run
        torch.backends.cudnn.deterministic = True
        torch.use_deterministic_algorithms(True)  # an operator that has none is an error that names it
        torch.utils.deterministic.fill_uninitialized_memory = False
        from torch._inductor import config as inductor

        if hasattr(inductor, "deterministic"):  # since torch 2.9
            inductor.deterministic = True


def describe_numerics() -> dict[str, str | bool]:
    """Precision of fp32 convolutions and products on a GPU, and whether every run gives the same bits."""
    precision = {name: _precision(backend) for name, backend in (
        ("fp32_convolutions", torch.backends.cudnn.conv), ("fp32_products", torch.backends.cuda.matmul))}  # fmt: skip
    return {**precision, "deterministic": torch.are_deterministic_algorithms_enabled()}


def _precision(backend: object) -> str:
    return "tf32" if getattr(backend, "fp32_precision", "") == "tf32" else "ieee"
