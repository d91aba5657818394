"""Loading a config and applying overrides, strictly."""

import inspect
import math
import os
import pydoc
import re
import traceback
from collections.abc import Iterable, Mapping
from typing import Any

from detectron2.config import LazyConfig
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from .defaults import EVALUATION_DEFAULTS, TRAIN_DEFAULTS
from .errors import UserError, did_you_mean
from .yaml_tags import check_tags

__all__ = ["apply_overrides", "load_config", "read_config"]

_REQUIRED = ("model", "dataloader", "optimizer", "lr_multiplier", "train")


def load_config(path: str, overrides: Iterable[str] = ()) -> DictConfig:
    """Load a LazyConfig file, complete it with our defaults, apply overrides.

    Raises:
        UserError: no such file, it cannot be read, or lacks a node; or see :func:`apply_overrides`.
    """
    if not path:
        raise UserError("no config given: use --config-file FILE")
    config = read_config(path)
    if not isinstance(config, DictConfig) or not config:
        raise UserError(f"config {path} holds no settings, expected {', '.join(_REQUIRED)}")
    _require_nodes(config, f"config {path}")
    config.train = OmegaConf.merge(OmegaConf.create(TRAIN_DEFAULTS), config.train)
    config.evaluation = OmegaConf.merge(
        OmegaConf.create(EVALUATION_DEFAULTS), config.get("evaluation", {})
    )
    apply_overrides(config, overrides)
    _require_nodes(config, "with these overrides the config")
    return config


def read_config(path: str) -> Any:
    """Execute or parse a config file, whatever it holds.

    Raises:
        UserError: no such file, or it cannot be read; names the file and the line.
    """
    if not os.path.isfile(path):
        raise UserError(f"config file {path} not found")
    check_tags(path)
    try:
        return LazyConfig.load(path)
    except Exception as error:  # a config file is a program: it may raise anything
        raise UserError(f"cannot load config {path}: {_reason(error, path)}") from error


def _reason(error: Exception, path: str) -> str:
    """Say in one line where in which config file an error arose, and what it is."""
    first = (str(error).strip().splitlines() or [""])[0]
    if isinstance(error, SyntaxError | OSError | YAMLError) or not error.__traceback__:
        return first or type(error).__name__
    frames = [
        (frame.f_code.co_filename, line)
        for frame, line in traceback.walk_tb(error.__traceback__)
        if _is_config(frame.f_globals)
    ]
    text = f"{type(error).__name__}: {first}" if first else type(error).__name__
    if not frames:
        return first or text
    file, line = frames[-1]
    return f"{'' if file == path else f'{file}, '}line {line}: {text}"


def _is_config(module: Mapping[str, Any]) -> bool:
    """Whether LazyConfig made a module's names; detectron2's leaves the first file without one."""
    names = (str(module.get(key)) for key in ("__name__", "__package__"))
    return any(name.startswith("detectron2._cfg_loader") for name in names)


def _require_nodes(config: DictConfig, whose: str) -> None:
    """Stop if a node that every run needs is missing, null or a plain value."""
    for key in _REQUIRED:
        expected = f"expected {', '.join(_REQUIRED)}"
        node = _get(config, key) if key in config else None
        if node is None:
            raise UserError(f"{whose} has no '{key}', {expected}")
        if not isinstance(node, DictConfig):
            raise UserError(f"{whose} has the value {node!r} as '{key}', {expected}")


def apply_overrides(config: DictConfig, overrides: Iterable[str]) -> DictConfig:
    """Change ``config`` in place by Hydra's override syntax and return it.

    ``a.b=1`` sets a key that exists or that the called function has a parameter for (list items as
    ``a.0.b`` or ``a[0].b``), ``+a.b=1`` adds a key, ``~a.b`` removes one.

    Raises:
        UserError: unknown key (names the nearest one), wrong type, or not an override at all.
    """
    for override in _parse(list(overrides)):
        key = override.key_or_group
        if override.is_delete():
            _find(config, key)
            _delete(config, key)
            continue
        value = override.value()
        if not override.is_add():
            old = _find(config, key)
            value = _checked(key, old, value, in_call=_holder_is_call(config, key))
        try:
            OmegaConf.update(config, key, value, merge=True, force_add=True)
        except (OmegaConfBaseException, TypeError, IndexError, ValueError) as error:
            raise UserError(f"cannot set '{key}': {str(error).splitlines()[0]}") from error
    return config


def _parse(overrides: list[str]) -> list[Any]:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parsed = []
    for text in overrides:
        try:
            key, equals, value = text.partition("=")
            key = re.sub(r"\[(\d+)\]", r".\1", key)  # Hydra knows list items as a.0 only
            override = OverridesParser.create().parse_override(key + equals + value)
            if not override.key_or_group:
                raise HydraException("the key is empty")
            parsed.append(override)
        except HydraException as error:
            hint = "expected key=value, +key=value or ~key"
            if text.startswith("-"):
                hint = "options come before the overrides"
            raise UserError(f"cannot read the override '{text}': {hint}") from error
    return parsed


_MAY_BE_NULL = {"train.checkpointer.max_to_keep"}
"""Numbers whose absence means something."""

_NEW = object()
"""Stands for the value of a key that the config lacks but may have."""


