"""Fixtures of the engine's tests: the tiny detector's data, and what the engine logs."""

import logging
import os

import pytest
from tiny_detector import write_tiny_data


@pytest.fixture(scope="session", autouse=True)
def tiny_data(tmp_path_factory):
    """Folder of the tiny detector's images and annotations."""
    folder = tmp_path_factory.mktemp("tiny_data")
    write_tiny_data(folder)
    os.environ["TINY_DATA"] = str(folder)
    return folder


class _Messages(logging.Handler):
    def __init__(self):
        super().__init__()
        self.text = ""

    def emit(self, record):
        self.text += self.format(record) + "\n"


@pytest.fixture
def engine_log():
    """What the engine logs during a test, as ``engine_log.text``, whoever else listens."""
    handler, logger = _Messages(), logging.getLogger("engine")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(level)
