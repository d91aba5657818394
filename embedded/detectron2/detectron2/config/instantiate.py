"""Building the objects that a config describes."""

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from detectron2.utils.registry import locate

__all__ = ["instantiate"]


def instantiate(cfg: Any) -> Any:
    """Call what ``cfg`` describes and return the result; anything else is returned as it is.

    A mapping with ``_target_`` (a callable or its dotted name) is a call; its other entries are
    the keyword arguments, built first. Lists are built element by element. A mapping without
    ``_target_`` is handed over unchanged, calls inside it included.
    """
    if isinstance(cfg, ListConfig):
        return ListConfig([instantiate(item) for item in cfg], flags={"allow_objects": True})
    if isinstance(cfg, list):
        return [instantiate(item) for item in cfg]
    if isinstance(cfg, DictConfig) and dataclasses.is_dataclass(OmegaConf.get_type(cfg)):
        return OmegaConf.to_object(cfg)
    if isinstance(cfg, Mapping) and "_target_" in cfg:
        arguments = {key: instantiate(value) for key, value in cfg.items()}
        return _call(arguments.pop("_target_"), arguments)
    return cfg


def _call(target: Any, arguments: dict[str, Any]) -> Any:
    name = target if isinstance(target, str) else getattr(target, "__qualname__", repr(target))
    if isinstance(target, str):
        target = locate(target)
    assert callable(target), f"_target_ {name} is a {type(target).__name__}, expected a callable"
    try:
        return target(**arguments)
    except TypeError:
        logging.getLogger(__name__).error("Error when instantiating %s", name)
        raise
