"""Files that are complete whenever they exist."""

import contextlib
import os
from collections.abc import Iterator
from typing import IO, Any

from .file_io import PathManager


@contextlib.contextmanager
def whole_file(path: str, mode: str, **options: Any) -> Iterator[IO[Any]]:
    """Open a file for writing that takes its place only after the block, and not if that raises.

    ``options`` are those of ``open``, such as the encoding.
    """
    unfinished = f"{path}.part"
    try:
        with PathManager.open(unfinished, mode, **options) as file:
            yield file
        os.replace(unfinished, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.remove(unfinished)
        raise
