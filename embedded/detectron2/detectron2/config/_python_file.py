"""Execution of configs written in Python.

A config file may import another one with ``from .file import name``. Such an import goes by the
location of the file, needs no package, always runs the file anew (so that changing an imported
config changes nobody else's), and yields dicts as configs. To this end the file is executed with
an ``__import__`` of its own; nothing outside config files is affected.
"""

import builtins
from collections.abc import Mapping
from pathlib import PurePath
from types import ModuleType
from typing import Any

from omegaconf import DictConfig, ListConfig

from detectron2.utils.file_io import PathManager

_MODULE_NAME = "detectron2._cfg_loader."


def as_config(value: Any) -> Any:
    """Turn a dict into a DictConfig; anything else stays as it is."""
    return DictConfig(value, flags={"allow_objects": True}) if isinstance(value, dict) else value


def configs_among(namespace: Mapping[str, Any]) -> DictConfig:
    """One config of all the public configs and dicts in a namespace."""
    kinds = (dict, DictConfig, ListConfig)
    configs = {
        name: as_config(value)
        for name, value in namespace.items()
        if isinstance(value, kinds) and not name.startswith("_")
    }
    return DictConfig(configs, flags={"allow_objects": True})


def execute(filename: str, importers: tuple[str, ...] = ()) -> dict[str, Any]:
    """Execute a config file and return its namespace.

    Args:
        filename: path of the file.
        importers: the files through which it is imported, outermost first.
    """
    with PathManager.open(filename, encoding="utf-8") as file:
        source = file.read()
    try:
        code = compile(source, filename, "exec", dont_inherit=True)
    except SyntaxError as error:
        raise SyntaxError(
            f"config file {filename}, line {error.lineno}: syntax error: {error.msg}"
        ) from None
    namespace = {
        "__name__": _MODULE_NAME + PurePath(filename).stem,
        "__file__": filename,
        "__builtins__": {
            **vars(builtins),
            "__import__": _importer((*importers, filename)),
        },
    }
    exec(code, namespace)
    return namespace


def _importer(files: tuple[str, ...]) -> Any:
    """Build the ``__import__`` of the last of ``files``, a chain of files that import the next."""

    def import_(
        name: str,
        globals: Any = None,
        locals: Any = None,
        fromlist: tuple[str, ...] = (),
        level: int = 0,
    ) -> ModuleType:
        if level == 0:
            return builtins.__import__(name, globals, locals, fromlist, level)
        filename = _find(files[-1], name, level)
        if filename in files:
            raise ImportError(f"config files import each other: {' -> '.join((*files, filename))}")
        module = ModuleType(_MODULE_NAME + name)
        module.__dict__.update(execute(filename, files))
        for imported in fromlist:
            if not hasattr(module, imported):
                raise ImportError(f"{files[-1]}: cannot import '{imported}' from {filename}")
            setattr(module, imported, as_config(getattr(module, imported)))
        return module

    return import_


def _find(importer: str, name: str, level: int) -> str:
    """Path of the config file that ``from <level dots><name> import ...`` means."""
    dotted = "." * level + name
    if not name:
        raise ImportError(f"{importer}: 'from {dotted} import': name a config file, not a folder")
    folder = PurePath(importer).parent
    for _ in range(level - 1):
        folder = folder / ".." if folder.name in ("", "..") else folder.parent
    target = folder.joinpath(*name.split("."))
    filename = f"{target}.py"
    if not PathManager.isfile(filename):
        found = "a folder" if PathManager.isdir(str(target)) else "missing"
        raise ImportError(
            f"{importer}: cannot import from '{dotted}': {filename} is {found}, "
            "expected a config file"
        )
    return filename
