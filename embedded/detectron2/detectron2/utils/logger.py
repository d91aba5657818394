"""Logging to terminal and file, rate-limited logging and small tables."""

import atexit
import copy
import functools
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Hashable, Iterable
from typing import Any, TextIO

from tabulate import tabulate
from termcolor import colored

from detectron2.utils.file_io import PathManager

__all__ = [
    "create_small_table",
    "log_every_n",
    "log_every_n_seconds",
    "log_first_n",
    "setup_logger",
]

_DATE_FORMAT = "%Y-%m-%d %H:%M:%S"
_PLAIN = logging.Formatter("%(asctime)s | %(levelname)-7s | %(name)s | %(message)s", _DATE_FORMAT)
_LEVEL_COLOURS = {logging.WARNING: "yellow", logging.ERROR: "red", logging.CRITICAL: "red"}


class _TerminalFormatter(logging.Formatter):
    """Coloured lines in which the root of the logger's name is abbreviated."""

    def __init__(self, root: str, abbreviation: str):
        header = colored("%(asctime)s %(name)s |", "green")
        super().__init__(header + " %(message)s", datefmt=_DATE_FORMAT)
        self._root = root + "."
        self._short = abbreviation + "." if abbreviation else ""

    def formatMessage(self, record: logging.LogRecord) -> str:
        shown = copy.copy(record)  # other handlers see the record too
        if shown.name.startswith(self._root):
            shown.name = self._short + shown.name.removeprefix(self._root)
        if shown.levelno in _LEVEL_COLOURS:
            level = colored(shown.levelname, _LEVEL_COLOURS[shown.levelno], attrs=["bold"])
            shown.message = f"{level}: {shown.message}"
        return super().formatMessage(shown)


@functools.cache  # a second call with the same arguments must not add the handlers again
def setup_logger(
    output: str | None = None,
    distributed_rank: int = 0,
    *,
    color: bool = True,
    name: str = "detectron2",
    abbrev_name: str | None = None,
    enable_propagation: bool = False,
    configure_stdout: bool = True,
) -> logging.Logger:
    """Set up the logger ``name``: to the terminal on rank 0, to a file on every rank.

    Args:
        output: a file ending in ``.txt`` or ``.log``, or a folder for ``log.txt``; other ranks
            append ``.rank<N>``. ``None`` writes no file.
        distributed_rank: rank of this process.
        color: whether the terminal shows colours.
        name: root name of the logger.
        abbrev_name: what replaces the root name in the terminal; ``d2`` for detectron2.
        enable_propagation: whether records also go to the parent logger.
        configure_stdout: whether to log to the terminal at all.
    """
    logger = logging.getLogger(name)
    logger.setLevel(logging.DEBUG)
    logger.propagate = enable_propagation
    if configure_stdout and distributed_rank == 0:
        if abbrev_name is None:
            abbrev_name = "d2" if name == "detectron2" else name
        _add_handler(logger, sys.stdout, _TerminalFormatter(name, abbrev_name) if color else _PLAIN)
    if output is not None:
        _add_handler(logger, _open_log(_log_file(output, distributed_rank)), _PLAIN)
    return logger


def _add_handler(logger: logging.Logger, stream: TextIO, formatter: logging.Formatter) -> None:
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter)
    logger.addHandler(handler)


def _log_file(output: str, rank: int) -> str:
    file = output if output.endswith((".txt", ".log")) else os.path.join(output, "log.txt")
    return file if rank == 0 else f"{file}.rank{rank}"


@functools.cache  # loggers that share a file must share its stream
def _open_log(file: str) -> TextIO:
    PathManager.mkdirs(os.path.dirname(os.path.abspath(file)))
    stream = PathManager.open(file, "a")
    atexit.register(stream.close)
    return stream


_times_seen: Counter[Hashable] = Counter()
_last_logged: dict[Hashable, float] = {}


def _caller() -> tuple[str, tuple[Hashable, ...]]:
    """Module of the first frame outside this file, and a key for the line it is at."""
    frame = sys._getframe(1)
    while frame.f_code.co_filename == __file__ and frame.f_back is not None:
        frame = frame.f_back
    module = frame.f_globals.get("__name__", "__main__")
    place = (frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name)
    return "detectron2" if module == "__main__" else module, place


def log_first_n(
    lvl: int, msg: str, n: int = 1, *, name: str | None = None, key: str | Iterable[str] = "caller"
) -> None:
    """Log only the first ``n`` times.

    Args:
        lvl: logging level.
        msg: the message.
        n: how often to log.
        name: name of the logger; the calling module's by default.
        key: what makes two calls the same: ``"caller"``, ``"message"`` or both.
    """
    module, place = _caller()
    identities: dict[str, tuple[Hashable, ...]] = {"caller": place, "message": (msg,)}
    keys = [key] if isinstance(key, str) else sorted(key)
    identity = sum((identities[k] for k in keys), ())
    assert identity, "log_first_n: key is empty, expected 'caller', 'message' or both"
    _times_seen[identity] += 1
    if _times_seen[identity] <= n:
        logging.getLogger(name or module).log(lvl, msg)


def log_every_n(lvl: int, msg: str, n: int = 1, *, name: str | None = None) -> None:
    """Log the first and then every ``n``-th call from the same line."""
    module, place = _caller()
    if _times_seen[place] % n == 0:
        logging.getLogger(name or module).log(lvl, msg)
    _times_seen[place] += 1


def log_every_n_seconds(lvl: int, msg: str, n: float = 1, *, name: str | None = None) -> None:
    """Log a call from the same line at most once in ``n`` seconds."""
    module, place = _caller()
    now = time.monotonic()
    if place not in _last_logged or now - _last_logged[place] >= n:
        _last_logged[place] = now
        logging.getLogger(name or module).log(lvl, msg)


def create_small_table(small_dict: dict[str, Any]) -> str:
    """Format a small dict as a table of one row, with the keys as its header."""
    return tabulate(
        [list(small_dict.values())],
        headers=list(small_dict),
        tablefmt="pipe",
        floatfmt=".3f",
        stralign="center",
        numalign="center",
    )
