"""Keeping a training step so that it can be run again: batch, weights, random state."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.structures import Boxes, Instances

from .checkpoint import save_atomically

__all__ = ["load_snapshot", "save_snapshot"]

_TYPE = "__type__"


def save_snapshot(snapshot: dict[str, Any], path: Path) -> None:
    """Write a dict with the entry "batch" so that reading it back needs no trust in the file."""
    save_atomically({**snapshot, "batch": _to_plain(snapshot["batch"])}, path)


def load_snapshot(path: Path | str) -> dict[str, Any]:
    """Read a snapshot: model, trainer (with the optimiser), batch, rng, losses and iteration.

    Set the random state with :func:`engine.rng.set_rng_state`, then call the model on the batch.
    """
    snapshot = torch.load(path, map_location="cpu", weights_only=True)
    return {**snapshot, "batch": _from_plain(snapshot["batch"])}


def _to_plain(value: Any) -> Any:
    if isinstance(value, Instances):
        fields = {name: _to_plain(field) for name, field in value.get_fields().items()}
        return {_TYPE: "Instances", "image_size": list(value.image_size), "fields": fields}
    if isinstance(value, Boxes):
        return {_TYPE: "Boxes", "tensor": value.tensor.cpu()}
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return torch.from_numpy(value.copy())
    if isinstance(value, dict):
        return {key: _to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_plain(item) for item in value]
    if value is None or type(value) is bool:
        return value
    for kind in (int, float, str):
        if isinstance(value, kind):
            return kind(value)  # also what an enumeration stands for
    return repr(value)


def _from_plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_from_plain(item) for item in value]
    if not isinstance(value, dict):
        return value
    if value.get(_TYPE) == "Boxes":
        return Boxes(value["tensor"])
    if value.get(_TYPE) == "Instances":
        fields = {name: _from_plain(field) for name, field in value["fields"].items()}
        return Instances(tuple(value["image_size"]), **fields)
    return {key: _from_plain(item) for key, item in value.items()}
