"""The pictures of a study, drawn from its tables."""

from __future__ import annotations

import itertools
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from projects.study.cells import Cell, Preset
from tools.study_results import CurveRow, Results
from tools.study_statistics import gains, summarise

__all__ = ["Band", "band", "draw"]

DPI = 110
COLOURS = [f"C{index}" for index in range(10)]
STYLES = ("-", "-.", ":")  # one for each ten colours
OUTSIDE_STYLES = ("--", ":", "-.")
STUDENT = "student"
TEACHERS = {"share_v": "C1", "share_a": "C2"}


def draw(preset: Preset, results: Results, folder: Path) -> dict[str, str | None]:
    """Draw what there are results for.

    Returns:
        the names of the files; to each the heading that it belongs under, None for the report's
        head.
    """
    pictures: dict[str, str | None] = {}
    if any(gains(results.runs, cell.name, cell.baseline) for cell in preset.cells):
        _save(_draw_gains(preset, results), folder / "gains.png")
        pictures["gains.png"] = None
    for group in dict.fromkeys(cell.group for cell in preset.cells):
        cells = [cell for cell in preset.cells if cell.group == group]
        present = {row.cell for row in results.curves}
        if any(cell.name in present for cell in cells):
            name = f"ap_{re.sub('[^a-z0-9]+', '_', group.lower()).strip('_')}.png"
            _save(_draw_precision(preset, cells, results.curves), folder / name)
            pictures[name] = group
    branched = {row.cell for row in results.curves if row.branch in TEACHERS}
    cells = [cell for cell in preset.cells if cell.name in branched]
    if cells:
        _save(_draw_branches(cells, results.curves), folder / "branches.png")
        pictures["branches.png"] = cells[0].group
    return pictures


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


# --- curves -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Band:
    """AP of a cell over its evaluations: the mean over the seeds, the lowest and the highest.

    Attributes:
        iterations: of the evaluations.
        minutes: that these took, the median over the seeds.
        mean: AP, as are low and high.
    """

    iterations: list[int]
    minutes: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]


def band(curves: Sequence[CurveRow], cell: str, branch: str = "") -> Band:
    """Put together what the seeds of a cell have reached at the same iterations."""
    at: dict[int, list[CurveRow]] = {}
    for row in curves:
        if (row.cell, row.branch) == (cell, branch):
            at.setdefault(row.iteration, []).append(row)
    iterations = sorted(at)
    precisions = [[row.AP for row in at[iteration]] for iteration in iterations]
    return Band(
        iterations,
        [statistics.median(row.wall_s for row in at[i]) / 60 for i in iterations],
        [statistics.fmean(values) for values in precisions],
        [min(values) for values in precisions],
        [max(values) for values in precisions],
    )


def _draw_precision(preset: Preset, cells: Sequence[Cell], curves: Sequence[CurveRow]) -> Figure:
    """AP over iterations and over time; baselines of another group are dashed."""
    names = {cell.name for cell in cells}
    outside = {cell.baseline for cell in cells} - names
    others = [cell for cell in preset.cells if cell.name in outside]
    height = max(3.8, 1.0 + 0.2 * (len(cells) + len(others)))
    figure, axes = plt.subplots(1, 2, figsize=(11.5, height), sharey=True, layout="constrained")
    looks = [("black", style) for style in OUTSIDE_STYLES][: len(others)]
    looks += [(colour, style) for style in STYLES for colour in COLOURS]
    for cell, look in zip([*others, *cells], itertools.cycle(looks)):
        found = band(curves, cell.name)
        if found.iterations:
            _draw_band(axes[0], found.iterations, found, look, cell.title)
            _draw_band(axes[1], found.minutes, found, look, cell.title)
    axes[0].set(xlabel="iteration", ylabel="AP")
    axes[1].set_xlabel("minutes of training steps")
    _from_zero(axes)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize="small")
    return figure


def _draw_band(
    axes: Axes, places: Sequence[float], found: Band, look: tuple[str, str], label: str
) -> None:
    colour, style = look
    axes.plot(places, found.mean, style, color=colour, linewidth=1.6, marker=".", label=label)
    axes.fill_between(places, found.low, found.high, color=colour, alpha=0.13, linewidth=0)


def _from_zero(every: Iterable[Axes]) -> None:
    """Let axes begin at 0; call it last, as it ends their automatic choice of limits."""
    for axes in every:
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)


def above_student(curves: Sequence[CurveRow]) -> list[CurveRow]:
    """The teachers' rows, with what their AP is above that of the student of the same weights."""
    students = {(row.cell, row.seed, row.iteration): row for row in curves if row.branch == STUDENT}
    found = []
    for row in curves:
        student = students.get((row.cell, row.seed, row.iteration))
        if row.branch in TEACHERS and student is not None:
            found.append(replace(row, AP=row.AP - student.AP, AP50=row.AP50 - student.AP50))
    return found


def _draw_branches(cells: Sequence[Cell], curves: Sequence[CurveRow]) -> Figure:
    """A panel for each cell whose teachers were evaluated: how far they are above the student."""
    columns = min(3, len(cells))
    lines = -(-len(cells) // columns)
    figure, axes = plt.subplots(
        lines,
        columns,
        figsize=(0.8 + 3.7 * columns, 3.2 * lines + 0.4),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    gaps = above_student(curves)
    for place, cell in zip(axes.flat, cells, strict=False):
        for branch, colour in TEACHERS.items():
            found = band(gaps, cell.name, branch)
            if found.iterations:
                _draw_band(place, found.iterations, found, (colour, "-"), branch)
        place.set(title=cell.title, xlabel="iteration")
        place.axhline(0, color="black", linewidth=0.8)
        place.set_xlim(left=0)
        place.grid(alpha=0.3)
    for place in axes.flat[len(cells) :]:
        place.set_axis_off()
    for place in axes[:, 0]:
        place.set_ylabel("AP above the student's")
    handles = {
        label: handle
        for place in axes.flat
        for handle, label in zip(*place.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2)
    return figure


# --- gains --------------------------------------------------------------------------------------


def _draw_gains(preset: Preset, results: Results) -> Figure:
    """A bar for each cell with its baseline: mean, standard error, and each seed as a dot."""
    titles = {cell.name: cell.title for cell in preset.cells}
    groups = list(dict.fromkeys(cell.group for cell in preset.cells))
    found = [(cell, gains(results.runs, cell.name, cell.baseline)) for cell in preset.cells]
    found = [(cell, values) for cell, values in found if values]
    figure, axes = plt.subplots(figsize=(10, 1.3 + 0.36 * len(found)), layout="constrained")
    for place, (cell, values) in enumerate(found):
        summary = summarise(values)
        axes.barh(
            place,
            summary.mean,
            xerr=summary.error if summary.count > 1 else None,
            color=COLOURS[groups.index(cell.group) % len(COLOURS)],
            alpha=0.55,
            height=0.7,
            capsize=3,
            label=cell.group,
        )
        axes.scatter(values, [place + 0.22] * len(values), s=11, color="black", alpha=0.7, zorder=3)
    axes.axvline(0, color="black", linewidth=0.8)
    labels = [f"{cell.title}  vs  {titles[cell.baseline or '']}" for cell, _ in found]
    axes.set_yticks(range(len(found)), labels, fontsize="small")
    axes.set_ylim(len(found) - 0.4, -0.6)
    axes.set_xlabel("gain in AP: mean, standard error, single seeds")
    axes.grid(axis="x", alpha=0.3)
    by_group = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(
        by_group.values(), by_group.keys(), loc="outside lower center", ncols=4, fontsize="small"
    )
    return figure
