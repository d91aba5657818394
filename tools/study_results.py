"""Results of a study as tables: one row per run, one row per evaluation."""

from __future__ import annotations

import csv
import io
import math
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from engine.checkpoint import write_atomically
from engine.errors import UserError
from projects.study.cells import Cell, Preset
from tools.plot_metrics import evaluated_branches, read_metrics, series
from tools.study_folder import RunFolder
from tools.study_plan import every_cell

__all__ = ["CurveRow", "Facts", "Results", "RunRow", "read_rows", "rows_of_run", "write_rows"]


@dataclass(frozen=True)
class RunRow:
    """A finished run; the columns of ``runs.csv``.

    Attributes:
        preset: the matrix.
        cell: name of the training in it.
        seed: of the training.
        config: digest of the settings (:meth:`tools.study_folder.Configs.digest`).
        commit: the code's, with a "+" if files had been changed.
        device: processor or GPU.
        torch: version.
        iterations: trained.
        wall_s: seconds from start to end, evaluations, loading and repeated work included.
        step_s: seconds of an iteration, the median.
        peak_mb: highest memory: the process's on a CPU, torch's on a GPU.
        AP: of the last weights, as are the others; nan if there is nothing to measure it on.
    """

    preset: str
    cell: str
    seed: int
    config: str
    commit: str
    device: str
    torch: str
    iterations: int
    wall_s: float
    step_s: float
    peak_mb: float
    AP: float
    AP50: float
    AP75: float
    APs: float
    APm: float
    APl: float


@dataclass(frozen=True)
class CurveRow:
    """An evaluation; the columns of ``curves.csv``.

    Attributes:
        cell: name of the training.
        seed: of the training.
        branch: what was evaluated; empty for the detector itself, which is the student of a model
            that has branches.
        iteration: how many were done.
        wall_s: seconds in these iterations, without evaluations and loading.
        AP: of these weights, as is AP50.
    """

    cell: str
    seed: int
    branch: str
    iteration: int
    wall_s: float
    AP: float
    AP50: float


Row = TypeVar("Row", RunRow, CurveRow)


# --- files --------------------------------------------------------------------------------------


def read_rows(path: Path, kind: type[Row]) -> list[Row]:
    """Read a table; none if there is no such file.

    Raises:
        UserError: it has other columns, or a value of another type.
    """
    if not path.is_file():
        return []
    types = {field.name: _TYPES[str(field.type)] for field in fields(kind)}
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != list(types):
            raise UserError(f"{path}: the columns are not {', '.join(types)}")
        rows = []
        for record in reader:
            try:
                rows.append(kind(**{name: types[name](record[name]) for name in types}))
            except (TypeError, ValueError) as error:
                raise UserError(f"{path}, line {reader.line_num}: {error}") from None
    return rows


_TYPES: dict[str, Any] = {"str": str, "int": int, "float": float}


def write_rows(path: Path, rows: Iterable[Row], kind: type[Row]) -> None:
    """Replace a table."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(kind)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))


class Results:
    """The tables of a study, in memory and in its folder.

    Args:
        folder: holds ``runs.csv`` and ``curves.csv``.
        preset: whose order of cells the tables follow.

    Attributes:
        runs: one row per finished run.
        curves: one row per evaluation of a finished run.
    """

    def __init__(self, folder: Path, preset: Preset) -> None:
        self._folder = folder
        self._order = {cell.name: index for index, cell in enumerate(every_cell(preset))}
        self.runs = read_rows(folder / "runs.csv", RunRow)
        self.curves = read_rows(folder / "curves.csv", CurveRow)

    def finished(self) -> dict[tuple[str, int], RunRow]:
        """Return the rows by cell name and seed."""
        return {(row.cell, row.seed): row for row in self.runs}

    def add(self, run: RunRow, curves: Sequence[CurveRow]) -> None:
        """Take in a run and write both tables."""
        self.curves = self._sorted([*self._without(self.curves, run), *curves])
        self.runs = self._sorted([*self._without(self.runs, run), run])
        write_rows(self._folder / "curves.csv", self.curves, CurveRow)
        write_rows(self._folder / "runs.csv", self.runs, RunRow)  # last: it says what is finished

    @staticmethod
    def _without(rows: Iterable[Row], run: RunRow) -> list[Row]:
        return [row for row in rows if (row.cell, row.seed) != (run.cell, run.seed)]

    def _sorted(self, rows: Iterable[Row]) -> list[Row]:
        last = len(self._order)
        return sorted(rows, key=lambda row: (self._order.get(row.cell, last), row.cell, row.seed))


# --- from what a training has logged ------------------------------------------------------------


@dataclass(frozen=True)
class Facts:
    """What the rows of one call have in common; see :class:`RunRow`."""

    preset: str
    commit: str
    device: str
    torch: str


def rows_of_run(
    folder: RunFolder, cell: Cell, seed: int, digest: str, facts: Facts
) -> tuple[RunRow, list[CurveRow]]:
    """Return what a finished run has come to.

    Raises:
        UserError: it has logged no evaluation of its last weights.
    """
    records = read_metrics(folder.metrics) if folder.metrics.is_file() else []
    final = records[-1] if records else {}
    steps, times = series(records, "time")
    if "bbox/AP" not in final or not steps:
        raise UserError(f"{folder.metrics} holds no final evaluation")
    numbers: dict[str, Any] = {name: round(float(final[f"bbox/{name}"]), 3) for name in _PRECISIONS}
    row = RunRow(
        cell=cell.name,
        seed=seed,
        config=digest,
        iterations=final["iteration"],
        wall_s=round(folder.seconds(), 1),
        step_s=round(statistics.median(times), 5),
        peak_mb=round(_peak_megabytes(folder, records), 1),
        **asdict(facts),
        **numbers,
    )
    return row, _curves(records, cell.name, seed, row.iterations)


_PRECISIONS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def _curves(records: list[dict[str, Any]], cell: str, seed: int, last: int) -> list[CurveRow]:
    rows = []
    for branch in ("", *evaluated_branches(records)):
        prefix = f"{branch}/bbox" if branch else "bbox"
        iterations, precisions = series(records, f"{prefix}/AP")
        at_half = dict(zip(*series(records, f"{prefix}/AP50"), strict=True))
        for iteration, precision in zip(iterations, precisions, strict=True):
            done = min(iteration + 1, last)  # the last evaluation is logged one later
            rows.append(
                CurveRow(
                    cell,
                    seed,
                    branch,
                    done,
                    round(_seconds_until(records, done), 1),
                    round(precision, 3),
                    round(at_half.get(iteration, math.nan), 3),
                )
            )
    return rows


def _seconds_until(records: list[dict[str, Any]], done: int) -> float:
    """Time in the first ``done`` iterations: each takes the median that is logged next."""
    total, counted, seconds = 0.0, 0, 0.0
    for iteration, seconds in zip(*series(records, "time"), strict=True):
        upto = min(iteration + 1, done)
        total += max(0, upto - counted) * seconds
        counted = max(counted, upto)
    return total + (done - counted) * seconds


def _peak_megabytes(folder: RunFolder, records: list[dict[str, Any]]) -> float:
    """The highest of all parts: logged as a number on a CPU, in the lines of log.txt on a GPU."""
    _, peaks = series(records, "max_mem_MB[metric]")
    if not peaks and folder.log.is_file():
        found = re.findall(r"max_mem: (\d+)M", folder.log.read_text(errors="replace"))
        peaks = [float(value) for value in found]
    return max(peaks, default=math.nan)