def _find(config: DictConfig, key: str) -> Any:
    """Return the value at a dotted key, or ``_NEW`` where anything may be added."""
    node: Any = config
    parts = key.split(".")
    for depth, part in enumerate(parts):
        where = ".".join(parts[:depth])
        if isinstance(node, ListConfig):
            if not part.lstrip("-").isdigit() or not -len(node) <= int(part) < len(node):
                raise UserError(
                    f"unknown key '{key}': '{where}' is a list of {len(node)}, "
                    f"expected an index below that, found '{part}'"
                )
            node = _get(node, int(part))
        elif isinstance(node, DictConfig):
            if part not in node:
                if _may_add(node, part):
                    return _NEW
                raise UserError(f"unknown key '{key}'{_suggestion(config, node, where, part, key)}")
            node = _get(node, part)
        elif node is None or node is _NEW:
            return _NEW
        else:
            raise UserError(f"unknown key '{key}': '{where}' is the value {node!r} and has no keys")
    return node


def _get(node: Any, key: Any) -> Any:
    try:
        return node[key]
    except OmegaConfBaseException:  # an interpolation that cannot be resolved yet
        return None


def _may_add(node: DictConfig, part: str) -> bool:
    """Whether ``part`` is a parameter of what the node calls, or the node is an empty dict."""
    if "_target_" not in node:
        return len(node) == 0
    names, any_name = _parameters(node)
    return any_name or part in names


def _parameters(node: DictConfig) -> tuple[list[str], bool]:
    """Names of the called function's parameters, and whether it takes any other too."""
    target = node["_target_"]
    try:
        function: Any = pydoc.locate(target) if isinstance(target, str) else target
        functions = [function]
        if inspect.isclass(function):  # a constructor's **kwargs are its base class's parameters
            bases = inspect.getmro(function)
            functions = [vars(base)["__init__"] for base in bases if "__init__" in vars(base)]
        names = []
        for function in functions:
            parameters = list(inspect.signature(function).parameters.values())
            names += [p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
            if not any(p.kind is p.VAR_KEYWORD for p in parameters):
                return names, False
    except Exception:  # a target that cannot be imported or inspected is not for us to judge
        return [], True
    return names, True


def _suggestion(config: DictConfig, node: DictConfig, where: str, part: str, key: str) -> str:
    siblings = [str(name) for name in node if name != "_target_"]
    if "_target_" in node:
        siblings += _parameters(node)[0]
    prefix = f"{where}." if where else ""
    if prefix + part == key and did_you_mean(part, siblings):
        return did_you_mean(key, [prefix + name for name in siblings])
    paths = [path for path in _paths(config) if not key.startswith(f"{path}.")]
    leaf = key.rpartition(".")[2]
    same_leaf = [path for path in paths if path.rpartition(".")[2] == leaf]
    return did_you_mean(key, same_leaf) or did_you_mean(key, paths)


def _paths(node: Any, prefix: str = "") -> Iterable[str]:
    keys = range(len(node)) if isinstance(node, ListConfig) else list(node)
    for key in keys:
        path = f"{prefix}{key}"
        yield path
        if not OmegaConf.is_missing(node, key) and isinstance(
            node._get_node(key), DictConfig | ListConfig
        ):
            child = _get(node, key)
            if isinstance(child, DictConfig | ListConfig):
                yield from _paths(child, f"{path}.")


def _holder_is_call(config: DictConfig, key: str) -> bool:
    holder = OmegaConf.select(config, key.rpartition(".")[0]) if "." in key else config
    return isinstance(holder, DictConfig) and "_target_" in holder


def _checked(key: str, old: Any, new: Any, *, in_call: bool) -> Any:
    """Return ``new``, converted if need be; raise if it cannot take the place of ``old``."""
    if old is None or old is _NEW or (isinstance(new, str) and "${" in new):
        return new
    if new is None and (in_call or key in _MAY_BE_NULL or not isinstance(old, bool | int | float)):
        return new
    if isinstance(old, bool):
        fits = isinstance(new, bool)
    elif isinstance(old, int):
        fits = _is_number(new) and math.isfinite(new) and new == int(new)
        new = int(new) if fits else new
    elif isinstance(old, float):
        fits = _is_number(new)
        new = float(new) if fits else new
    elif isinstance(old, str):
        fits = not isinstance(new, dict)
        new = str(new) if _is_number(new) else new
    elif isinstance(old, ListConfig):
        texts = all(isinstance(item, str) for item in old)
        fits = isinstance(new, list) or (isinstance(new, str) and texts)
    elif isinstance(old, DictConfig):
        fits = isinstance(new, dict)
    else:
        fits = True
    if not fits:
        kinds = {"ListConfig": "list", "DictConfig": "dict"}
        expected = kinds.get(type(old).__name__, type(old).__name__)
        raise UserError(f"{key}={new!r} is of type {type(new).__name__}, expected {expected}")
    return new


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _delete(config: DictConfig, key: str) -> None:
    holder_key, _, last = key.rpartition(".")
    holder = OmegaConf.select(config, holder_key) if holder_key else config
    if isinstance(holder, ListConfig):
        del holder[int(last)]
    elif last in holder:
        del holder[last]
