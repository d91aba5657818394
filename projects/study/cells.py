"""What a study consists of: cells, each a training that is run once per seed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from omegaconf import DictConfig


@dataclass(frozen=True)
class Cell:
    """One training.

    Attributes:
        name: unique in a preset.
        title: for tables and legends.
        group: the table that it belongs to.
        build: the complete config but for the seed, the output folder and the teacher's file.
        baseline: the cell that this one is compared with, seed by seed.
        teacher: the cell whose last weights are this one's ``teacher.init_checkpoint``.
        claim: what its paper reports on COCO, in words.
    """

    name: str
    title: str
    group: str
    build: Callable[[], DictConfig]
    baseline: str | None = None
    teacher: str | None = None
    claim: str = ""


@dataclass(frozen=True)
class Preset:
    """A matrix of cells for one kind of machine.

    Attributes:
        name: for the command line.
        about: one line.
        shapes: what the generated images are, as parameters of ``tools/make_shapes.py``.
        cells: all of them, in the order of the tables.
        device: "cpu" or "cuda".
        seeds: of the trainings; the images are the same for all.
        jobs: trainings at a time.
        backbone: a detector that is trained first, once, on other images; all cells' backbones
            start from its, as they would from ImageNet's.
        backbone_shapes: its images, in the data set ``shapes_backbone``.
    """

    name: str
    about: str
    shapes: Mapping[str, object]
    cells: tuple[Cell, ...]
    device: str = "cpu"
    seeds: tuple[int, ...] = (0, 1, 2)
    jobs: int = 2
    backbone: Cell | None = None
    backbone_shapes: Mapping[str, object] = field(default_factory=dict)
