"""The studies that there are."""

from __future__ import annotations

from functools import partial

from .cells import Preset
from .matrix import Scale, all_cells, backbone
from .models import medium, small

_CPU_SHAPES = {"preset": "quickstart", "size": (64, 64), "categories": 6, "val_images": 800}
_CPU = Scale(
    model=partial(small, classes=6),
    teacher_model=partial(small, classes=6),
    iterations=800,
    teacher_iterations=2400,
)

_GPU_SHAPES = {"size": (320, 320), "train_images": 12000, "val_images": 1000}
_GPU = Scale(
    model=partial(medium, classes=10),
    teacher_model=partial(medium, classes=10),
    iterations=1000,
    teacher_iterations=3000,
    settings={
        "train__amp__enabled": True,
        "dataloader__train__num_workers": 2,
        "optimizer__lr": 2e-4,
    },
)

PRESETS = {
    "cpu": Preset(
        name="cpu",
        about="quickstart-size detectors, images of 64 x 64; about three hours on two cores",
        shapes=_CPU_SHAPES,
        cells=all_cells(_CPU),
        backbone=backbone(_CPU),
        backbone_shapes={**_CPU_SHAPES, "seed": 1},
    ),
    "gpu": Preset(
        name="gpu",
        about="full-size transformers on ResNet-18, images of 320 x 320; for one large GPU",
        shapes=_GPU_SHAPES,
        cells=all_cells(_GPU),
        device="cuda",
        jobs=8,
        backbone=backbone(_GPU),
        backbone_shapes={**_GPU_SHAPES, "seed": 1},
    ),
}
