"""The path manager through which configs, weights and logs are opened; it never downloads."""

import os
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from iopath.common.file_io import PathHandler
from iopath.common.file_io import PathManager as _PathManager

__all__ = ["PathHandler", "PathManager"]

_MODEL_ZOO = "https://dl.fbaipublicfiles.com/detectron2/"
_DEFAULT_CACHE = "~/.torch/iopath_cache"


def _cached(url: str) -> Path:
    """Where iopath keeps the download of ``url``."""
    cache = Path(os.environ.get("FVCORE_CACHE", _DEFAULT_CACHE)).expanduser()
    return cache / urlsplit(url).path.lstrip("/")


class _LocalCopyHandler(PathHandler):
    """Resolves a URL to a file that is already on this machine, and says where it looked if not."""

    def _get_supported_prefixes(self) -> list[str]:
        return ["http://", "https://"]

    def _expected(self, path: str) -> Path:
        return _cached(path)

    def _how_to_provide(self) -> str:
        return "download it to that place"

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        self._check_kwargs(kwargs)
        local = self._expected(path)
        if not local.exists():
            raise FileNotFoundError(
                f"{path} not found: expected at {local} ({self._how_to_provide()}; "
                "nothing is downloaded automatically)"
            )
        return str(local)

    def _open(
        self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any
    ) -> IO[str] | IO[bytes]:
        self._check_kwargs(kwargs)
        if mode not in ("r", "rb"):
            raise ValueError(f"{path} is read-only, but was opened with mode '{mode}'")
        return open(self._get_local_path(path), mode, buffering)

    def _exists(self, path: str, **kwargs: Any) -> bool:
        return self._expected(path).exists()

    def _isfile(self, path: str, **kwargs: Any) -> bool:
        return self._expected(path).is_file()

    def _isdir(self, path: str, **kwargs: Any) -> bool:
        return self._expected(path).is_dir()


class Detectron2Handler(_LocalCopyHandler):
    """Resolves ``detectron2://NAME``, the name of a file in detectron2's model zoo.

    The file is ``$DETECTRON2_WEIGHTS/NAME`` if that variable is set, else where an installed
    detectron2 would have put its download.
    """

    PREFIX = "detectron2://"

    def _get_supported_prefixes(self) -> list[str]:
        return [self.PREFIX]

    def _expected(self, path: str) -> Path:
        name = path.removeprefix(self.PREFIX)
        folder = os.environ.get("DETECTRON2_WEIGHTS")
        return Path(folder).expanduser() / name if folder else _cached(_MODEL_ZOO + name)

    def _how_to_provide(self) -> str:
        if os.environ.get("DETECTRON2_WEIGHTS"):
            return f"download it there from {_MODEL_ZOO}"
        return f"download it there from {_MODEL_ZOO}, or set DETECTRON2_WEIGHTS to your own folder"


PathManager = _PathManager()
"""The one path manager of this package."""
PathManager.register_handler(_LocalCopyHandler())
PathManager.register_handler(Detectron2Handler())
