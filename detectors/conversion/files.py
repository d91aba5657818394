"""Reading weights from files without running code from them."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .layout import ConversionError

# where files keep the weights beside what else training needs
_HOLDERS = ("model", "state_dict")

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
}


def read_weights(path: Path) -> dict[str, Tensor]:
    """The weights in a ``.safetensors`` file or in one that ``torch.save`` has written.

    Raises:
        ConversionError: no such file, it cannot be read, or it holds no weights.
    """
    if not path.is_file():
        raise ConversionError(f"checkpoint {path} not found")
    try:
        if path.suffix == ".safetensors":
            with path.open("rb") as file:
                content: Any = _read_safetensors(file)
        else:
            # the settings of the official trainings
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types on damaged files
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConversionError(f"cannot read checkpoint {path}: {reason}") from error
    weights = _find_weights(content)
    if not weights:
        raise ConversionError(f"{path} is not a checkpoint: it holds no dict of weights")
    return weights


def _find_weights(content: Any) -> dict[str, Tensor]:
    """The tensors by name, without the prefix that training in several processes adds."""
    if not isinstance(content, dict):
        return {}
    held = [content[name] for name in _HOLDERS if isinstance(content.get(name), dict)]
    weights = held[0] if held else content
    if not all(isinstance(value, Tensor) for value in weights.values()):
        return {}
    if all(key.startswith("module.") for key in weights):
        return {key.removeprefix("module."): value for key, value in weights.items()}
    return dict(weights)


def _read_safetensors(file: BinaryIO) -> dict[str, Tensor]:
    """A JSON header, whose length comes first, names each tensor's place in the rest."""
    header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    data = bytearray(file.read())
    header.pop("__metadata__", None)
    return {name: _tensor(data, name, **entry) for name, entry in header.items()}


def _tensor(
    data: bytearray, name: str, dtype: str, shape: list[int], data_offsets: tuple[int, int]
) -> Tensor:
    if dtype not in _DTYPES:
        raise ValueError(f"{name} is of type {dtype}, expected one of {', '.join(_DTYPES)}")
    start, end = data_offsets
    count = math.prod(shape)
    if not 0 <= start <= end <= len(data) or end - start != count * _DTYPES[dtype].itemsize:
        raise ValueError(f"{name} lies at {start} to {end}, which cannot be")
    if count == 0:
        return torch.empty(shape, dtype=_DTYPES[dtype])
    return torch.frombuffer(data, dtype=_DTYPES[dtype], count=count, offset=start).reshape(shape)
