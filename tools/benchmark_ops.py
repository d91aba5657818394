#!/usr/bin/env python
"""Measure the operators beside what others run, in one process and in turns.

    python tools/benchmark_ops.py
    python tools/benchmark_ops.py --only matcher --repeats 30
    python tools/benchmark_ops.py --device cuda --output docs/benchmarks

A complete run writes ops_<device>.md, .json and .csv to docs/benchmarks; a partial one (--only,
--quick) writes them where --output says, if it says so.

Exit codes: 0 done; 2 wrong input or results that differ, said in one line.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import projects  # noqa: F401  (makes detrex importable)

# isort: split
import torch

from engine.errors import UserError, exit_code_of
from ops._library import backend, cpu_capability
from tools.benchmark_cases import DTYPES, OURS, Case, Contest, all_cases, required
from tools.benchmark_inputs import QUICK, Sizes
from tools.benchmark_measure import FEWEST_ROUNDS, Budget, interleave, ratios, spread
from tools.benchmark_memory import CONTENDERS, encoder_peak
from tools.benchmark_peers import Unavailable
from tools.benchmark_report import Row, screen, significant, verdict, write
from tools.benchmark_roofline import Ceilings, Work, bound, measure_ceilings

COMPLETE_RUN_FOLDER = Path("docs/benchmarks")
MEMORY_REQUIRED = 1.2
MEMORY_CASE = "memory/deformable_encoder/B1"


# --- one case -----------------------------------------------------------------------------------


def check_agreement(case: str, contest: Contest) -> None:
    """Hold every peer's result against ours.

    Raises:
        UserError: they differ by more than the tolerance, relative to the peer's norm.
    """
    own = contest.compared(contest.contenders[OURS]())
    for name, run in contest.contenders.items():
        if name == OURS:
            continue
        for index, (ours, theirs) in enumerate(zip(own, contest.compared(run()), strict=True)):
            norm = theirs.double().norm().item()
            difference = (ours.double() - theirs.double()).norm().item()
            if not difference <= contest.tolerance * norm:
                raise UserError(
                    f"{case}: result {index} of ours and {name} differ by {difference:.3g} in the "
                    f"norm, expected at most {contest.tolerance:g} of {norm:.3g}"
                )


def time_case(
    case: Case, device: str, budget: Budget, ceilings: Ceilings, synchronize: Callable[[], None]
) -> list[Row]:
    """Measure a case; the first row is ours.

    Raises:
        UserError: ours and a peer differ.
    """
    contest = case.prepare()
    check_agreement(case.name, contest)
    times = interleave(contest.contenders, budget, synchronize=synchronize)
    rows = [
        _own_row(row, contest.work, ceilings)
        if row.contender == OURS
        else _peer_row(row, device, times)
        for row in (_time_row(case.name, name, seconds) for name, seconds in times.items())
    ]
    for name, reason in contest.unavailable.items():
        rows.append(Row(case.name, name, required=required(device, case.name, name), note=reason))
    return rows


def _time_row(case: str, contender: str, seconds: Sequence[float]) -> Row:
    summary = spread([1000 * value for value in seconds])
    return Row(
        case,
        contender,
        rounds=len(seconds),
        median=summary.median,
        low=summary.low,
        high=summary.high,
    )


def _own_row(row: Row, work: Work, ceilings: Ceilings) -> Row:
    assert row.median is not None
    lower = bound(work, ceilings)
    return replace(
        row,
        moved=work.moved,
        gathered=work.gathered,
        flops=work.flops,
        memory_bound=1000 * lower.memory,
        compute_bound=1000 * lower.compute,
        share=lower.share(row.median / 1000),
    )


def _peer_row(row: Row, device: str, times: dict[str, list[float]]) -> Row:
    ratio = ratios(times[OURS], times[row.contender])
    return replace(
        row,
        ratio=ratio.median,
        ratio_low=ratio.low,
        ratio_high=ratio.high,
        required=required(device, row.case, row.contender),
    )


def memory_rows(dtype: str, device: str, *, quick: bool) -> list[Row]:
    """Measure the peak extra memory of the encoder's forward."""
    rows = []
    for name in CONTENDERS:
        needed = MEMORY_REQUIRED if name == OURS else None
        row = Row(f"{MEMORY_CASE}/{dtype}", name, measure="MiB", required=needed)
        try:
            peak, output = encoder_peak(name, dtype, device, quick=quick)
        except Unavailable as error:
            rows.append(replace(row, note=str(error)))
            continue
        mebibytes = peak / 2**20
        rows.append(
            replace(
                row,
                rounds=1,
                median=mebibytes,
                low=mebibytes,
                high=mebibytes,
                ratio=peak / output,
            )
        )
    return rows


# --- the machine --------------------------------------------------------------------------------


