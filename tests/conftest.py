"""Shared fixtures. Importing ``projects`` first puts the active runtime on the import path."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import projects  # noqa: F401

ROOT = Path(__file__).resolve().parent.parent


def pytest_configure() -> None:
    """Have one thread, unless told otherwise: forked tests would wait for their parent's others."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


@pytest.fixture
def threads() -> Iterator[None]:
    """Whatever number of threads a test chooses is undone."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def reference_dir() -> Path:
    """Folder of recorded reference vectors; the test is skipped where it is absent."""
    folder = Path(os.environ.get("DETR_REFERENCE_DIR", ROOT.parent / "shared" / "reference"))
    if not folder.is_dir():
        pytest.skip(f"reference vectors not found at {folder} (set DETR_REFERENCE_DIR)")
    return folder
