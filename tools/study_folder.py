"""Where a run of a study lives: its settings, what it has logged, how long it took."""

from __future__ import annotations

import hashlib
import itertools
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from detectron2.config import LazyConfig
from omegaconf import DictConfig, OmegaConf

from engine.checkpoint import save_atomically, write_atomically
from engine.errors import UserError
from projects.study.cells import Cell, Preset
from tools.plot_metrics import read_metrics
from tools.study_data import data_options
from tools.study_plan import needs

__all__ = ["Configs", "RunFolder"]


class Configs:
    """The complete configs of a preset's cells on a device, each built once.

    Args:
        preset: the cells.
        device: that all of them train on.
    """

    def __init__(self, preset: Preset, device: str) -> None:
        self._preset = preset
        self._device = device
        self._built: dict[str, DictConfig] = {}
        self._digests: dict[str, str] = {}

    def of(self, cell: Cell) -> DictConfig:
        """Return a cell's config; the seed, the folder and files to start from are not set.

        Raises:
            UserError: the cell has a teacher and its config no place for it.
        """
        if cell.name not in self._built:
            config = deepcopy(cell.build())
            if cell.teacher is not None and "init_checkpoint" not in config.get("teacher", {}):
                raise UserError(
                    f"cell '{cell.name}' has the teacher '{cell.teacher}', but its config no "
                    "teacher.init_checkpoint"
                )
            config.train.device = self._device
            self._built[cell.name] = config
        return deepcopy(self._built[cell.name])

    def digest(self, cell: Cell) -> str:
        """Return ten hex digits for the cell's settings.

        They also change with the images and with the settings of the cells that it needs first.
        """
        if cell.name not in self._digests:
            config = self.of(cell)
            config.train.update(seed=0, output_dir="")
            is_backbone = cell is self._preset.backbone
            shapes = self._preset.backbone_shapes if is_backbone else self._preset.shapes
            texts = [_as_yaml(config), *data_options(shapes)]
            texts += [self.digest(other) for other in needs(self._preset, cell)]
            text = "\n".join(texts)
            self._digests[cell.name] = hashlib.sha256(text.encode()).hexdigest()[:10]
        return self._digests[cell.name]


def _as_yaml(config: DictConfig) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.yaml")
        LazyConfig.save(config, str(path))
        return path.read_text()


def _is_part(part: Any) -> bool:
    """Whether this is a start, maybe with an end, in seconds."""
    times = isinstance(part, list) and all(isinstance(moment, int | float) for moment in part)
    return times and len(part) in (1, 2)


class RunFolder:
    """The folder of one run, ``<work>/<cell>/seed<k>``.

    Beside what a training leaves there are ``study.yaml`` with its config, ``console.txt`` with its
    output and ``state.json`` with the digest of the settings and the times of the run's parts: it
    may be interrupted and resumed.

    Args:
        work: the folder of all runs.
        cell: a cell's name.
        seed: the run's.
    """

    def __init__(self, work: Path, cell: str, seed: int) -> None:
        self.path = work.absolute() / cell / f"seed{seed}"
        self.config = self.path / "study.yaml"
        self.console = self.path / "console.txt"
        self.log = self.path / "log.txt"
        self.metrics = self.path / "metrics.json"
        self.weights = self.path / "model_final.pth"
        self._state = self.path / "state.json"

    def begin(self, config: DictConfig, digest: str, seed: int, starts: Mapping[str, Path]) -> bool:
        """Write the config and note that a part begins.

        What a run with other settings has left is set aside: nothing resumes from it.

        Args:
            config: of the cell; it is completed.
            digest: its settings'.
            seed: of the run.
            starts: keys of the config and the checkpoints that they name.

        Returns:
            whether something was set aside.
        """
        digest_before, parts = self._load()
        changed = digest_before not in ("", digest)
        if changed:
            self._set_aside()
            parts = []
        self.path.mkdir(parents=True, exist_ok=True)
        config.train.update(seed=seed, output_dir=str(self.path))
        for key, path in starts.items():
            OmegaConf.update(config, key, str(path))
        LazyConfig.save(config, str(self.config))
        self._save(digest, [*parts, [time.time()]])
        return changed

    def end(self) -> None:
        """Note that the part has ended."""
        digest, parts = self._load()
        self._save(digest, [*parts[:-1], [parts[-1][0], time.time()]])

    def seconds(self) -> float:
        """Return the time of all parts together; there must be none in progress."""
        return sum(end - start for start, end in self._load()[1])

    def has_weights(self, digest: str) -> bool:
        """Whether the run has been trained to its end with these settings."""
        return self.weights.is_file() and self._load()[0] == digest

    def backbone(self) -> Path:
        """Return a file of the trained detector's backbone alone, written if need be.

        Raises:
            UserError: the detector has no weights named ``backbone.…``.
        """
        path = self.path / "backbone.pth"
        if not path.is_file() or path.stat().st_mtime < self.weights.stat().st_mtime:
            weights = torch.load(self.weights, map_location="cpu", weights_only=True)["model"]
            kept = {key: value for key, value in weights.items() if key.startswith("backbone.")}
            if not kept:
                raise UserError(f"{self.weights} holds no weights named backbone.…")
            save_atomically({"model": kept}, path)
        return path

    def is_begun(self, digest: str) -> bool:
        """Whether there is something to resume."""
        return self._load()[0] == digest

    def iterations_done(self) -> int:
        """Return how many iterations are logged."""
        records = read_metrics(self.metrics) if self.metrics.is_file() else []
        return max((r["iteration"] + 1 for r in records if "total_loss" in r), default=0)

    def last_lines(self, count: int) -> list[str]:
        """Return the end of what the run has printed."""
        text = self.console.read_text(errors="replace") if self.console.is_file() else ""
        return [line for line in text.splitlines() if line.strip()][-count:]

    def _load(self) -> tuple[str, list[list[float]]]:
        """The digest, and start and end of each part, in seconds since the epoch."""
        try:
            state = json.loads(self._state.read_text())
            digest, parts = state["settings"], state["parts"]
            intact = isinstance(digest, str) and all(_is_part(part) for part in parts)
        except FileNotFoundError:
            return "", []
        except (ValueError, KeyError, TypeError):
            intact = False
        if not intact:
            raise UserError(f"{self._state} is damaged: remove {self.path}")
        return digest, [part if len(part) == 2 else [part[0], self._last_seen()] for part in parts]

    def _last_seen(self) -> float:
        """When a part whose end nobody has noted was last heard of."""
        return self.console.stat().st_mtime if self.console.is_file() else time.time()

    def _save(self, digest: str, parts: Sequence[Sequence[float]]) -> None:
        text = json.dumps({"settings": digest, "parts": parts})
        write_atomically(self._state, lambda file: file.write(text.encode()))

    def _set_aside(self) -> None:
        names = (f"{self.path.name}.previous-{count}" for count in itertools.count(1))
        self.path.rename(next(p for p in map(self.path.with_name, names) if not p.exists()))
