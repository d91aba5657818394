"""Cells, presets and rows for tests of the study that train nothing."""

import math

from projects.study.cells import Cell, Preset
from tools.study_results import RunRow


def cell(name, teacher=None, baseline=None, group="Methods", title=None, **others):
    return Cell(name, title or name.upper(), group, dict, baseline, teacher, **others)


def preset(*cells, seeds=(0, 1, 2)):
    return Preset(
        "tiny", "For tests.", {"preset": "quickstart", "size": (64, 96)}, cells, "cpu", seeds
    )


def row(name, seed, precision, step=0.5, **others):
    values = {
        "preset": "tiny",
        "config": "0123456789",
        "commit": "abc1234",
        "device": "a processor",
        "torch": "2.13.0",
        "iterations": 100,
        "wall_s": 60.0,
        "peak_mb": 500.0,
        "AP50": 2 * precision,
        "AP75": precision / 2,
        "APs": 1.0,
        "APm": 2.0,
        "APl": math.nan,
        **others,
    }
    return RunRow(cell=name, seed=seed, step_s=step, AP=precision, **values)
