"""API-compatible subsets of detectron2 and detrex for machines where those cannot be installed.

Each folder here holds one package under its real name. :func:`activate` appends a folder to the
import path only when the real package is absent, so an installed one always wins.
"""

import importlib.metadata
import importlib.util
import sys
from pathlib import Path

__all__ = ["activate"]

_PACKAGES = ("detectron2", "detrex")


def activate() -> str:
    """Make ``detectron2`` and ``detrex`` importable and say which runtime serves each.

    Returns:
        One line such as ``"detectron2 0.6 (installed), detrex 0.3.0 (embedded)"``.
    """
    folder = Path(__file__).resolve().parent
    return ", ".join(_resolve(name, folder / name) for name in _PACKAGES)


def _resolve(name: str, embedded_folder: Path) -> str:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:  # a mere folder of that name is no package
        sys.path.append(str(embedded_folder))
        importlib.invalidate_caches()
        spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ImportError(f"{embedded_folder} holds no package {name!r}")
    if Path(spec.origin).is_relative_to(embedded_folder):
        return f"{name} {importlib.import_module(name).__version__} (embedded)"
    return f"{name} {_installed_version(name)} (installed)"


def _installed_version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # on the path, but not installed by pip
        return getattr(importlib.import_module(name), "__version__", "of unknown version")
