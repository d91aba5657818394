"""Checkpoints that survive a crash at any moment."""

import logging
import math
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from torch import nn

from .compatibility import check_compatible
from .errors import LocalError, UserError
from .rng import get_rng_state

__all__ = [
    "AtomicCheckpointer",
    "newest_checkpoint",
    "require_readable",
    "stored_best",
    "stored_entry",
    "write_atomically",
]

logger = logging.getLogger(__name__)

_POINTER = "last_checkpoint"
_T = TypeVar("_T")


class AtomicCheckpointer(DetectionCheckpointer):
    """A DetectionCheckpointer whose files are complete or absent, and which checks what it loads.

    :meth:`save` must be called by all processes: it collects each one's random state.

    Attributes:
        strictness: how weights must fit the model: "resume", "evaluate", "evaluate branches",
            "initialise" or "partial" (see :func:`engine.compatibility.check_compatible`).
        extra: entries added to every full checkpoint.
    """

    def __init__(self, model: nn.Module, save_dir: str = "", **checkpointables: Any) -> None:
        super().__init__(model, save_dir, **checkpointables)
        self.strictness = "initialise"
        self.extra: dict[str, Any] = {}
        self._path = ""

    def save(self, name: str, **kwargs: Any) -> None:
        """Write ``name``.pth with everything that resuming needs, then point last_checkpoint to it.

        Args:
            name: file name without its ending.
            kwargs: more entries.
        """
        rng = comm.gather(get_rng_state())
        if not self.save_dir or not self.save_to_disk:
            return
        state = {key: thing.state_dict() for key, thing in self.checkpointables.items()}
        data = {"model": self.model.state_dict(), **state, "rng": rng, **self.extra, **kwargs}
        path = Path(self.save_dir, f"{name}.pth")
        logger.info("Saving checkpoint to %s", path)
        save_atomically(data, path)
        self.tag_last_checkpoint(path.name)

    def save_weights(self, name: str, **kwargs: Any) -> None:
        """Write ``name``.pth with the weights alone (and their average), for later use."""
        if self.save_dir and self.save_to_disk:
            data = {"model": self.model.state_dict(), **kwargs}
            if "ema_state" in self.checkpointables:
                data["ema_state"] = self.checkpointables["ema_state"].state_dict()
            save_atomically(data, Path(self.save_dir, f"{name}.pth"))

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Name the checkpoint to resume from."""
        text = last_filename_basename.encode()
        write_atomically(Path(self.save_dir, _POINTER), lambda file: file.write(text))

    def prune(self, max_to_keep: int) -> None:
        """Remove the oldest numbered checkpoints, keeping the ``max_to_keep`` newest."""
        if self.save_to_disk:
            for path in _numbered(self.save_dir)[max_to_keep:]:
                path.unlink(missing_ok=True)

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load a file and return the entries that nobody took.

        Raises:
            UserError: no such file, not a checkpoint, or one of another architecture, optimiser or
                other objectives.
        """
        self._path = path
        if path:
            require_readable(path)
        try:
            return super().load(path, *args, **kwargs)
        except (KeyError, RuntimeError, ValueError) as error:
            lines = str(error).strip().splitlines()
            raise UserError(f"{path} does not fit this config: {' '.join(lines[:2])}") from error

    def _load_file(self, f: str) -> Any:
        try:
            loaded = super()._load_file(f)
        except UserError:
            raise
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            which = f"checkpoint {self._path}: "
            raise UserError(f"cannot read {which}{reason.removeprefix(which)}") from error
        if not isinstance(loaded, dict) or not isinstance(loaded.get("model"), dict):
            raise UserError(f"{self._path} is not a checkpoint: it holds no dict of weights")
        return loaded

    def _load_model(self, checkpoint: Any) -> Any:
        by_heuristics = bool(checkpoint.get("matching_heuristics", False))
        incompatible = super()._load_model(checkpoint)
        strictness = "partial" if by_heuristics else self.strictness
        check_compatible(self._path, self.model, incompatible, strictness=strictness)
        return incompatible


def newest_checkpoint(folder: str) -> str:
    """Return the newest intact checkpoint to resume from, warning about damaged ones.

    Returns:
        its path, or an empty string if the folder holds no checkpoint at all.

    Raises:
        UserError: there are checkpoints, and all are damaged.
    """
    candidates = _resumable(folder)
    for path in candidates:
        fault = find_damage(path)
        if not fault:
            return str(path)
        logger.warning("checkpoint %s is damaged (%s): using the one before it", path, fault)
    if candidates:
        raise UserError(f"none of the {len(candidates)} checkpoints in {folder} is intact")
    return ""


def find_damage(path: Path) -> str:
    """Return what is wrong with a checkpoint file, or an empty string if every byte is right."""
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        if broken:
            return f"checksum of {broken} is wrong"
        torch.load(path, map_location="meta", mmap=True, weights_only=True)
    except Exception as error:  # zipfile and torch raise many types on damaged files
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    return ""


def stored_best(folder: str) -> float:
    """Return the metric of the folder's model_best.pth; minus infinity if there is none intact."""
    path = Path(folder, "model_best.pth")
    if not path.is_file() or find_damage(path):
        return -math.inf
    best = stored_entry(path, "best", float)
    return -math.inf if best is None else best


def stored_entry(path: str | Path, key: str, kind: type[_T]) -> _T | None:
    """Return an entry of a checkpoint; None if it has none of that type."""
    stored = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    value = stored.get(key) if isinstance(stored, dict) else None
    return value if isinstance(value, kind) else None


def save_atomically(data: Any, path: Path) -> None:
    """``torch.save`` so that ``path`` is either complete or as it was before."""
    write_atomically(path, lambda file: torch.save(data, file))


def write_atomically(path: Path, write: Callable[[Any], object]) -> None:
    """Let ``write`` fill a temporary file, sync it, and rename it to ``path``.

    Raises:
        LocalError: the file cannot be written, for example because the disk is full.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        raise LocalError(f"cannot write {path}: {str(error).splitlines()[0]}") from error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def require_readable(path: str | None) -> None:
    """Stop if a checkpoint that is named is not there, an URL's local copy included."""
    if not path:
        return
    if not isinstance(path, str):
        raise UserError(f"train.init_checkpoint is {path}, expected a path")
    local = path.partition("?")[0]
    try:
        found = os.path.isfile(PathManager.get_local_path(local))
    except Exception as error:  # iopath's handlers raise many types
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if not reason.startswith(local):
            reason = f"{local} not found: {reason}"
        raise UserError(f"checkpoint {reason}") from error
    if not found:
        raise UserError(f"checkpoint {local} not found")


def _numbered(folder: str) -> list[Path]:
    """Periodic checkpoints, newest first."""
    files = [p for p in Path(folder).glob("model_*.pth") if p.stem.removeprefix("model_").isdigit()]
    return sorted(files, key=lambda path: path.stem, reverse=True)


def _resumable(folder: str) -> list[Path]:
    """Checkpoints to resume from: the one last written first, then by age."""
    files = [*Path(folder).glob("model_final.pth"), *_numbered(folder)]
    files.sort(key=lambda path: path.stat().st_mtime_ns, reverse=True)
    pointer = Path(folder, _POINTER)
    if pointer.is_file():
        named = Path(folder, pointer.read_bytes().decode(errors="replace").strip())
        files = ([named] if named.is_file() else []) + [path for path in files if path != named]
    return files
