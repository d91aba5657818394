"""What every project's configs hold."""

from pathlib import Path

import pytest
from detectron2.config import LazyConfig

PROJECTS = Path(__file__).resolve().parents[2] / "projects"
READ = {"dataloader", "evaluation", "lr_multiplier", "model", "optimizer", "teacher", "train"}


@pytest.mark.parametrize("project", sorted(path.parent.name for path in PROJECTS.glob("*/configs")))
def test_configs_hold_nothing_that_no_run_reads(project):
    """A name that a config imports or loops with becomes one of its keys."""
    found = {
        path.stem: set(LazyConfig.load(str(path)).keys()) - READ
        for path in sorted((PROJECTS / project / "configs").glob("*.py"))
    }
    assert {name for name, keys in found.items() if keys} == set()
