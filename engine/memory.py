"""How the process treats memory that is freed."""

import ctypes
import os
from collections.abc import Mapping

__all__ = ["keep_freed_memory"]

# of glibc's malloc.h
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def keep_freed_memory(environment: Mapping[str, str] = os.environ) -> bool:
    """Let the process reuse large blocks that are freed instead of giving them back.

    A training step on the CPU allocates the same large tensors as the one before. glibc asks the
    system for each of them, which clears its pages again: about a tenth of the step's time. From
    here on the process keeps what it has had at its peak.

    Nothing happens where the C library is not glibc, nor if the environment already tells its
    allocator what to do (``MALLOC_...`` or ``GLIBC_TUNABLES``).

    Returns:
        Whether the allocator has been told.
    """
    if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in environment):
        return False
    try:
        library = ctypes.CDLL(None)
        _ = library.gnu_get_libc_version  # other libraries may have a mallopt of other meaning
    except (AttributeError, OSError, TypeError):
        return False
    # -1: never trim; 0: no blocks of their own, which cannot be kept
    return bool(library.mallopt(_TRIM_THRESHOLD, -1) and library.mallopt(_MMAP_MAX, 0))
