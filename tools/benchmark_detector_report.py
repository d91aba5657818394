"""Tables and files of a run of the detector benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tools.benchmark_report import Table, page, save, significant, with_quartiles


@dataclass(frozen=True)
class Row:
    """One number of one contender in one case.

    Attributes:
        case: its name.
        contender: ``"ours"`` or another; of steps and operators, whose share it is.
        measure: ``"milliseconds"``, ``"MiB"``, ``"forward"`` or ``"backward"`` milliseconds of a
            step, or ``"share"`` of an operator.
        rounds: how many values the median is of; 0 if the contender is missing.
        median: of the rounds; ``low`` and ``high`` are its quartiles.
        ratio: peer over ours, or ours over the other if ``at_most``; the median over the rounds.
        required: bound of ``ratio``.
        at_most: whether ``required`` is the highest or the lowest that is allowed.
        note: why the contender is missing.
    """

    case: str
    contender: str
    measure: str = "milliseconds"
    rounds: int = 0
    median: float | None = None
    low: float | None = None
    high: float | None = None
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    required: float | None = None
    at_most: bool = False
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the ratio is as required; None if nothing is required or measured."""
        if self.required is None or self.ratio is None:
            return None
        return self.ratio <= self.required if self.at_most else self.ratio >= self.required


def verdict(row: Row) -> str:
    """What is required and whether it is met."""
    if row.required is None:
        return ""
    met = {True: "met", False: "NOT MET", None: "not measured"}[row.met]
    return f"{'≤' if row.at_most else '≥'} {row.required:g} {met}"


def tables(rows: Sequence[Row]) -> list[Table]:
    """Arrange rows for reading; tables without any are left out."""
    found = [
        _compared(rows, "milliseconds", "Time", "Milliseconds a call, median and quartiles."),
        _compared(rows, "MiB", "Memory", "Highest use during a call beyond what was there before."),
        _steps(rows),
        _operators(rows),
        _missing(rows),
    ]
    return [table for table in found if table.cells]


def _compared(rows: Sequence[Row], measure: str, title: str, text: str) -> Table:
    cells, last = [], ""
    for row in rows:
        if row.measure == measure and row.rounds:
            cells.append(
                [
                    "" if row.case == last else row.case,
                    row.contender,
                    with_quartiles(row.median, row.low, row.high),
                    _ratio(row),
                    verdict(row),
                ]
            )
            last = row.case
    return Table(
        title,
        f"{text} The ratio is named beside it; of times it is the median of the rounds' own.",
        ("case", "contender", "ms" if measure == "milliseconds" else measure, "ratio", "required"),
        cells,
    )


def _ratio(row: Row) -> str:
    if row.ratio is None:
        return ""
    what = f"ours / {row.contender}" if row.at_most else f"{row.contender} / ours"
    return f"{with_quartiles(row.ratio, row.ratio_low, row.ratio_high)} {what}"


def _steps(rows: Sequence[Row]) -> Table:
    cells: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.measure in ("forward", "backward"):
            cells.setdefault((row.case, row.contender), []).append(significant(row.median))
    return Table(
        "Where a training step spends its time",
        "Milliseconds of ours in each of the detector's methods, forward and in its own part of "
        "the backward pass.",
        ("case", "step", "forward", "backward"),
        [[case, step, *values] for (case, step), values in cells.items()],
    )


def _operators(rows: Sequence[Row]) -> Table:
    shares: dict[str, list[str]] = {}
    for row in rows:
        if row.measure == "share" and row.median is not None:
            text = f"{row.contender.removeprefix('aten::')} {row.median:.0%}"
            shares.setdefault(row.case, []).append(text)
    return Table(
        "Busiest operators of a training step",
        "Shares of the profiler's time, without what an operator calls.",
        ("case", "operators"),
        [[case, ", ".join(found)] for case, found in shares.items()],
    )


def _missing(rows: Sequence[Row]) -> Table:
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if not row.rounds:
            found.setdefault((row.contender, row.note), []).append(row)
    return Table(
        "Not measured",
        "What did not run here, and why; in how many cases, and how many of them require it.",
        ("contender", "reason", "cases", "required"),
        [
            [*key, str(len(missing)), str(sum(row.required is not None for row in missing))]
            for key, missing in found.items()
        ],
    )


def screen(rows: Sequence[Row]) -> str:
    """All tables for a terminal."""
    return "\n\n".join(f"{table.title}\n\n{table.render('simple')}" for table in tables(rows))


def write(folder: Path, name: str, header: dict[str, str], rows: Sequence[Row]) -> list[Path]:
    """Write the page and the rows; see :func:`tools.benchmark_report.save`."""
    about = (
        "Written by `python tools/benchmark_detectors.py`. Full-size detectors with random weights "
        "on random images of one size, seven boxes each. A training step is forward, losses and "
        "backward, in float32, with the configs' dropout; the optimiser's part is the same for all "
        "and left out. Peers have the same weights and are not timed unless detections, losses and "
        "gradients agree (of transformers' models, detections). Contenders take turns, which begin "
        "with a call that is not timed, as steps follow one another in training. "
        "detrex's DN-DETR is kept from moving to CUDA, which it does on any device. "
        "Each contender has a process of its own; memory, gradients included, is taken in another."
    )
    text = page("Detectors on the CPU", about, header, tables(rows))
    return save(folder, name, text, header, rows)
