"""Runs of the tiny detector and what they leave behind."""

import json
import multiprocessing
import re
import shutil
import sys
from argparse import Namespace
from pathlib import Path

from engine.errors import exit_code_of
from engine.run import main

_VARIES = re.compile("time|eta|mem")
CONFIG = Path(__file__).with_name("tiny_config.py")


def run_tiny(output, *overrides, resume=False, eval_only=False, config=CONFIG):
    """Train or evaluate the tiny detector, or that of another config, in this process."""
    args = Namespace(
        config_file=str(config),
        opts=[f"train.output_dir={output}", *overrides],
        resume=resume,
        eval_only=eval_only,
    )
    return main(args)


def fork_tiny(output, *overrides, **options):
    """Start such a run in a process of its own; its exit code is that of the command."""

    def work():
        sys.exit(exit_code_of(lambda: run_tiny(output, *overrides, **options)))

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


def metrics(output):
    """What metrics.json says per iteration, without times."""
    result = {}
    for line in Path(output, "metrics.json").read_text().splitlines():
        record = json.loads(line)
        assert not set(record) & set(result.get(record["iteration"], {})) - {"iteration"}, "twice"
        result.setdefault(record["iteration"], {}).update(record)
    return {
        i: {k: repr(v) for k, v in record.items() if not _VARIES.search(k)}
        for i, record in result.items()
    }


def continue_from(source, target, iteration):
    """Make ``target`` look as if the run in ``source`` was killed after that iteration's save."""
    Path(target).mkdir()
    name = f"model_{iteration:07d}.pth"
    shutil.copy(Path(source, name), target)
    for kept in ("metrics.json", "model_best.pth"):
        if Path(source, kept).is_file():
            shutil.copy(Path(source, kept), target)
    Path(target, "last_checkpoint").write_text(name)
