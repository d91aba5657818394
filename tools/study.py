#!/usr/bin/env python
"""Train and evaluate a matrix of small detectors on generated shapes, and report what comes out.

    python tools/study.py                       # everything that is not finished yet
    python tools/study.py --list
    python tools/study.py --only 'ks_*,detr' --seeds 0 --budget 30
    python tools/study.py --device cuda         # the preset "gpu"
    python tools/study.py --report              # only write report and plots again

A finished run is never made again: it has a row in OUTPUT/runs.csv. To make it again, delete that
row. One that was interrupted goes on from its checkpoint in WORK.

Exit codes: 0 done, or the budget is over; 1 a run failed; 2 wrong input, said in one line; 128 +
signal stopped, with checkpoints saved.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import projects  # noqa: F401  (first: makes detectron2 importable)

# isort: split
import torch

from engine.errors import UserError, did_you_mean, exit_code_of
from projects.study.cells import Cell, Preset
from tools.benchmark_ops import processor
from tools.study_data import make_data
from tools.study_folder import Configs, RunFolder
from tools.study_plan import (
    BACKBONE_SEED,
    check_preset,
    every_cell,
    plan_runs,
    select_cells,
    with_teachers,
)
from tools.study_process import ROOT, WorkLock
from tools.study_report import write_report
from tools.study_results import Facts, Results
from tools.study_runs import Settings, Study, count, say

RESULTS = Path("docs/study")


def parse(arguments: list[str] | None, presets: Mapping[str, Preset]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    about = "; ".join(f"{name}: {preset.about}" for name, preset in presets.items())
    parser.add_argument("--preset", help=f"the matrix ({about.replace('%', '%%')})")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the preset's")
    parser.add_argument("--list", action="store_true", help="show the runs and do nothing")
    parser.add_argument("--report", action="store_true", help="write report and plots, train none")
    parser.add_argument("--only", default="", help="cells, or patterns such as 'ks_*', with commas")
    parser.add_argument("--seeds", type=_seeds, help="with commas (default: the preset's)")
    parser.add_argument("--budget", type=float, metavar="MINUTES", help="stop after that time")
    parser.add_argument("--jobs", type=int, help="trainings at a time (default: the preset's)")
    parser.add_argument("--output", type=Path, help="results (default: docs/study/PRESET)")
    parser.add_argument("--work", type=Path, help="data and runs (default: output/study/PRESET)")
    args = parser.parse_args(arguments)
    if args.preset is None:
        args.preset = "gpu" if args.device == "cuda" else "cpu"
    if args.preset not in presets:
        raise UserError(
            f"--preset: '{args.preset}', expected {' or '.join(presets)}"
            f"{did_you_mean(args.preset, presets)}"
        )
    args.preset = presets[args.preset]
    args.device = args.device or args.preset.device
    args.seeds = args.seeds or args.preset.seeds
    args.jobs = args.preset.jobs if args.jobs is None else args.jobs
    args.output = args.output or RESULTS / args.preset.name
    args.work = args.work or Path("output/study", args.preset.name)
    if args.jobs < 1:
        raise UserError(f"--jobs: {args.jobs}, expected at least 1")
    output = args.output.absolute()
    existing = next(path for path in (output, *output.parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"--output: {existing} is a file, expected a folder")
    if args.budget is not None and not args.budget >= 0:
        raise UserError(f"--budget: {args.budget:g}, expected minutes, at least 0")
    return args


def _seeds(text: str) -> tuple[int, ...]:
    seeds = tuple(dict.fromkeys(int(word) for word in text.split(",")))
    if min(seeds) < 0 or max(seeds) >= 2**32:  # numpy's limit
        raise ValueError(text)
    return seeds


_seeds.__name__ = (
    "seeds (whole numbers from 0 to 4294967295, with commas)"  # what argparse calls the type
)


# --- the steps ----------------------------------------------------------------------------------


def show(args: argparse.Namespace, cells: tuple[Cell, ...], results: Results) -> None:
    """Print a line for each run: how far it is."""
    configs, finished = Configs(args.preset, args.device), results.finished()
    order = with_teachers(args.preset, cells)
    runs = [(cell, seed) for seed in args.seeds for cell in order]
    if args.preset.backbone is not None:
        runs.insert(0, (args.preset.backbone, BACKBONE_SEED))
    wide = max(len(cell.name) for cell, _ in runs)
    lines = []
    for cell, seed in runs:
        row, folder = finished.get((cell.name, seed)), RunFolder(args.work, cell.name, seed)
        if row is not None:
            state = f"finished, AP {row.AP:.1f}"
        elif folder.is_begun(configs.digest(cell)):
            last = configs.of(cell).train.max_iter
            state = f"started, at iteration {folder.iterations_done()} of {last}"
        else:
            state = "to do"
        lines.append(f"{cell.name:{wide}}  seed {seed}  {state}")
    print("\n".join(lines))


def work(args: argparse.Namespace, cells: tuple[Cell, ...], results: Results) -> int:
    """Do the runs that are not finished and return the exit code."""
    deadline = math.inf if args.budget is None else time.monotonic() + 60 * args.budget
    check_device(args.device)
    configs = Configs(args.preset, args.device)
    warn_of_changes(configs, args.preset, results)
    with WorkLock(args.work) as lock:
        plan = plan_runs(
            args.preset,
            cells,
            args.seeds,
            results.finished(),
            lambda cell, seed: RunFolder(args.work, cell.name, seed).has_weights(
                configs.digest(cell)
            ),
        )
        say(f"{count(len(plan), 'run')} to do, {args.jobs} at a time, results in {args.output}")
        datasets = args.work / "data"
        if plan and args.budget != 0:
            make_data(args.preset.shapes, datasets / "shapes")
            if args.preset.backbone is not None:
                make_data(args.preset.backbone_shapes, datasets / "shapes_backbone")
        settings = Settings(args.work, datasets, args.device, args.jobs, deadline)
        study = Study(args.preset, plan, settings, configs, results, facts(args))
        study.execute(lock)
    for run, reason in study.failed.items():
        say(f"failed: {run}: {reason}")
    return 1 if study.failed else 0


def check_device(device: str) -> None:
    """Stop if the machine has no such device."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device: cuda, but this machine has no CUDA: use cpu")


