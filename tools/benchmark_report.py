"""Tables and files of a benchmark run."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from tabulate import tabulate


@dataclass(frozen=True)
class Row:
    """One contender in one case.

    Attributes:
        case: its name.
        contender: ``"ours"`` or a peer.
        measure: ``"milliseconds"``, or ``"MiB"`` of peak extra memory.
        rounds: how many values the median is of; 0 if the contender is missing.
        median: of the rounds; ``low`` and ``high`` are its quartiles.
        ratio: of times peer / ours, the median over the rounds; of memory peak / output.
        required: bound of ``ratio``: at least that for times, at most that for memory.
        note: why the contender is missing.
        moved: bytes that ours has to read and write at least.
        gathered: bytes of bilinear corners, which caches serve.
        flops: that ours has to do at least.
        memory_bound: milliseconds that ``moved`` takes at this machine's bandwidth.
        compute_bound: milliseconds that ``flops`` take at this machine's best.
        share: of the higher bound in ``median``; 1 cannot be beaten.
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
    note: str = ""
    moved: int | None = None
    gathered: int | None = None
    flops: int | None = None
    memory_bound: float | None = None
    compute_bound: float | None = None
    share: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the ratio is as required; None if nothing is required or measured."""
        if self.required is None or self.ratio is None:
            return None
        if self.measure == "MiB":
            return self.ratio <= self.required
        return self.ratio >= self.required


# --- cells --------------------------------------------------------------------------------------


def significant(value: float | None) -> str:
    """Three significant digits without an exponent; a dash for None."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    magnitude = int(f"{value:.2e}".split("e")[1])
    return f"{value:.{max(0, 2 - magnitude)}f}"


def with_quartiles(median: float | None, low: float | None, high: float | None) -> str:
    """The median with its quartiles in brackets if they differ."""
    if median == low == high:
        return significant(median)
    return f"{significant(median)} ({significant(low)}–{significant(high)})"


def verdict(row: Row) -> str:
    """What is required and whether it is met."""
    if row.required is None:
        return ""
    sign = "≤" if row.measure == "MiB" else "≥"
    met = {True: "met", False: "NOT MET", None: "not measured"}[row.met]
    return f"{sign} {row.required:g} {met}"


# --- tables -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """A title, what its columns mean, and the cells."""

    title: str
    text: str
    columns: Sequence[str]
    cells: list[list[str]]

    def render(self, style: str) -> str:
        """Lay the cells out in one of tabulate's formats."""
        # numbers are formatted already and must stay as they are
        return tabulate(self.cells, self.columns, tablefmt=style, disable_numparse=True)


def tables(rows: Sequence[Row]) -> list[Table]:
    """Arrange rows for reading; tables without any are left out."""
    found = [_times(rows), _memory(rows), _bounds(rows), _missing(rows)]
    return [table for table in found if table.cells]


def _times(rows: Sequence[Row]) -> Table:
    cells, last = [], ""
    for row in rows:
        if row.measure == "milliseconds" and row.rounds:
            time = with_quartiles(row.median, row.low, row.high)
            ratio = "" if row.ratio is None else _ratio(row)
            case = "" if row.case == last else row.case
            cells.append([case, row.contender, time, ratio, verdict(row), str(row.rounds)])
            last = row.case
    return Table(
        "Time",
        "Milliseconds a call, median and quartiles of the rounds. The ratio is the peer's time "
        "over ours, the median of the rounds' own ratios.",
        ("case", "contender", "ms", "peer / ours", "required", "rounds"),
        cells,
    )


def _ratio(row: Row) -> str:
    return with_quartiles(row.ratio, row.ratio_low, row.ratio_high)


def _memory(rows: Sequence[Row]) -> Table:
    cells = [
        [row.case, row.contender, significant(row.median), significant(row.ratio), verdict(row)]
        for row in rows
        if row.measure == "MiB" and row.rounds
    ]
    return Table(
        "Memory",
        "Highest use during a forward call less what was in use before it, the output included.",
        ("case", "contender", "MiB", "peak / output", "required"),
        cells,
    )


