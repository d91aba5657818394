"""The report of a study, written from its tables."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from tabulate import tabulate

from engine.checkpoint import write_atomically
from projects.study.cells import Cell, Preset
from tools.study_data import data_options
from tools.study_plan import every_cell
from tools.study_plots import draw
from tools.study_results import Results, RunRow
from tools.study_statistics import Summary, gains, paired, summarise

__all__ = ["groups", "write_report"]

ABOUT = """\
Small detectors, trained on generated shapes: a comparison at small scale, not COCO. A
gain here says that a method helps in this setting, not how much it would help elsewhere. What its
paper reports on COCO stands beside it, for orientation."""

COLUMNS = """\
AP, AP50 and AP75 are COCO's, of the last weights on the validation images: mean ± standard
deviation over the seeds. *Gain* is the mean over the seeds of the difference in AP to the named
baseline with the same seed, ± its standard error, and *better* in how many seeds it is above 0.
Seconds per iteration are medians, also over the seeds, measured while other trainings ran on
the same machine; × is the ratio to the baseline's. MB is the highest memory: of the process on
a CPU, of torch's tensors on a GPU. Every run is in [runs.csv](runs.csv), every evaluation on
the way in [curves.csv](curves.csv)."""

HEADINGS = (
    *("method", "seeds", "AP", "AP50", "AP75", "baseline", "gain", "better"),
    *("s / iteration", "×", "MB", "paper, COCO"),
)


def write_report(preset: Preset, results: Results, folder: Path) -> Path:
    """Write ``report.md`` and its pictures into a folder and return the report's path.

    A file ``notes.md`` in the folder is taken over at the end as it is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pictures = draw(preset, results, folder)
    parts = [f"# The study `{preset.name}`", preset.about, ABOUT, _facts(preset, results.runs)]
    parts += [COLUMNS, *_pictures(pictures, None)]
    for group, cells in groups(preset).items():
        parts += [f"## {group}", _table(preset, cells, results.runs), *_pictures(pictures, group)]
    notes = folder / "notes.md"
    if notes.is_file():
        parts += ["## Notes", notes.read_text(encoding="utf-8").strip()]
    text = "\n\n".join(parts) + "\n"
    path = folder / "report.md"
    write_atomically(path, lambda file: file.write(text.encode()))
    return path


def groups(preset: Preset) -> dict[str, list[Cell]]:
    """Return the preset's cells by their headings."""
    found: dict[str, list[Cell]] = {}
    for cell in preset.cells:
        found.setdefault(cell.group, []).append(cell)
    return found


def _pictures(pictures: dict[str, str | None], group: str | None) -> list[str]:
    return [f"![{name}]({name})" for name, owner in pictures.items() if owner == group]


# --- the head -----------------------------------------------------------------------------------


def _facts(preset: Preset, rows: Sequence[RunRow]) -> str:
    known = [row for row in rows if row.cell in {cell.name for cell in preset.cells}]
    planned = len(preset.cells) * len(preset.seeds)
    facts = {
        "command": f"`python tools/study.py --preset {preset.name}`",
        "data": f"`python tools/make_shapes.py {' '.join(data_options(preset.shapes))}`",
        "seeds": f"{_listed(preset.seeds)} for each method, fixed before the runs",
        "runs": f"{sum(row.seed in preset.seeds for row in known)} of {planned}",
        "at a time": f"{preset.jobs}, unless `--jobs` said otherwise",
        "iterations": _iterations(preset, known),
        "machine": _listed(row.device for row in known),
        "torch": _listed(row.torch for row in known),
        "commit": _listed(row.commit or "unknown" for row in known),
        **_backbone(preset, rows),
        **_remarks(preset, rows, known),
    }
    # a name per line: the facts are text, and some of them long
    return "\n".join(f"- {name}: {text or '–'}" for name, text in facts.items())


def _backbone(preset: Preset, rows: Sequence[RunRow]) -> dict[str, str]:
    """What all trainings start from, if it is trained too."""
    if preset.backbone is None:
        return {}
    own = [row for row in rows if row.cell == preset.backbone.name]
    trained = f"{own[0].iterations} iterations, AP {own[0].AP:.1f} there" if own else "not run"
    options = " ".join(data_options(preset.backbone_shapes))
    return {
        "backbone": f"all start from that of {preset.backbone.title}, trained once ({trained}) on "
        f"other images, `python tools/make_shapes.py {options}`; the rest from random weights"
    }


