"""Errors that a user can act on: one line on the screen, exit code 2."""

import difflib
import os
import sys
import time
from collections.abc import Callable, Iterable
from typing import NoReturn

__all__ = [
    "Interrupted",
    "LocalError",
    "NonFiniteLoss",
    "UserError",
    "did_you_mean",
    "exit_code_of",
    "exit_now",
]


PATIENCE = 5.0
"""Seconds that a process stays which leaves an error to another one to print: a launcher ends all
processes at the first that leaves."""


class UserError(Exception):
    """Bad input; the message is one line that names the thing, what was found and expected."""


class LocalError(UserError):
    """A :class:`UserError` that only this one of several processes meets, and so must print."""


class NonFiniteLoss(UserError, FloatingPointError):
    """A loss became NaN or infinite."""


class Interrupted(Exception):
    """Training stopped on a signal, after its checkpoint was saved."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the choice nearest to ``word``, or an empty string."""
    nearest = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f" (did you mean '{nearest[0]}'?)" if nearest else ""


def exit_code_of(run: Callable[[], object], *, traceback: bool = False) -> int:
    """Call ``run`` and turn its outcome into an exit code.

    0 after success, 2 after a :class:`UserError` (printed as ``error: …``), 128 + signal after an
    interruption. With ``traceback`` a :class:`UserError` propagates; any other error always does.
    """
    try:
        run()
    except UserError as error:
        if traceback:
            raise
        main = os.environ.get("LOCAL_RANK", "0") == "0"
        if main or isinstance(error, LocalError):  # what all meet, once per machine
            print(f"error: {one_line(error)}", file=sys.stderr, flush=True)
        else:
            time.sleep(PATIENCE)
        return 2
    except Interrupted as stop:
        return 128 + stop.signum
    except KeyboardInterrupt:
        return 130
    return 0


def one_line(error: Exception) -> str:
    """Return the message alone, also when a data-loading process wrapped it in its traceback."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    text = lines[-1] if lines else type(error).__name__
    prefix = f"{type(error).__module__}.{type(error).__qualname__}: "
    return text.removeprefix(prefix)


def exit_now(code: int) -> NoReturn:
    """Leave the process at once, without clean-up."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
