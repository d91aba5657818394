"""Access to the shipped configs and to keys that may be absent."""

from pathlib import Path

from detectron2.config import LazyConfig
from omegaconf import DictConfig, OmegaConf

__all__ = ["get_config", "try_get_key"]

_CONFIGS = Path(__file__).parent / "configs"
_ABSENT = object()


def try_get_key(cfg, *keys, default=None):
    """Return the value of the first of ``keys`` (dotted paths) that ``cfg`` has, or ``default``."""
    values = (OmegaConf.select(cfg, key, default=_ABSENT) for key in keys)
    return next((value for value in values if value is not _ABSENT), default)


def get_config(config_path) -> DictConfig:
    """Load a shipped config, named as in ``"common/train.py"``; RuntimeError if there is none."""
    file = _CONFIGS / config_path
    if not file.is_file():
        available = sorted(str(f.relative_to(_CONFIGS)) for f in _CONFIGS.rglob("*.py"))
        raise RuntimeError(f"get_config: found no {config_path!r}, expected one of {available}")
    return LazyConfig.load(str(file))
