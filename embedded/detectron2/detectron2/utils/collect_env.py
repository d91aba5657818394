"""A description of the machine and the installed packages, for logs and bug reports."""

import importlib.metadata
import os
import platform
import sys

import torch
from tabulate import tabulate

import detectron2

__all__ = ["collect_env_info"]

_PACKAGES = (
    "numpy",
    "fvcore",
    "iopath",
    "omegaconf",
    "hydra-core",
    "pycocotools",
    "faster-coco-eval",
    "pillow",
)


def collect_env_info() -> str:
    """Return a table of versions and devices, followed by torch's build settings."""
    rows = [
        ("platform", platform.platform()),
        ("Python", sys.version.replace("\n", " ")),
        ("detectron2", f"{detectron2.__version__} @{os.path.dirname(detectron2.__file__)}"),
        ("PyTorch", f"{torch.__version__} @{os.path.dirname(torch.__file__)}"),
        ("CPU cores", os.cpu_count()),
        ("GPU available", torch.cuda.is_available()),
    ]
    for index in range(torch.cuda.device_count()):
        rows.append((f"GPU {index}", torch.cuda.get_device_name(index)))
    rows += [(name, _version(name)) for name in _PACKAGES]
    return tabulate(rows) + "\n" + torch.__config__.show()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not found"
