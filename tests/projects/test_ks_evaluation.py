"""Detections of KS-DETR's branches on ground-truth masks, and the way to the plain detector."""

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from recorded_ks import CASES, RecordedModel
from tiny_detectors import (
    ROOT,
    SETTINGS,
    StridedBackbone,
    build_conditional,
    instances,
    pattern_image,
)

from projects.ks_detr.encoder import share_knowledge


@pytest.mark.parametrize("case", CASES)
def test_recorded_detections_of_every_branch(case, reference_dir):
    RecordedModel(reference_dir / "ks_detr", case).check_branches()


def tiny(**options):
    torch.manual_seed(0)
    model = build_conditional(SETTINGS, {})
    share_knowledge(model.transformer.encoder, **options)
    model.backbone = StridedBackbone()
    return model.eval()


def batch():
    """Two images of different sizes, the second one without objects."""
    first, second = (64, 96), (48, 64)
    return [
        {
            "image": pattern_image(0, *first),
            "instances": instances(first, [[8, 8, 40, 40]], [2]),
        },
        {"image": pattern_image(1, *second), "instances": instances(second, [], [])},
    ]


@torch.no_grad()
def test_only_the_named_branches_are_decoded():
    model, rows = tiny(), []
    model.transformer.decoder.register_forward_pre_hook(
        lambda module, inputs: rows.append(inputs[1].tokens.shape[0])
    )
    both = model.detect_branches(batch(), ["share_a", "share_v"])
    assert rows == [2, 2]
    assert list(both) == ["share_a", "share_v"]
    one = model.detect_branches(batch(), ["share_v"])
    assert rows == [2, 2, 2]
    for found, expected in zip(one["share_v"], both["share_v"], strict=True):
        assert torch.equal(found["instances"].scores, expected["instances"].scores)
    assert not torch.equal(
        both["share_v"][0]["instances"].scores, both["share_a"][0]["instances"].scores
    )


@torch.no_grad()
def test_the_student_beside_its_teachers_is_the_detector():
    model = tiny()
    alone = model(batch())
    beside = model.detect_branches(batch(), ["student", "share_v"])["student"]
    for a, b in zip(alone, beside, strict=True):
        torch.testing.assert_close(a["instances"].scores, b["instances"].scores)
        torch.testing.assert_close(
            a["instances"].pred_boxes.tensor, b["instances"].pred_boxes.tensor
        )


@torch.no_grad()
def test_teachers_see_the_ground_truth_and_the_student_does_not():
    model = tiny()
    before = model.detect_branches(batch(), ["student", "share_v", "share_a"])
    moved = batch()
    moved[0]["instances"].gt_boxes.tensor += 24
    after = model.detect_branches(moved, ["student", "share_v", "share_a"])
    scores = {
        name: [detected[name][0]["instances"].scores for detected in (before, after)]
        for name in before
    }
    assert torch.equal(*scores["student"])
    assert not torch.equal(*scores["share_v"])
    assert not torch.equal(*scores["share_a"])


@torch.no_grad()
def test_without_ground_truth_it_is_an_error_that_names_the_image():
    inputs = batch()
    del inputs[1]["instances"]
    with pytest.raises(ValueError, match="image 1 of the batch has no 'instances'"):
        tiny().detect_branches(inputs, ["share_v"])


@pytest.mark.parametrize(
    "name",
    [
        "conditional_detr",
        "dab_detr",
        "dn_detr",
        "detr",
        "deformable_detr",
        "dn_deformable_detr",
    ],
)
@torch.no_grad()
def test_every_detector_has_branches_to_evaluate(name):
    """Two-layer quickstart models; no detector makes queries of noised targets here."""
    path = ROOT / f"projects/baselines/configs/models/{name}_quickstart.py"
    config = LazyConfig.load(str(path)).model
    torch.manual_seed(0)
    model = instantiate(config).eval()
    share_knowledge(model.transformer.encoder)
    assert model.branch_names == ("student", "share_v", "share_a")
    lengths = []
    model.transformer.decoder.register_forward_hook(
        lambda module, inputs, output: lengths.append(output.states.shape[2])
    )
    detected = model.detect_branches(batch(), model.branch_names)
    assert lengths == [config.num_queries] * 3
    scores = [results[0]["instances"].scores for results in detected.values()]
    assert all(score.isfinite().all() for score in scores)
    assert not torch.equal(scores[1], scores[0])
    assert not torch.equal(scores[2], scores[0])
    alone = model(batch())[0]["instances"].scores
    torch.testing.assert_close(scores[0], alone, rtol=1e-4, atol=1e-5)
