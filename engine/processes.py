"""One or several processes: started here, or by torchrun."""

import argparse
import contextlib
import logging
import multiprocessing
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from multiprocessing import resource_tracker
from urllib.parse import urlsplit

import torch
from detectron2.engine import launch
from detectron2.utils import comm
from torch.multiprocessing import ProcessExitedException

from .errors import PATIENCE, UserError, exit_now

__all__ = ["run_in_processes", "started_by_torchrun"]

logger = logging.getLogger(__name__)


def run_in_processes(work: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """Call ``work(args)``, which returns an exit code, in each process; return the highest code."""
    if "train.device=cpu" in (args.opts or []):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # also what detectron2's launch decides by
    if started_by_torchrun(os.environ):
        return _run_under_torchrun(work, args)
    if args.num_gpus * args.num_machines <= 1:
        return work(args)
    return _run_launched(work, args)


def started_by_torchrun(environment: Mapping[str, str]) -> bool:
    """Whether a launcher has already started this process as one of several."""
    return all(name in environment for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))


def check_gpu_count(per_machine: int) -> None:
    """Stop if there is CUDA, but fewer devices than processes."""
    found = torch.cuda.device_count()
    if torch.cuda.is_available() and per_machine > found:
        raise UserError(f"--num-gpus is {per_machine}, but this machine has {found}")


def _run_under_torchrun(work: Callable, args: argparse.Namespace) -> int:
    rank = int(os.environ["LOCAL_RANK"])
    has_device = torch.cuda.is_available() and rank < torch.cuda.device_count()
    if has_device:
        torch.cuda.set_device(rank)
    # with a device a config may still choose the CPU, so gloo is there in any case
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if has_device else "gloo")
    try:
        return work(args)
    finally:
        torch.distributed.destroy_process_group()


def _run_launched(work: Callable, args: argparse.Namespace) -> int:
    check_gpu_count(args.num_gpus)
    check_meeting(args)
    with _Signals(args.num_gpus) as signals:
        try:
            launch(
                _exit_with_code,
                args.num_gpus,
                num_machines=args.num_machines,
                machine_rank=args.machine_rank,
                dist_url=args.dist_url,
                args=(work, args),
            )
        except ProcessExitedException as ended:
            return signals.code_of(ended)
    return 0


def check_meeting(args: argparse.Namespace) -> None:
    """Stop if the processes cannot meet where ``--dist-url`` says."""
    url, machines = args.dist_url, args.num_machines
    if not 0 <= args.machine_rank < machines:
        raise UserError(f"--machine-rank is {args.machine_rank}, expected 0 to {machines - 1}")
    if url == "auto":
        if machines > 1:
            raise UserError(
                f"--dist-url is auto with {machines} machines, expected the first one's "
                "tcp://HOST:PORT"
            )
        return
    try:
        parts = urlsplit(url)
        complete = parts.scheme != "tcp" or (parts.hostname and parts.port)
    except ValueError:  # the port is not a number, or out of range
        complete = False
    if not complete or parts.scheme not in ("tcp", "file", "env"):
        raise UserError(f"--dist-url is '{url}', expected auto or tcp://HOST:PORT")


def _exit_with_code(work: Callable, args: argparse.Namespace) -> None:
    os.environ["LOCAL_RANK"] = str(comm.get_local_rank())
    try:
        code = work(args)
    except RuntimeError as error:
        if " by peer" in str(error):  # the connection was closed, or reset
            time.sleep(PATIENCE)  # the process at its other end is the one that knows why
        raise
    if code:
        exit_now(code)  # the process group's threads may abort a process that ends in order


class _Signals:
    """Passes signals on to the processes started within the ``with`` block.

    A terminal sends Ctrl-C to all processes. One that is still starting would print a traceback, so
    they are started with SIGINT blocked, and SIGTERM is passed on for it.

    Args:
        count: processes; one that is not there yet gets the signal once it is.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._received = 0
        self._told: set[int] = set()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._wait, daemon=True)
        self._reader, self._writer = socket.socketpair()

    def __enter__(self) -> "_Signals":
        self._writer.setblocking(False)
        # the main thread may sleep through a signal
        self._former = signal.set_wakeup_fd(self._writer.fileno())
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, lambda *_: None)
        resource_tracker.ensure_running()  # which unblocks SIGINT when it starts
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
        signal.set_wakeup_fd(self._former)
        self._reader.close()
        self._writer.close()

    def code_of(self, ended: ProcessExitedException) -> int:
        """Return the run's exit code after a process ended; tell of a violent end unless asked."""
        code = ended.exit_code if ended.exit_code > 0 else 128 - ended.exit_code
        if self._received:
            by_signal = code in (128 + signal.SIGTERM, 128 + signal.SIGINT)
            return 128 + self._received if by_signal else code
        if ended.exit_code < 0:  # otherwise the process itself has said why
            name = signal.Signals(-ended.exit_code).name
            print(f"error: process {ended.error_index} was ended by {name}", file=sys.stderr)
        return code

    def _wait(self) -> None:
        """Pass signals on, also to processes that have come since."""
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # here alone
        while not self._over.is_set():
            if select.select([self._reader], [], [], 0.2)[0]:
                signum = self._reader.recv(1)[0]
                if signum in (signal.SIGTERM, signal.SIGINT):  # others may have handlers, too
                    self._received = self._received or signum
                    self._told.clear()
            if self._received and len(self._told) < self._count:
                self._tell()

    def _tell(self) -> None:
        for child in multiprocessing.active_children():
            if child.pid is not None and child.pid not in self._told:
                self._told.add(child.pid)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child.pid, signal.SIGTERM)
