#!/usr/bin/env python
"""Measure the detectors beside other packages' and the methods over their baselines, on the CPU.

    python tools/benchmark_detectors.py --detrex-root ../detrex
    python tools/benchmark_detectors.py --only conditional_detr/480x640 --repeats 3
    python tools/benchmark_detectors.py --config-file FILE --over BASELINE_FILE

detrex takes part if detectron2 and detrex are installed and --detrex-root names a checkout, whose
projects hold its detectors; Hugging Face's models if transformers is installed. Each contender runs
in a process of its own, which keeps freed memory if its package's training does. A complete run
writes detectors_cpu.md, .json and .csv to docs/benchmarks; a partial one writes them where --output
says, if it says so, and so does one with --amp.

Exit codes: 0 done; 2 wrong input or results that differ, said in one line.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import projects  # first: makes detectron2 importable

# isort: split
import torch

from engine.errors import UserError, exit_code_of
from ops._library import backend, cpu_capability
from tools.benchmark_detector_cases import (
    BASELINE,
    MEMORY,
    OURS,
    STEPS,
    SUBJECTS,
    Case,
    Contest,
    all_cases,
    check_agreement,
    over,
    prepare,
)
from tools.benchmark_detector_process import callers, peak, steps
from tools.benchmark_detector_report import Row, screen, verdict, write
from tools.benchmark_measure import Budget, interleave, ratios, spread
from tools.benchmark_ops import COMPLETE_RUN_FOLDER, Parser, installed_version, processor, select
from tools.benchmark_peers import Unavailable
from tools.benchmark_report import significant

SIZES = ((480, 640), (800, 1066))
QUICK_SIZES = ((64, 96),)


# --- one case -----------------------------------------------------------------------------------


def time_rows(case: Case, contest: Contest, args: argparse.Namespace) -> list[Row]:
    """Measure all contenders in turns; the first row is ours.

    Raises:
        UserError: ours and a peer differ, or a process ended.
    """
    check_agreement(case, contest)
    names = tuple(contest.models)
    with callers(case, names, args.detrex_root, args.all_keep_memory) as runs:
        times = interleave(runs, Budget(args.repeats), lead_in=True)
    rows = []
    for name, seconds in times.items():
        summary = spread([1000 * value for value in seconds])
        row = Row(case.name, name, "milliseconds", len(seconds), *vars(summary).values())
        if name != OURS:
            row = _bounded(case, row)
            pair = (times[name], times[OURS]) if row.at_most else (times[OURS], times[name])
            ratio = ratios(*pair)
            row = replace(row, ratio=ratio.median, ratio_low=ratio.low, ratio_high=ratio.high)
        rows.append(row)
    return rows


def _bounded(case: Case, row: Row) -> Row:
    """A row with what is required; beside baselines, and of memory, ours is the numerator."""
    bound = case.required(row.contender)
    at_most = row.contender == BASELINE or case.measure == MEMORY
    return replace(row, required=None if bound is None else bound.value, at_most=at_most)


def memory_rows(case: Case, detrex_root: Path | None) -> list[Row]:
    """Measure each contender in a process of its own; the first row is ours."""
    rows: list[Row] = []
    for name in case.subject.contenders:
        row = Row(case.name, name, "MiB")
        row = row if name == OURS else _bounded(case, row)
        try:
            mebibytes = peak(case, name, detrex_root) / 2**20
        except Unavailable as error:
            rows.append(replace(row, note=str(error)))
            continue
        row = replace(row, rounds=1, median=mebibytes, low=mebibytes, high=mebibytes)
        own = rows[0].median if rows else None
        if own is not None:
            ratio = own / mebibytes
            row = replace(row, ratio=ratio, ratio_low=ratio, ratio_high=ratio)
        rows.append(row)
    return rows


def step_rows(case: Case, repeats: int) -> list[Row]:
    """Where ours spends the time of a training step, by method and by operator."""
    rounds, operators = steps(case, repeats)
    rows = []
    for values in zip(*rounds, strict=True):
        for part in ("forward", "backward"):
            summary = spread([1000 * getattr(value, part) for value in values])
            rows.append(Row(case.name, values[0].step, part, repeats, *vars(summary).values()))
    for operator, share in operators:
        rows.append(Row(case.name, operator, "share", 1, share, share, share))
    return rows


# --- the command line ---------------------------------------------------------------------------


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line.

    Raises:
        UserError: it is wrong.
    """
    parser = Parser(description=__doc__.splitlines()[0])
    threads = torch.get_num_threads()
    parser.add_argument(
        "--only",
        metavar="PATTERN",
        help="cases whose name holds it (^: begins with it), * as usual",
    )
    parser.add_argument("--list", action="store_true", help="print the names of the cases and stop")
    parser.add_argument("--config-file", metavar="FILE", help="a method to measure, with --over")
    parser.add_argument("--over", metavar="FILE", help="config of the method's baseline")
    parser.add_argument("--detrex-root", type=Path, metavar="FOLDER", help="a checkout of detrex")
    parser.add_argument("--threads", type=int, metavar="N", default=threads, help="%(default)s")
    parser.add_argument("--repeats", type=int, metavar="N", default=5, help="rounds (%(default)s)")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="where the files go")
    parser.add_argument(
        "--all-keep-memory",
        action="store_true",
        help="let peers keep freed memory too, which their own training does not",
    )
    parser.add_argument("--amp", action="store_true", help="autocast forward passes to bfloat16")
    parser.add_argument("--quick", action="store_true", help="tiny images, to see that it works")
    args = parser.parse_args(arguments)
    for name in ("threads", "repeats"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} is {getattr(args, name)}, expected 1 or more")
    if (args.config_file is None) != (args.over is None):
        raise UserError("--config-file and --over belong together: a method and its baseline")
    if args.detrex_root is not None and not list(args.detrex_root.glob("projects/*/modeling")):
        raise UserError(
            f"--detrex-root {args.detrex_root} has no projects/*/modeling as detrex has"
        )
    if args.output is None and not (args.quick or args.only or args.over or args.amp):
        args.output = COMPLETE_RUN_FOLDER
    if args.output is not None and args.output.exists() and not args.output.is_dir():
        raise UserError(f"--output {args.output} is a file, expected a folder")
    return args


