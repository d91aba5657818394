"""Figures of a distillation: selection masks, matched pairs, instability."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from tools.attention_drawing import EDGE, MARK, backdrop_of, blend, outline, shares_of, show
from tools.plot_metrics import series

PANEL = 2.2
"""Width of a picture in inches."""


def draw_masks(
    images: Sequence[tuple[np.ndarray, str, Tensor, list[str], list[Tensor]]], levels: Sequence[str]
) -> Figure:
    """A row for each level of each image: the weighted mask, then those of single queries.

    Args:
        images: the picture (h, w, 3), its title, masks (V, 1 + Q, h, w), captions of the queries
            and their boxes (4,) in pixels.
        levels: names of the V levels.
    """
    columns = max(masks.shape[1] for _, _, masks, _, _ in images)
    rows = [(image, level) for image in images for level in range(len(levels))]
    ratio = max(image[0].shape[0] / image[0].shape[1] for image in images)
    figure = Figure(
        figsize=(columns * PANEL + 0.3, len(rows) * (PANEL * ratio + 0.35)), layout="constrained"
    )
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for line, ((picture, title, masks, captions, boxes), level) in zip(grid, rows, strict=True):
        for column, axes in enumerate(line):
            axes.set_axis_off()
            if column >= masks.shape[1]:
                continue
            show(axes, blend(backdrop_of(picture), shares_of(masks[level, column])))
            name = f"{title}, quality-weighted" if column == 0 else captions[column - 1]
            axes.set_title(f"{name}\n{levels[level]}" if column == 0 else name, fontsize=7)
            for box in boxes if column == 0 else boxes[column - 1 : column]:
                outline(axes, box, MARK, 0.9)
    return figure


def draw_pairs(
    images: Sequence[tuple[np.ndarray, str, list[tuple[Tensor, Tensor, str]]]],
) -> Figure:
    """Pairs over each image, one colour each: the teacher's box dashed, the student's solid.

    Args:
        images: the picture (h, w, 3), its title, and of each pair the student's and the teacher's
            box (4,) in pixels and a label.
    """
    columns = min(3, len(images))
    count = -(-len(images) // columns)
    ratio = max(image[0].shape[0] / image[0].shape[1] for image in images)
    size = 2 * PANEL
    figure = Figure(figsize=(columns * size, count * (size * ratio + 0.3)), layout="constrained")
    every = figure.subplots(count, columns, squeeze=False).flat
    for axes in every:
        axes.set_axis_off()
    for axes, (picture, title, pairs) in zip(figure.axes, images, strict=False):
        show(axes, backdrop_of(picture) + 0.1)
        axes.set_title(title, fontsize=8)
        for number, (student, teacher, label) in enumerate(pairs):
            colour = f"C{number % 10}"
            outline(axes, teacher, colour, 1.6, linestyle="--")
            outline(axes, student, colour, 1.6)
            ends = [((box[:2] + box[2:]) / 2).tolist() for box in (student, teacher)]
            axes.plot(*zip(*ends, strict=True), color=colour, linewidth=1, marker=".")
            axes.text(
                0.015, 0.985 - 0.045 * number, label, color=colour, transform=axes.transAxes,
                fontsize=7, va="top", path_effects=EDGE,
            )  # fmt: skip
    figure.text(0.01, 0.005, "dashed: teacher, solid: its student", fontsize=7)
    return figure


def draw_instability(records: list[dict[str, Any]]) -> Figure | None:
    """Changes of the matching between a stage and the next: over the iterations, and at the end.

    Args:
        records: of ``metrics.json``.

    Returns:
        The figure; None if no instability has been logged.
    """
    curves = {
        (who, stage): found
        for who in ("student", "teacher")
        for stage in range(64)
        if (found := series(records, f"{who}_instability_{stage}"))[0]
    }
    if not curves:
        return None
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    over_time, in_the_end = figure.subplots(1, 2, width_ratios=(3, 2))
    for (who, stage), (iterations, values) in curves.items():
        style = "-" if who == "student" else "--"
        label = f"{who}, {stage} to {stage + 1}"
        over_time.plot(
            iterations, values, style, color=f"C{stage % 10}", label=label, linewidth=1.2
        )
    over_time.set(xlabel="iteration", ylabel="queries per image that change their target")
    over_time.legend(fontsize="x-small", ncols=2)
    for place, who in enumerate(("student", "teacher")):
        last = {
            stage: float(np.mean(values[-10:]))
            for (owner, stage), (_, values) in curves.items()
            if owner == who
        }
        offsets = [stage + 0.4 * place - 0.2 for stage in last]
        in_the_end.bar(offsets, list(last.values()), 0.38, label=who)
    in_the_end.set(xlabel="stage", title="mean of the last 10 records")
    in_the_end.set_xticks(sorted({stage for _, stage in curves}))
    in_the_end.legend(fontsize="small")
    for axes in (over_time, in_the_end):
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    return figure
