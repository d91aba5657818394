"""Exit codes of runs in several processes."""

import argparse
import atexit
import os
import signal
import time

import pytest
from detectron2.utils import comm
from torch.multiprocessing import ProcessRaisedException

from engine.errors import UserError
from engine.processes import run_in_processes


def two_processes(**more: int | str) -> argparse.Namespace:
    """Options of a run in two processes of this machine, or other ones."""
    usual = {"num_gpus": 2, "num_machines": 1, "machine_rank": 0, "dist_url": "auto"}
    return argparse.Namespace(opts=[], **{**usual, **more})


def _work(args: argparse.Namespace) -> int:
    """Returns a code, in a process that would abort if it cleaned up: its threads may."""
    atexit.register(os.abort)
    if not args.code:
        atexit.unregister(os.abort)
    return args.code


@pytest.fixture
def former_handlers():
    """Puts back the handlers that a launcher replaces; sets one that it need not care for."""
    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)
    former = {signum: signal.getsignal(signum) for signum in signals}
    signal.signal(signal.SIGCHLD, lambda *_: None)
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dist_url": "foo"}, "--dist-url is 'foo', expected auto or tcp://HOST:PORT"),
        ({"dist_url": "tcp://127.0.0.1"}, "--dist-url is 'tcp://127.0.0.1', expected auto or tcp"),
        ({"dist_url": "tcp://127.0.0.1:99999"}, "--dist-url is 'tcp://127.0.0.1:99999', expected"),
        ({"dist_url": "tcp://127.0.0.1:x"}, "--dist-url is 'tcp://127.0.0.1:x', expected auto"),
        ({"num_machines": 2}, "--dist-url is auto with 2 machines, expected the first one's tcp"),
        ({"machine_rank": 1}, "--machine-rank is 1, expected 0 to 0"),
    ],
)
def test_processes_that_could_not_meet_are_not_started(options, message):
    with pytest.raises(UserError) as caught:
        run_in_processes(_work, two_processes(**options))
    assert str(caught.value).startswith(message)


def _die(args: argparse.Namespace) -> int:
    if comm.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()
    return 0


def _interrupt_the_launcher(args: argparse.Namespace) -> int:
    """A terminal sends Ctrl-C to every process."""
    os.kill(os.getpid(), signal.SIGINT)
    if comm.get_rank() == 0:
        os.kill(os.getppid(), signal.SIGINT)
    signal.pause()
    return 0


@pytest.mark.usefixtures("former_handlers")
@pytest.mark.parametrize(
    ("work", "code", "said"),
    [(_die, 137, "error: process 1 was ended by SIGKILL\n"), (_interrupt_the_launcher, 130, "")],
)
def test_the_end_by_a_signal(capfd, work, code, said):
    assert run_in_processes(work, two_processes()) == code
    assert capfd.readouterr().err == said
