#!/usr/bin/env python
"""Train or evaluate a detector that a LazyConfig file describes.

    python tools/train_net.py --config-file FILE [key=value ...]
    python tools/train_net.py --config-file FILE --resume
    python tools/train_net.py --config-file FILE --eval-only train.init_checkpoint=FILE
    torchrun --nproc-per-node 2 tools/train_net.py --config-file FILE

Exit codes: 0 done; 2 wrong input, said in one line; 128 + signal stopped with a checkpoint saved.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import projects  # first: makes detectron2 importable

# isort: split
from detectron2.engine import default_argument_parser

from engine.errors import exit_code_of
from engine.processes import run_in_processes
from engine.run import main


def work(args: argparse.Namespace) -> int:
    """Do one process's part and return its exit code."""
    return exit_code_of(lambda: main(args, projects.RUNTIME), traceback=args.traceback)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read detectron2's command line, plus ``--traceback``."""
    parser = default_argument_parser(epilog=__doc__)
    parser.add_argument("--traceback", action="store_true", help="show where an error arose")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    args = parse()
    sys.exit(exit_code_of(lambda: sys.exit(run_in_processes(work, args)), traceback=args.traceback))
