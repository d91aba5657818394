"""The processes of a study: one per training, and none that outlives it."""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, TextIO

from engine.errors import UserError

__all__ = ["STOPPED_CODES", "Signals", "WorkLock", "call", "start", "training_environment"]

ROOT = Path(__file__).resolve().parent.parent
STOPPED_CODES = (-signal.SIGTERM, 128 + signal.SIGTERM, -signal.SIGKILL)
"""How a training ends that was asked to: before its first iteration, later, not in time."""

_PR_SET_PDEATHSIG = 1  # of Linux's prctl


class WorkLock:
    """Holds a study's folder for this process and its trainings.

    The trainings inherit the lock. Should this process be killed, the folder stays locked until the
    last of them has ended.

    Args:
        work: the folder; it is created.

    Raises:
        UserError: another study works there.
    """

    def __init__(self, work: Path) -> None:
        try:
            work.mkdir(parents=True, exist_ok=True)
            self._file: TextIO = open(work / "lock", "a+")  # noqa: SIM115 (held until the end)
        except OSError as error:
            raise UserError(f"--work: cannot write to {work}: {error.strerror}") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.seek(0)
            holder = self._file.read().strip() or "?"
            raise UserError(
                f"--work: another study, process {holder} or trainings that it has left, still "
                f"works in {work}: wait for its end or name another folder"
            ) from None
        self._file.truncate(0)
        self._file.write(f"{os.getpid()}\n")
        self._file.flush()

    @property
    def descriptor(self) -> int:
        """What trainings inherit."""
        return self._file.fileno()

    def __enter__(self) -> WorkLock:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()


class Signals:
    """Counts SIGINT and SIGTERM instead of dying of them, while entered.

    Attributes:
        received: how many have come.
        last: the last one's number; 0 if none has come.
    """

    numbers = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.received = 0
        self.last = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        for number in self.numbers:
            self._previous[number] = signal.signal(number, self._count)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _count(self, number: int, _frame: FrameType | None) -> None:
        self.received += 1
        self.last = number


def training_environment(device: str, datasets: Path, at_a_time: int) -> dict[str, str]:
    """Return the environment of a training that shares the cores with others."""
    threads = max(1, _cores() // at_a_time)
    environment = {
        **os.environ,
        "DETECTRON2_DATASETS": str(datasets.absolute()),
        "OMP_NUM_THREADS": str(threads),
        # threads that wait sleep soon, as other trainings need the cores, but not at once, as small
        # detectors have thousands of short waits in a step
        "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": "5000",
        "PYTHONUNBUFFERED": "1",
    }
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return environment


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def start(
    config: Path, console: Path, environment: Mapping[str, str], lock: WorkLock
) -> subprocess.Popen:
    """Start or resume a training whose output is appended to ``console``."""
    command = [sys.executable, str(ROOT / "tools" / "train_net.py")]
    with open(console, "ab") as output:
        return subprocess.Popen(
            [*command, "--config-file", str(config), "--resume"],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # a terminal's Ctrl-C is for the study, which passes it on
            pass_fds=(lock.descriptor,),
            preexec_fn=_end_with_parent(),
        )


def call(command: Sequence[str]) -> None:
    """Run one of the tools to its end.

    Raises:
        UserError: it fails; its last line says why.
    """
    done = subprocess.run(
        [sys.executable, *command],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=_end_with_parent(),
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise UserError(lines[-1])


def _end_with_parent() -> Callable[[], None] | None:
    """What a new process calls so that it gets SIGTERM when this one dies; None without prctl."""
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    parent = os.getpid()

    def prepare() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it died before the call
            os._exit(128 + signal.SIGTERM)

    return prepare