def processor() -> str:
    """Model of the CPU."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def describe(device: str, ceilings: Ceilings, options: dict[str, str]) -> dict[str, str]:
    """Facts about machine, software and run for the page's head."""
    kernels = backend(device)
    capability = f" ({cpu_capability()})" if kernels == "C++" else ""
    facts = {"device": "the CPU", "processor": f"{processor()}, {os.cpu_count()} cores"}
    if device == "cuda":
        facts["device"] = torch.cuda.get_device_name()
    speeds = [f"{name} {value / 1e9:.0f} GFLOP/s" for name, value in ceilings.flops.items()]
    return {
        **facts,
        "threads": str(torch.get_num_threads()),
        "kernels": kernels + capability,
        "torch": torch.__version__,
        "SciPy": version("scipy"),
        **{package: installed_version(package) for package in ("detrex", "mmcv")},
        "Python": platform.python_version(),
        "memory ceiling": f"{ceilings.bandwidth / 1e9:.1f} GB/s, read and written by a large copy",
        "compute ceiling": f"{', '.join(speeds)} in a large matrix product",
        **options,
        "date": time.strftime("%Y-%m-%d"),
    }


def installed_version(package: str) -> str:
    """Version of a package, or that it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


# --- command line -------------------------------------------------------------------------------


_SECONDS = f"time for a case, but at least {FEWEST_ROUNDS} rounds (%(default)g)"


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """Leave the exit code to :func:`main`."""
        raise UserError(message)


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
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="%(default)s")
    parser.add_argument("--threads", type=int, metavar="N", default=threads, help="%(default)s")
    rounds = parser.add_mutually_exclusive_group()
    rounds.add_argument("--repeats", type=int, metavar="N", help="rounds of a case")
    rounds.add_argument("--seconds", type=float, metavar="S", help=_SECONDS, default=10.0)
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="where the files go")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to see that it works")
    args = parser.parse_args(arguments)
    for name in ("threads", "repeats", "seconds"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name} is {value}, expected more than 0")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device is cuda, but torch finds no CUDA device here")
    if args.quick and args.repeats is None:
        args.repeats = 3
    if args.output is None and not (args.quick or args.only):
        args.output = COMPLETE_RUN_FOLDER
    if args.output is not None and args.output.exists() and not args.output.is_dir():
        raise UserError(f"--output {args.output} is a file, expected a folder")
    return args


def select(names: Sequence[str], pattern: str | None) -> list[str]:
    """Reduce names to those that hold the pattern, or begin with it after a "^".

    Raises:
        UserError: there is none.
    """
    wanted = pattern or ""
    wanted = f"{wanted[1:]}*" if wanted.startswith("^") else f"*{wanted}*"
    chosen = [name for name in names if fnmatchcase(name, wanted)]
    if not chosen:
        raise UserError(f"--only {pattern} matches none of the {len(names)} cases, see --list")
    return chosen


def run(args: argparse.Namespace) -> None:
    """Measure what the command line asks for.

    Raises:
        UserError: nothing matches, results differ, or the files cannot be written.
    """
    sizes = QUICK if args.quick else Sizes()
    if args.device == "cuda" and not args.quick:
        sizes = replace(sizes, encoder_batches=(1, 2, 8))
    timed = {case.name: case for case in all_cases(sizes, args.device)}
    memory = {f"{MEMORY_CASE}/{dtype}": dtype for dtype in DTYPES}
    names = select([*timed, *memory], args.only)
    if args.list:
        print("\n".join(names))
        return
    torch.set_num_threads(args.threads)
    synchronize = torch.cuda.synchronize if args.device == "cuda" else lambda: None
    ceilings = measure_ceilings(args.device, synchronize, quick=args.quick)
    header = describe(args.device, ceilings, _options(args))
    print("\n".join(f"{name:16} {value}" for name, value in header.items()), end="\n\n")
    budget = Budget(args.repeats, args.seconds)
    rows: list[Row] = []
    for index, name in enumerate(names, start=1):
        if name in memory:
            found = memory_rows(memory[name], args.device, quick=args.quick)
        else:
            found = time_case(timed[name], args.device, budget, ceilings, synchronize)
        if args.quick:  # tiny shapes prove nothing
            found = [replace(row, required=None) for row in found]
        print(f"[{index}/{len(names)}] {name}  {'; '.join(_news(found))}", flush=True)
        rows += found
        gc.collect()
    print(f"\n{screen(rows)}")
    if args.output is not None:
        try:
            files = write(args.output, f"ops_{args.device}", header, rows)
        except OSError as error:
            raise UserError(f"cannot write to --output {args.output}: {error.strerror}") from None
        print("\nwritten: " + ", ".join(str(path) for path in files))


def _options(args: argparse.Namespace) -> dict[str, str]:
    rounds = f"{args.seconds:g} s a case" if args.repeats is None else f"{args.repeats} a case"
    options = {"rounds": rounds}
    if args.only:
        options["only"] = f"`{args.only}`"
    if args.quick:
        options["quick"] = "tiny shapes, which prove nothing"
    if args.device == "cpu" and not args.quick:
        options["required"] = "ratios are set for two cores"
    return options


def _news(rows: Sequence[Row]) -> Iterator[str]:
    for row in rows:
        if row.contender == OURS and row.measure == "milliseconds":
            yield f"ours {significant(row.median)} ms"
        elif row.ratio is not None:
            yield f"{row.contender} {significant(row.ratio)}x {verdict(row)}".rstrip()


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    return exit_code_of(lambda: run(parse(arguments)))


if __name__ == "__main__":
    sys.exit(main())