def warn_of_changes(configs: Configs, preset: Preset, results: Results) -> None:
    """Name the cells whose finished runs had other settings than they would have now."""
    digests = {cell.name: configs.digest(cell) for cell in every_cell(preset)}
    changed = [r.cell for r in results.runs if r.config != digests.get(r.cell, r.config)]
    if changed:
        names = ", ".join(dict.fromkeys(changed))
        say(f"finished with other settings than now: {names} (delete the rows to run them again)")


def facts(args: argparse.Namespace) -> Facts:
    """Return what the rows of this call have in common."""
    device = f"{processor()}, {os.cpu_count()} cores"
    if args.device == "cuda":
        device = torch.cuda.get_device_name()
    return Facts(args.preset.name, commit(args.output), device, torch.__version__)


def commit(output: Path) -> str:
    """Return the code's commit, with a "+" if other files than the results have been changed."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = _printed([*git, "rev-parse", "--short", "HEAD"])
        results = {ROOT / RESULTS, output.absolute()}
        left_out = [
            f":(exclude){path.relative_to(ROOT)}" for path in results if ROOT in path.parents
        ]
        changes = _printed([*git, "status", "--porcelain", "--", ".", *left_out])
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head + ("+" if changes else "")


def _printed(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def run(arguments: list[str] | None, presets: Mapping[str, Preset]) -> int:
    """Do what the command line says and return the exit code."""
    args = parse(arguments, presets)
    check_preset(args.preset)
    cells = select_cells(args.preset, [word for word in args.only.split(",") if word])
    results = Results(args.output, args.preset)
    if args.list:
        show(args, cells, results)
        return 0
    code = 0 if args.report else work(args, cells, results)
    if results.runs or args.report:
        say(f"report: {write_report(args.preset, results, args.output)}")
    return code


def main(presets: Mapping[str, Preset], arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and leave with its exit code."""
    sys.exit(exit_code_of(lambda: sys.exit(run(arguments, presets) or None)))


if __name__ == "__main__":
    from projects.study.presets import PRESETS

    main(PRESETS)
