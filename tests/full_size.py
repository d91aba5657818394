"""Detectors of full size: how to build them without storage, and input for random weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from tiny_detectors import instances, pattern_image
from torch.overrides import TorchFunctionMode


class _SequencesOnCPU(TorchFunctionMode):
    """The installed detectron2's Swin reads its rates of stochastic depth from a tensor."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = {"device": "cpu"} if func is torch.linspace else {}
        return func(*args, **(kwargs or {}), **options)


@contextmanager
def without_storage() -> Iterator[None]:
    """Modules made and run within have weights and results without values."""
    with torch.device("meta"), _SequencesOnCPU():
        yield


def batch():
    """Two images of different sizes, one of them without objects."""
    boxes = [[20.0, 30.0, 120.0, 200.0], [5.0, 5.0, 6.0, 6.0], [90.0, 10.0, 250.0, 150.0]]
    sizes = [(224, 256), (192, 288)]
    items = [{"image": pattern_image(index, *size)} for index, size in enumerate(sizes)]
    items[0]["instances"] = instances(sizes[0], boxes, [0, 79, 17])
    items[1]["instances"] = instances(sizes[1], [], [])
    return items


@torch.no_grad()
def calm(backbone: torch.nn.Module) -> None:
    """Keep the maps of an untrained ResNet with frozen norms from growing with its depth."""
    for name, module in backbone.named_modules():
        if name.endswith(("conv3.norm", "bn3")):
            module.weight.fill_(0.2)
