"""Which runs a study makes, and in which order."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from engine.errors import UserError, did_you_mean
from projects.study.cells import Cell, Preset

__all__ = [
    "BACKBONE_SEED",
    "Run",
    "check_preset",
    "every_cell",
    "needs",
    "plan_runs",
    "select_cells",
    "with_teachers",
]

BACKBONE_SEED = 0
"""The backbone is trained once: it is the same for all seeds, as ImageNet's would be."""


@dataclass(frozen=True)
class Run:
    """A cell with a seed.

    Attributes:
        cell: what is trained.
        seed: of the training.
        again: its result is known already, only its weights are needed.
    """

    cell: Cell
    seed: int
    again: bool = False

    def __str__(self) -> str:
        return f"{self.cell.name}, seed {self.seed}"


def check_preset(preset: Preset) -> None:
    """Stop if a name occurs twice, or a cell refers to one that is missing or to itself."""
    cells = {cell.name: cell for cell in preset.cells}
    names = [cell.name for cell in every_cell(preset)]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"preset {preset.name}: two cells are named '{twice}'")
    for cell in preset.cells:
        for what, name in (("baseline", cell.baseline), ("teacher", cell.teacher)):
            if name is not None and name not in cells:
                raise UserError(
                    f"preset {preset.name}: the {what} of '{cell.name}' is '{name}', which is no "
                    f"cell{did_you_mean(name, cells)}"
                )
        seen, above = {cell.name}, cell.teacher
        while above is not None:
            if above in seen:
                raise UserError(f"preset {preset.name}: '{cell.name}' is a teacher of itself")
            seen.add(above)
            above = cells[above].teacher


def every_cell(preset: Preset) -> tuple[Cell, ...]:
    """Return the cells and, before them, the one that gives them their backbone."""
    return preset.cells if preset.backbone is None else (preset.backbone, *preset.cells)


def needs(preset: Preset, cell: Cell) -> list[Cell]:
    """Return the cells whose weights this one starts from."""
    found = [preset.backbone] if preset.backbone is not None else []
    if cell in found:
        return []
    return found + [other for other in preset.cells if other.name == cell.teacher]


def select_cells(preset: Preset, patterns: Sequence[str]) -> tuple[Cell, ...]:
    """Return the cells whose name matches one of the patterns (all without a pattern).

    Raises:
        UserError: a pattern matches none.
    """
    names = [cell.name for cell in preset.cells]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UserError(
                f"--only: no cell of preset {preset.name} is named '{pattern}'"
                f"{did_you_mean(pattern, names)}; --list shows them"
            )
    return tuple(
        cell
        for cell in preset.cells
        if not patterns or any(fnmatchcase(cell.name, pattern) for pattern in patterns)
    )


def with_teachers(preset: Preset, cells: Sequence[Cell]) -> tuple[Cell, ...]:
    """Return ``cells`` and all they learn from: teachers first, otherwise as in the preset."""
    by_name = {cell.name: cell for cell in preset.cells}
    teachers: dict[str, Cell] = {}
    for cell in cells:
        for teacher in reversed(_teachers_of(cell, by_name)):
            teachers.setdefault(teacher.name, teacher)
    return (*teachers.values(), *(cell for cell in cells if cell.name not in teachers))


def _teachers_of(cell: Cell, by_name: dict[str, Cell]) -> list[Cell]:
    """The cell's teacher, that one's teacher, and so on."""
    chain: list[Cell] = []
    while cell.teacher is not None:
        cell = by_name[cell.teacher]
        chain.append(cell)
    return chain


def plan_runs(
    preset: Preset,
    cells: Sequence[Cell],
    seeds: Sequence[int],
    finished: Collection[tuple[str, int]],
    has_weights: Callable[[Cell, int], bool],
) -> list[Run]:
    """Return the runs to do: the backbone, then seed by seed, teachers before their students.

    Args:
        preset: holds the teachers.
        cells: what is asked for.
        seeds: for each cell.
        finished: cell names and seeds whose result is known.
        has_weights: whether a finished run's weights are still there. A teacher's or backbone's
            that are not are trained again if they are needed.
    """
    by_name = {cell.name: cell for cell in preset.cells}
    order = with_teachers(preset, cells)
    runs: list[Run] = []
    for seed in seeds:
        to_do = {cell.name for cell in cells if (cell.name, seed) not in finished}
        needed: set[str] = set()
        for cell in order[::-1]:  # a student comes before its teacher
            if cell.name in to_do | needed and cell.teacher is not None:
                teacher = by_name[cell.teacher]
                if (teacher.name, seed) not in finished or not has_weights(teacher, seed):
                    needed.add(teacher.name)
        runs += [
            Run(cell, seed, again=(cell.name, seed) in finished)
            for cell in order
            if cell.name in to_do | needed
        ]
    backbone = preset.backbone
    if backbone is None or not runs:
        return runs
    known = (backbone.name, BACKBONE_SEED) in finished
    if known and has_weights(backbone, BACKBONE_SEED):
        return runs
    return [Run(backbone, BACKBONE_SEED, again=known), *runs]
