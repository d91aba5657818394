"""A second implementation of the masks of dropout."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ops import dropout

SEED = 0x123456789ABCDEF  # both halves matter
WORD = 0xFFFFFFFF


def mixed(x: int) -> int:
    x = (x ^ x >> 16) * 0x7FEB352D & WORD
    x = (x ^ x >> 15) * 0x846CA68B & WORD
    return x ^ x >> 16


def random_bits(seed: int, count: int, row: int = 0) -> np.ndarray:
    """The documented hash of a seed and of elements 0, 1, ..., in NumPy's 32-bit arithmetic."""
    with np.errstate(over="ignore"):
        number = np.uint64(seed)
        number = (number ^ number >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        number = (number ^ number >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    number = int(number ^ number >> np.uint64(31))
    first = mixed(number & WORD ^ row)
    second = mixed(first + (number >> 32) + 0x9E3779B9 & WORD)
    x = np.arange(count, dtype=np.uint32) * np.uint32(0x9E3779B9) ^ np.uint32(first)
    x = (x ^ x >> np.uint32(16)) * np.uint32(0x7FEB352D)
    x = (x ^ x >> np.uint32(15)) + np.uint32(second)
    x = x * np.uint32(0x846CA68B)
    return x ^ x >> np.uint32(16)


def mask_of(shape: tuple[int, ...], p: float, seed: int = SEED) -> Tensor:
    """Which elements are kept, by the second implementation."""
    bits = random_bits(seed, torch.Size(shape).numel())
    return torch.from_numpy(bits.astype(np.int64) >= int(p * 2**32)).view(shape)


def seeded(seed: int = SEED) -> Tensor:
    return torch.tensor([seed])


def drawn_seed(state: int) -> int:
    """The seed of the first call after ``torch.manual_seed(state)``, which is set once more."""
    torch.manual_seed(state)
    seed = int(dropout.draw_seed())
    torch.manual_seed(state)
    return seed
