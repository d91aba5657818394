"""Random seeds of the whole process."""

import logging
import os
import random

import numpy as np
import torch

__all__ = ["seed_all_rng"]


def seed_all_rng(seed: int | None = None) -> None:
    """Seed Python, numpy and torch (all devices) alike; ``None`` draws and logs a fresh seed."""
    if seed is None:
        seed = int.from_bytes(os.urandom(4), "big")
        logging.getLogger(__name__).info("Using a generated random seed %d", seed)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    os.environ["PYTHONHASHSEED"] = str(seed)  # for processes started from here on
