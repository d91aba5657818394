"""Configs as assignments in the style of Python, for reading."""

from collections.abc import Iterator
from typing import Any

from detectron2.utils.registry import _convert_target_to_string


def assignments(data: dict[str, Any], prefix: str) -> str:
    """Return one line ``<prefix><key> = <value>`` per value; keys in alphabetical order."""
    return "".join(f"{name} = {value}\n" for name, value in _lines(data, prefix))


def _lines(data: dict[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    for key, value in sorted(data.items()):
        if isinstance(value, dict) and "_target_" not in value:
            yield from _lines(value, f"{prefix}{key}.")
        else:
            yield prefix + key, _expression(value)


def _expression(value: Any) -> str:
    if isinstance(value, dict):
        items = sorted((k, _expression(v)) for k, v in value.items() if k != "_target_")
        if "_target_" not in value:
            return "{" + ", ".join(f"{_expression(k)}: {v}" for k, v in items) + "}"
        # as in the real package, an AttributeError if the target is only a string
        name = _convert_target_to_string(value["_target_"])
        return f"{name}({', '.join(f'{k}={v}' for k, v in items)})"
    if isinstance(value, list):
        return "[" + ", ".join(map(_expression, value)) + "]"
    if isinstance(value, str) and "'" not in repr(value)[1:-1] and '"' not in value:
        return f'"{repr(value)[1:-1]}"'
    return repr(value)
