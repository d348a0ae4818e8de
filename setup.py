"""Installation: `pip install -e .` gives the command `fusionreid` and the packages it is made of."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="fusionreid",
    version="0.1.0",
    description="A training engine for person re-identification: FusionReID with custom kernels",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["fusionreid*"]),
    install_requires=[
        "torch>=2.11",  # FSDP2 and custom operators as used here; 2.10 closed the last hole in weights_only
        "torchvision",
        "timm>=1.0.20",
        "triton>=3.6",  # Linux only, and so is this package
        "numpy>=1.26",
        "pillow>=10",
        "pydantic>=2.7",
        "pyyaml>=6",
        "safetensors>=0.4",
        "tensorboard>=2.15",
        "tqdm>=4.66",  # the progress bar
    ],
    extras_require={
        "dali": ["nvidia-dali-cuda130"],
        "export": ["onnx", "onnxscript", "onnxruntime"],
        "peers": ["pytorch-metric-learning", "torchmetrics", "faiss-cpu"],  # that the benchmarks compare with
        "dev": [
            *("onnx", "onnxscript", "onnxruntime"),
            *("pytest>=8", "pytest-xdist", "pytest-benchmark", "hypothesis"),
            *("ruff", "mypy", "types-PyYAML", "pre-commit"),
        ],
    },
    entry_points={"console_scripts": ["fusionreid=fusionreid.engine.cli:main"]},
)