def describe(args: argparse.Namespace) -> dict[str, str]:
    """Facts about machine, software and run for the page's head."""
    kernels = backend("cpu")
    return {
        "processor": f"{processor()}, {os.cpu_count()} cores",
        "threads": str(torch.get_num_threads()),
        "kernels": kernels + (f" ({cpu_capability()})" if kernels == "C++" else ""),
        "torch": torch.__version__,
        "runtime": projects.RUNTIME,
        "transformers": installed_version("transformers"),
        "Python": platform.python_version(),
        "rounds": f"{args.repeats} a case",
        **({"only": f"`{args.only}`"} if args.only else {}),
        **({"quick": "tiny images, which prove nothing"} if args.quick else {}),
        **({"precision": "forward passes autocast to bfloat16"} if args.amp else {}),
        "freed memory": "kept by " + ("all" if args.all_keep_memory else "ours"),
        "required": "nothing" if args.amp else "ratios are set for two cores",
        "date": time.strftime("%Y-%m-%d"),
    }


def run(args: argparse.Namespace) -> None:
    """Measure what the command line asks for.

    Raises:
        UserError: nothing matches, results differ, or the files cannot be written.
    """
    subjects = SUBJECTS
    if args.over is not None:
        method, baseline = (str(Path(file).resolve()) for file in (args.config_file, args.over))
        subjects = (over(method, baseline),)
    sizes = QUICK_SIZES if args.quick else SIZES
    cases = {case.name: replace(case, amp=args.amp) for case in all_cases(subjects, sizes)}
    names = select(list(cases), args.only)
    if args.list:
        print("\n".join(names))
        return
    torch.set_num_threads(args.threads)
    header = describe(args)
    print("\n".join(f"{name:14} {value}" for name, value in header.items()), end="\n\n")
    rows: list[Row] = []
    files: list[Path] = []
    for found in _measure([cases[name] for name in names], args):
        if args.quick:  # tiny images prove nothing
            found = [replace(row, required=None) for row in found]
        rows += found
        files = [] if args.output is None else _write(args.output, header, rows)
        news = "; ".join(_news(found))
        print(f"{found[0].case}  {news}", flush=True)
    print(f"\n{screen(rows)}")
    if files:
        print("\nwritten: " + ", ".join(str(path) for path in files))


def _write(folder: Path, header: dict[str, str], rows: Sequence[Row]) -> list[Path]:
    """Write the files after each case, as a run takes long."""
    try:
        return write(folder, "detectors_cpu", header, rows)
    except OSError as error:
        raise UserError(f"cannot write to --output {folder}: {error.strerror}") from None


def _measure(cases: Sequence[Case], args: argparse.Namespace) -> Iterator[list[Row]]:
    """Measure case after case; models live as long as their subject's cases."""
    for subject, group in groupby(cases, key=lambda case: case.subject):
        contest = None
        for case in group:
            if case.measure == MEMORY:
                yield memory_rows(case, args.detrex_root)
                continue
            if case.measure == STEPS:
                yield step_rows(case, args.repeats)
                continue
            contest = contest or prepare(subject, args.detrex_root)
            rows = time_rows(case, contest, args)
            for name, reason in contest.unavailable.items():
                rows.append(_bounded(case, Row(case.name, name, note=reason)))
            yield rows
        gc.collect()


def _news(rows: Sequence[Row]) -> Iterator[str]:
    for row in rows:
        if row.contender == OURS:
            unit = "ms" if row.measure == "milliseconds" else "MiB"
            yield f"ours {significant(row.median)} {unit}"
        elif row.ratio is not None:
            yield f"{row.contender} {significant(row.ratio)} {verdict(row)}".rstrip()
        elif row.measure in ("forward", "backward"):
            yield f"{row.contender} {row.measure} {significant(row.median)} ms"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    return exit_code_of(lambda: run(parse(arguments)))


if __name__ == "__main__":
    sys.exit(main())
