"""Whole KS-DETR detectors against losses and gradients of the released implementation."""

import pytest
from recorded_entries import Recording
from recorded_ks import CASES, RecordedModel
from tiny_detectors import ROOT

# of these, losses, gradients and detections are kept here too
KEPT = [name for name in CASES if name.startswith("conditional")]


@pytest.fixture(scope="module", params=[*CASES, *(f"kept {name}" for name in KEPT)])
def recorded(request):
    kept, _, name = request.param.rpartition(" ")
    if kept:
        return RecordedModel(ROOT / "tests" / "data" / "ks_detr", name)
    return RecordedModel(request.getfixturevalue("reference_dir") / "ks_detr", name)


def test_training(recorded):
    recorded.check_training()


def test_student_inference(recorded):
    recorded.check_inference()


def test_cases_are_those_recorded(recorded):
    recorded.check_settings()


def test_no_recorded_model_is_left_out(reference_dir):
    """The arrays of training and evaluation are all compared, see ``Entries.finish``."""
    recording = Recording(reference_dir / "ks_detr" / "models")
    assert recording.cases.keys() == set(CASES)
    kinds = {tuple(key.split("/")[:2]) for key in recording.arrays}
    inputs = {("inputs", f"{mode}_features") for mode in ("train", "eval")}
    assert kinds == inputs | {(name, mode) for name in CASES for mode in ("train", "eval")}
