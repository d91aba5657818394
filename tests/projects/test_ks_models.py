"""Whole KS-DETR detectors against losses and gradients of the released implementation."""

import pytest
from recorded_ks import CASES, RecordedModel
from tiny_detectors import ROOT


@pytest.fixture(scope="module", params=CASES)
def recorded(request):
    folder = ROOT / "tests" / "data" / "ks_detr"
    if not request.param.startswith("conditional"):
        folder = request.getfixturevalue("reference_dir") / "ks_detr"
    return RecordedModel(folder, request.param)


def test_training(recorded):
    recorded.check_training()


def test_student_inference(recorded):
    recorded.check_inference()
