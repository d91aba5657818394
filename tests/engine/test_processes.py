"""Exit codes of runs in several processes."""

import argparse
import atexit
import os
import signal
import time

import pytest
from detectron2.utils import comm
from torch.multiprocessing import ProcessRaisedException

from engine.processes import run_in_processes


def two_processes(**more: int) -> argparse.Namespace:
    """Options of a run in two processes of this machine."""
    return argparse.Namespace(
        opts=[], num_gpus=2, num_machines=1, machine_rank=0, dist_url="auto", **more
    )


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
    assert run_in_processes(_work, two_processes(code=code)) == code


def _fail_late_in_rank_1(_args: argparse.Namespace) -> int:
    if comm.get_rank() == 0:
        raise RuntimeError("[gloo/pair.cc] Connection closed by peer [127.0.0.1]:1")
    time.sleep(1)
    raise ValueError("rank one is broken")


@pytest.mark.usefixtures("former_handlers")
def test_the_error_is_that_of_the_process_that_failed_first():
    with pytest.raises(ProcessRaisedException, match="rank one is broken"):
        run_in_processes(_fail_late_in_rank_1, two_processes())
