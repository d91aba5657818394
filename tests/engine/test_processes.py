"""Exit codes of runs in several processes."""

import argparse
import atexit
import os
import signal

import pytest

from engine.processes import run_in_processes


def _work(args: argparse.Namespace) -> int:
    """Returns a code, in a process that would abort if it cleaned up: its threads may."""
    atexit.register(os.abort)
    if not args.code:
        atexit.unregister(os.abort)
    return args.code


@pytest.fixture
def former_handlers():
    """Puts the signal handlers back that a launcher has replaced."""
    former = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)}
    yield
    for signum, handler in former.items():
        signal.signal(signum, handler)


@pytest.mark.usefixtures("former_handlers")
@pytest.mark.parametrize("code", [0, 2, 143])
def test_the_code_of_the_work_is_that_of_the_run(code):
    args = argparse.Namespace(
        opts=[], num_gpus=2, num_machines=1, machine_rank=0, dist_url="auto", code=code
    )
    assert run_in_processes(_work, args) == code
