"""Tests that fork must not inherit threads: their children would wait for them for ever."""

from pathlib import Path

import pytest
import torch

CONFTEST = Path(__file__).with_name("conftest.py")


@pytest.mark.parametrize(("told", "expected"), [(None, 1), ("3", 3)])
def test_there_is_one_thread_unless_told_otherwise(
    told, expected, monkeypatch, threads, pytestconfig
):
    torch.set_num_threads(3)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if told is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", told)
    pytestconfig.pluginmanager.get_plugin(str(CONFTEST)).pytest_configure()
    assert torch.get_num_threads() == expected
