"""Input for detectors of full size with random weights."""

import torch
from tiny_detectors import instances, pattern_image


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
