"""The generated images of a study."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tools.study_process import ROOT, call

__all__ = ["data_options", "make_data"]


def make_data(shapes: Mapping[str, object], folder: Path) -> None:
    """Draw the images unless they are there.

    Args:
        shapes: parameters of ``tools/make_shapes.py``.
        folder: of the data set.

    Raises:
        UserError: a parameter is wrong, or the folder holds something else.
    """
    call([str(ROOT / "tools" / "make_shapes.py"), "--output", str(folder), *data_options(shapes)])


def data_options(shapes: Mapping[str, object]) -> list[str]:
    """Return the parameters as options of ``tools/make_shapes.py``."""
    options = []
    for name, value in shapes.items():
        values = list(value) if isinstance(value, tuple | list) else [value]
        words = [str(value) for value in values]
        options += ["--" + name.replace("_", "-")]
        options += ["x".join(words)] if name == "size" else words
    return options
