"""Dotted names of callables: finding the object behind a name and the name of an object."""

import builtins
import importlib
from itertools import accumulate
from types import ModuleType
from typing import Any

__all__ = ["locate"]


def locate(name: str) -> Any:
    """Return the object behind a dotted name such as ``"torch.optim.AdamW"``.

    Raises:
        ImportError: if no module or attribute of that name exists.
    """
    parts = name.split(".")
    if not all(parts):
        raise ImportError(f"cannot locate '{name}': not a dotted name")
    for length in range(len(parts), 0, -1):
        module = _import_if_present(".".join(parts[:length]))
        if module is not None:
            return _attribute(module, parts[length:], name)
    return _attribute(builtins, parts, name)


def _import_if_present(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            return None
        raise  # the module exists, but lacks one of its own dependencies


def _attribute(obj: Any, path: list[str], name: str) -> Any:
    for part in path:
        try:
            obj = getattr(obj, part)
        except AttributeError:
            where = getattr(obj, "__name__", type(obj).__name__)
            raise ImportError(f"cannot locate '{name}': no '{part}' in {where}") from None
    return obj


def _convert_target_to_string(target: Any) -> str:
    """Shortest dotted name under which :func:`locate` finds ``target``, else its full name."""
    prefixes = accumulate(target.__module__.split("."), lambda outer, inner: f"{outer}.{inner}")
    names = [f"{prefix}.{target.__qualname__}" for prefix in prefixes]
    return next((name for name in names if _is_name_of(name, target)), names[-1])


def _is_name_of(name: str, target: Any) -> bool:
    try:
        return locate(name) is target
    except ImportError:
        return False
