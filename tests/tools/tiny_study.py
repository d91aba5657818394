"""A study of seconds, run as a program: three cells on a few generated images.

    python tests/tools/tiny_study.py --only 'slow' ...

``slow`` is a detector of a few hundred weights with many short iterations; ``teacher`` and
``student`` are the quickstart's, for three iterations.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "engine"))

import projects  # noqa: F401

# isort: split
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig
from tiny_detector import TinyDetector

from projects.study.cells import Cell, Preset
from tools.study import main

ROOT = Path(__file__).resolve().parents[2]
TRAININGS_PATH = str(ROOT / "tests" / "engine")  # where trainings find the tiny detector


def _quick(path, iterations):
    config = LazyConfig.load(str(ROOT / "projects" / path))
    config.train.update(max_iter=iterations, eval_period=2, log_period=1)
    config.train.checkpointer.period = 2
    config.dataloader.train.total_batch_size = 4
    return config


def teacher():
    return _quick("baselines/configs/conditional_detr_quickstart.py", 3)


def student():
    return _quick("detr_distill/configs/detrdistill_conditional_detr_quickstart.py", 3)


def body():
    config = teacher()
    config.dataloader.train.dataset.names = "shapes_backbone_train"
    config.dataloader.test.dataset.names = "shapes_backbone_val"
    return config


def slow():
    config = _quick("baselines/configs/conditional_detr_quickstart.py", 300)
    config.model = L(TinyDetector)(num_classes=8, nan_at=int(os.environ.get("NAN_AT", "-1")))
    config.train.update(eval_period=0, log_period=5)
    config.train.checkpointer.period = 1000
    return config


PRESETS = {
    "cpu": Preset(
        name="cpu",
        about="three cells",
        shapes={
            "preset": "quickstart",
            "train_images": 8,
            "val_images": 4,
            "size": (64, 64),
        },
        cells=(
            Cell(
                "student", "DETRDistill", "Distillation", student, "teacher", "teacher", "+2.4 AP"
            ),
            Cell("teacher", "Conditional DETR", "Baselines", teacher),
            Cell("slow", "Tiny", "Baselines", slow),
        ),
        seeds=(0, 1, 2),
        jobs=2,
    )
}

if __name__ == "__main__":
    os.environ["PYTHONPATH"] = TRAININGS_PATH
    main(PRESETS)