def _remarks(preset: Preset, rows: Sequence[RunRow], known: Sequence[RunRow]) -> dict[str, str]:
    """What a reader must know because the runs are not as planned."""
    remarks = {
        "other seeds, run too": _listed(r.seed for r in known if r.seed not in preset.seeds),
        "in runs.csv, but no longer in the matrix": _listed(
            row.cell for row in rows if row.cell not in {c.name for c in every_cell(preset)}
        ),
        "runs that differ in more than the seed": _listed(
            cell.title
            for cell in preset.cells
            if len({(r.config, r.device) for r in known if r.cell == cell.name}) > 1
        ),
    }
    return {name: text for name, text in remarks.items() if text}


def _iterations(preset: Preset, rows: Sequence[RunRow]) -> str:
    """The iterations of most methods, then who has others."""
    titles: dict[int, list[str]] = {}
    for cell in preset.cells:
        for iterations in sorted({row.iterations for row in rows if row.cell == cell.name}):
            titles.setdefault(iterations, []).append(cell.title)
    by_number = sorted(titles, key=lambda iterations: -len(titles[iterations]))
    texts = [f"{iterations} ({', '.join(titles[iterations])})" for iterations in by_number[1:]]
    return "; ".join([*map(str, by_number[:1]), *texts])


def _listed(values: Iterable[object]) -> str:
    return ", ".join(dict.fromkeys(str(value) for value in values))


# --- the tables ---------------------------------------------------------------------------------


def _table(preset: Preset, cells: Sequence[Cell], rows: Sequence[RunRow]) -> str:
    titles = {cell.name: cell.title for cell in preset.cells}
    lines = [_line(preset, cell, titles, rows) for cell in cells]
    return tabulate(lines, HEADINGS, tablefmt="github", disable_numparse=True)


def _line(preset: Preset, cell: Cell, titles: dict[str, str], rows: Sequence[RunRow]) -> list[str]:
    own = [row for row in rows if row.cell == cell.name]
    claim = cell.claim or "–"
    if not own:
        return [cell.title, "not run", *["–"] * (len(HEADINGS) - 3), claim]

    def over_seeds(value: Callable[[RunRow], float]) -> Summary:
        return summarise([value(row) for row in own])

    pairs = paired(rows, cell.name, cell.baseline)
    gain = summarise(gains(rows, cell.name, cell.baseline))
    ratios = [row.step_s / other.step_s for row, other in pairs]
    return [
        cell.title,
        _seeds(preset, own),
        _with_spread(over_seeds(lambda row: row.AP)),
        _with_spread(over_seeds(lambda row: row.AP50)),
        _with_spread(over_seeds(lambda row: row.AP75)),
        titles[cell.baseline] if cell.baseline else "–",
        _gain(gain),
        f"{gain.positive}/{gain.count}" if gain.count else "–",
        _number(_median([row.step_s for row in own]), ".3f"),
        _number(_median(ratios), ".2f"),
        _number(max(row.peak_mb for row in own), ".0f"),
        claim,
    ]


def _median(values: Sequence[float]) -> float:
    """A time that one run on a busy machine does not spoil; nan without any."""
    return statistics.median(values) if values else math.nan


def _seeds(preset: Preset, own: Sequence[RunRow]) -> str:
    missing = set(preset.seeds) - {row.seed for row in own}
    return (
        f"{len(preset.seeds) - len(missing)} of {len(preset.seeds)}" if missing else f"{len(own)}"
    )


def _with_spread(summary: Summary) -> str:
    spread = "" if math.isnan(summary.deviation) else f" ± {summary.deviation:.1f}"
    return _number(summary.mean, ".1f") + spread


def _gain(gain: Summary) -> str:
    error = "" if math.isnan(gain.error) else f" ± {gain.error:.1f}"
    return _number(gain.mean, "+.1f") + error


def _number(value: float, form: str) -> str:
    return "–" if math.isnan(value) else format(value, form)
