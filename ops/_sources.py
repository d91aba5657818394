"""Which sources and which torch a compiled library was built from; also read by setup.py."""

from __future__ import annotations

import hashlib
import mmap
import re
from pathlib import Path

_MARK = re.compile(rb"detr_methods sources ([0-9a-f]*) torch ([0-9.]+)")  # in capability.cpp


def sources_digest(folder: Path) -> str:
    """Sixteen hex digits for the C++ files below a folder; empty where there are none."""
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".cpp", ".h"))
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0")
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()[:16] if files else ""


def why_unfit(library: Path, folder: Path, torch_version: str) -> str:
    """Why a library must not be loaded, empty if it may be.

    Args:
        library: the file.
        folder: with the sources that it should be built from; nothing in it fits any.
        torch_version: that it should be built with; bug-fix releases make no difference.
    """
    mark = _mark_of(library)
    if mark is None:
        return "was built from other sources"
    digest, built_with = mark
    if _release(built_with) != _release(torch_version):
        return f"was built with torch {built_with}, not {torch_version}"
    expected = sources_digest(folder)
    return "was built from other sources" if expected not in ("", digest) else ""


def _mark_of(library: Path) -> tuple[str, str] | None:
    """The digest and the torch of a library; None if it says nothing of them."""
    with open(library, "rb") as file:
        if not file.read(1):  # nothing can be mapped
            return None
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            mark = _MARK.search(content)
            return None if mark is None else (mark[1].decode(), mark[2].decode())


def _release(version: str) -> list[str]:
    return version.split(".")[:2]