def _bounds(rows: Sequence[Row]) -> Table:
    cells = [
        [
            row.case,
            significant(None if row.moved is None else row.moved / 1e6),
            significant(None if not row.gathered else row.gathered / 1e6),
            significant(None if not row.flops else row.flops / 1e9),
            significant(row.memory_bound),
            significant(row.compute_bound or None),
            significant(row.median),
            f"{row.share:.0%}",
        ]
        for row in rows
        if row.share is not None
    ]
    return Table(
        "Ours against the machine",
        "What has to be moved (each input read once, each output written once) and computed, the "
        "milliseconds that takes at the ceilings above, and the share of the higher bound that "
        "ours reaches. Small inputs stay in caches from round to round, so they may come faster "
        "than memory allows. Gathered bytes, the corners of bilinear samples, come from caches for "
        "the most part and bound nothing by themselves.",
        (
            "case",
            "moved MB",
            "gathered MB",
            "GFLOP",
            "memory bound ms",
            "compute bound ms",
            "ours ms",
            "reached",
        ),
        cells,
    )


def _missing(rows: Sequence[Row]) -> Table:
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if not row.rounds:
            found.setdefault((row.contender, row.note), []).append(row)
    cells = [
        [
            contender,
            note,
            str(len(missing)),
            str(sum(row.required is not None for row in missing)),
            missing[0].case,
        ]
        for (contender, note), missing in found.items()
    ]
    return Table(
        "Not measured",
        "What did not run here, and why; in how many cases, and how many of them require it.",
        ("contender", "reason", "cases", "required", "the first of them"),
        cells,
    )


# --- files --------------------------------------------------------------------------------------


def screen(rows: Sequence[Row]) -> str:
    """All tables for a terminal."""
    return "\n\n".join(f"{table.title}\n\n{table.render('simple')}" for table in tables(rows))


def markdown(header: dict[str, str], rows: Sequence[Row]) -> str:
    """The whole page."""
    about = (
        "Written by `python tools/benchmark_ops.py`. Contenders run in one process and take turns; "
        "before they are timed, results are held against each other. bfloat16 means the values, or "
        "query, key and value; locations, weights, centers and precision are float32 beside them. "
        "Peers that sample in float32 are timed with the conversion."
    )
    return page(f"Operators on {header['device']}", about, header, tables(rows))


def page(title: str, about: str, header: dict[str, str], sections: Sequence[Table]) -> str:
    """A page in Markdown: what it is about, the facts of the run, the tables."""
    facts = Table("", "", ("", ""), [[name, value] for name, value in header.items()])
    parts = [f"# {title}", about, facts.render("github")]
    for table in sections:
        parts += [f"## {table.title}", table.text, table.render("github")]
    return "\n\n".join(parts) + "\n"


def as_json(header: dict[str, str], rows: Sequence[Any]) -> str:
    """Header and rows, which are dataclasses with a verdict ``met``."""
    return json.dumps({"header": header, "rows": list(_records(rows))}, indent=1) + "\n"


def as_csv(rows: Sequence[Any]) -> str:
    """Rows alone, at least one of them."""
    text = io.StringIO()
    names = [*(field.name for field in fields(rows[0])), "met"]
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(_records(rows))
    return text.getvalue()


def _records(rows: Iterable[Any]) -> Iterable[dict]:
    for row in rows:
        yield {**asdict(row), "met": row.met}


def write(folder: Path, name: str, header: dict[str, str], rows: Sequence[Row]) -> list[Path]:
    """Write ``name.md``, ``.json`` and ``.csv`` as :func:`save` does."""
    return save(folder, name, markdown(header, rows), header, rows)


def save(
    folder: Path, name: str, text: str, header: dict[str, str], rows: Sequence[Any]
) -> list[Path]:
    """Write a page as ``name.md``, its rows as ``.json`` and ``.csv``, aside and then renamed.

    Returns:
        the files.

    Raises:
        OSError: they cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    contents = {
        folder / f"{name}.md": text,
        folder / f"{name}.json": as_json(header, rows),
        folder / f"{name}.csv": as_csv(rows),
    }
    for path, content in contents.items():
        path.with_name(path.name + ".partial").write_text(content, encoding="utf-8")
    for path in contents:
        os.replace(path.with_name(path.name + ".partial"), path)
    return list(contents)
