"""Lazy calls and the config files that are made of them."""

import dataclasses
import logging
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ValidationError

from detectron2.config import _python_file, _text, _yaml_file
from detectron2.utils._whole_file import whole_file
from detectron2.utils.registry import _convert_target_to_string

__all__ = ["LazyCall", "LazyConfig"]

_Keys = str | tuple[str, ...] | None


class LazyCall:
    """Turns a call into a config: ``LazyCall(f)(a=1)`` describes ``f(a=1)`` without running it."""

    def __init__(self, target: Callable | str | Mapping):
        """Keep what is to be called: a callable, its dotted name, or a config that builds it."""
        if not (callable(target) or isinstance(target, str | Mapping)):
            raise TypeError(f"target of LazyCall is {target!r}, expected a callable or its name")
        self._target = target

    def __call__(self, **kwargs: Any) -> DictConfig:
        """Return the config of a call with these arguments."""
        target = self._target
        if dataclasses.is_dataclass(target):  # omegaconf would take the class for a schema
            target = _convert_target_to_string(target)
        content: dict[Any, Any] = {**kwargs, "_target_": target}
        return DictConfig(content, flags={"allow_objects": True})


class LazyConfig:
    """Loads, saves and changes configs."""

    @staticmethod
    def load_rel(filename: str, keys: _Keys = None) -> Any:
        """Return as :meth:`load`, with ``filename`` relative to the file of the caller."""
        caller = sys._getframe(1).f_code.co_filename
        assert not caller.startswith("<"), f"load_rel: '{filename}' is relative to no file"
        return LazyConfig.load(os.path.join(os.path.dirname(caller), filename), keys)

    @staticmethod
    def load(filename: str, keys: _Keys = None) -> Any:
        """Load a config file.

        Args:
            filename: a ``.py`` file, which is executed, or a ``.yaml``, which is only parsed.
            keys: one name, or several as a tuple: return these values. By default return one
                config with everything that is a config or a dict and does not start with ``_``.
        """
        extension = os.path.splitext(filename)[1]
        if extension == ".py":
            content: Any = _python_file.execute(filename)
        elif extension in (".yaml", ".yml"):
            content = _yaml_file.load(filename)
        else:
            raise ValueError(f"config file {filename}: extension is not .py, .yaml or .yml")
        if keys is None:
            return content if extension != ".py" else _python_file.configs_among(content)
        for key in [keys] if isinstance(keys, str) else keys:
            if key not in content:
                raise KeyError(f"config file {filename} has no '{key}'")
        if isinstance(keys, str):
            return _python_file.as_config(content[keys])
        return tuple(_python_file.as_config(content[key]) for key in keys)

    @staticmethod
    def save(cfg: Any, filename: str) -> None:
        """Save a config as yaml.

        Interpolations are kept, callables become their dotted names. What has no name (a lambda, a
        tensor) is written as a readable remark, with a warning: such a file cannot be loaded.
        """
        text, unsaved = _yaml_file.dump(cfg)
        with whole_file(filename, "w", encoding="utf-8") as file:
            file.write(text)
        if unsaved:
            logging.getLogger(__name__).warning(
                "%s can be read, but not loaded: yaml cannot hold %s", filename, ", ".join(unsaved)
            )

    @staticmethod
    def apply_overrides(cfg: DictConfig, overrides: list[str]) -> DictConfig:
        """Change ``cfg`` in place by overrides such as ``"train.max_iter=10"`` and return it.

        The syntax is Hydra's. Missing keys are created, dicts are merged, other values replaced.
        """
        for override in OverridesParser.create().parse_overrides(overrides):
            if override.is_delete():
                raise NotImplementedError(f"override '{override.input_line}': cannot delete keys")
            if override.is_sweep_override():
                raise ValidationError(
                    f"override '{override.input_line}' has several values, expected one; "
                    "write [a,b] for a list or quote the text"
                )
            _check_parents(cfg, override.key_or_group)
            OmegaConf.update(cfg, override.key_or_group, override.value(), merge=True)
        return cfg

    @staticmethod
    def to_py(cfg: Any, prefix: str = "cfg.") -> str:
        """Return ``cfg`` as assignments in the style of Python, for reading."""
        data: Any = OmegaConf.to_container(cfg, resolve=True)
        return _text.assignments(data, prefix)


def _check_parents(cfg: DictConfig, key: str) -> None:
    parts = key.split(".")
    for end in range(1, len(parts)):
        parent = ".".join(parts[:end])
        value = OmegaConf.select(cfg, parent, default=None)
        if value is not None and not OmegaConf.is_config(value):
            raise KeyError(
                f"cannot set '{key}': '{parent}' is a {type(value).__name__}, expected a config"
            )
