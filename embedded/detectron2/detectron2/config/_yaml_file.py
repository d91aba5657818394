"""Configs as yaml: plain data only, so that loading a file never runs code."""

import dataclasses
from enum import Enum
from pathlib import PurePath
from typing import Any

import numpy as np
import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf, SCMode

from detectron2.utils.file_io import PathManager
from detectron2.utils.registry import _convert_target_to_string, locate

_LOCATE = f"{locate.__module__}.{locate.__qualname__}"


def load(filename: str) -> DictConfig | ListConfig:
    """Parse a yaml file; tags are refused, except those by which detectron2 names what it calls."""
    with PathManager.open(filename, encoding="utf-8") as file:
        text = file.read()
    try:
        data = yaml.load(text, Loader=_Loader)
    except yaml.constructor.ConstructorError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise ValueError(
            f"config file {filename}, line {line}: {error.problem}; expected plain data only"
        ) from None
    except yaml.YAMLError as error:
        raise ValueError(f"config file {filename}: {' '.join(str(error).split())}") from None
    return OmegaConf.create(data, flags={"allow_objects": True})


def dump(cfg: Any) -> tuple[str, list[str]]:
    """Return a config as yaml, and a description of each value that yaml cannot hold."""
    unsaved: list[str] = []
    data = _plain(cfg, "", unsaved)
    text = yaml.dump(
        data,
        Dumper=_Dumper,
        default_flow_style=None,
        allow_unicode=True,
        sort_keys=False,
        width=9999,
    )
    return text, unsaved


class _Loader(yaml.SafeLoader):
    """Reads classes, functions and dataclasses, as detectron2 saves them, as calls yet to be made.

    So nothing is imported before the config is instantiated.
    """


def _named(_loader: yaml.SafeLoader, name: str, _node: yaml.Node) -> dict[str, Any]:
    return {"_target_": _LOCATE, "name": name}


def _dataclass(loader: yaml.SafeLoader, name: str, node: yaml.Node) -> dict[str, Any]:
    if not isinstance(node, yaml.MappingNode):
        problem = f"{node.tag} has no fields"
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
    return {"_target_": name, **loader.construct_mapping(node, deep=True)}


_Loader.add_multi_constructor("tag:yaml.org,2002:python/name:", _named)
_Loader.add_multi_constructor("tag:yaml.org,2002:python/object:", _dataclass)


class _Remark(str):
    """Stands in the yaml for a value that cannot be saved."""


class _Dumper(yaml.SafeDumper):
    """Writes remarks with a tag of their own, which makes the file impossible to load."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(
    _Remark, lambda dumper, remark: dumper.represent_scalar("!not_saved", str(remark))
)


def _plain(value: Any, key: str, unsaved: list[str]) -> Any:
    """Copy ``value``, found at ``key``, as data that yaml can hold."""
    if isinstance(value, DictConfig | ListConfig):
        value = _container(value)
    if isinstance(value, dict):
        below = f"{key}." if key else ""
        return {
            name: _convert_target_to_string(item)
            if name == "_target_" and _has_name(item)
            else _plain(item, f"{below}{name}", unsaved)
            for name, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_plain(item, f"{key}[{i}]", unsaved) for i, item in enumerate(value)]
    if isinstance(value, np.generic):
        value = value.item()
    kinds: tuple[type, ...] = (bool, int, float, str, bytes)
    for kind in kinds:
        if isinstance(value, kind) and not isinstance(value, Enum):
            return kind(value)
    if value is None:
        return None
    if isinstance(value, PurePath):
        return str(value)
    if _has_name(value):  # a call that yields the callable, so that loading brings it back
        return {"_target_": _LOCATE, "name": _convert_target_to_string(value)}
    description = getattr(value, "__qualname__", None) or f"a {type(value).__name__}"
    unsaved.append(f"{key} = {description}")
    return _Remark(description)


def _container(cfg: DictConfig | ListConfig) -> Any:
    """Contents of a config with its interpolations; a structured config becomes a call."""
    schema = OmegaConf.get_type(cfg)
    if not dataclasses.is_dataclass(schema):
        return OmegaConf.to_container(cfg, resolve=False, structured_config_mode=SCMode.DICT_CONFIG)
    raw: Any = OmegaConf.to_container(cfg, resolve=False)
    fields = {
        key: OmegaConf.select(cfg, key) if isinstance(value, dict | list) else value
        for key, value in raw.items()
    }
    return {"_target_": _convert_target_to_string(schema), **fields}


def _has_name(value: Any) -> bool:
    """Whether a callable can be found again by its dotted name."""
    if not (callable(value) and hasattr(value, "__module__") and hasattr(value, "__qualname__")):
        return False
    try:
        return bool(locate(_convert_target_to_string(value)) == value)
    except ImportError:
        return False
