"""Building what a config describes: what cannot be built is said in one line."""

import contextlib
from collections.abc import Iterator
from typing import Any

from detectron2.config import instantiate
from omegaconf.errors import OmegaConfBaseException

from .errors import UserError

__all__ = ["FAULTS", "build", "construction", "reason_of"]

FAULTS = (
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NotImplementedError,
    OmegaConfBaseException,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What wrong arguments, names and files raise; anything else is a defect."""


def build(what: str, node: Any) -> Any:
    """Instantiate a node of the config, called ``what`` in the error.

    Raises:
        UserError: it cannot be built.
    """
    with construction(what):
        return instantiate(node)


@contextlib.contextmanager
def construction(what: str) -> Iterator[None]:
    """Let an error within the ``with`` block say in one line what cannot be built, and why."""
    try:
        yield
    except UserError:
        raise
    except FAULTS as error:
        raise UserError(f"cannot build {what}: {reason_of(error)}") from error


def reason_of(error: BaseException) -> str:
    """Return the first line of the error's message, with its type where that is not obvious."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
