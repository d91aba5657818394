import itertools

import pytest
import torch
from detrex.layers import box_cxcywh_to_xyxy
from detrex.modeling.matcher import (
    CrossEntropyCost,
    FocalLossCost,
    GIoUCost,
    HungarianMatcher,
    L1Cost,
    ModifedMatcher,
)
from recorded_cases import close, embedded_only

CASES = [
    "matcher_focal_a",
    "matcher_focal_empty_first",
    "matcher_ce_a",
    "matcher_focal_more_targets_than_queries",
    "matcher_all_empty",
    "matcher_defaults",
    "matcher_focal_alpha_gamma",
]


def outputs_and_targets(inputs):
    outputs = {key: inputs[key] for key in ("pred_logits", "pred_boxes")}
    count = sum(key.startswith("labels") for key in inputs)
    targets = [{"labels": inputs[f"labels{i}"], "boxes": inputs[f"boxes{i}"]} for i in range(count)]
    return outputs, targets


@pytest.mark.parametrize("case", CASES)
def test_assignments_are_the_recorded_ones(layer_cases, case):
    matcher = HungarianMatcher(**layer_cases.facts[case]["constructor"])
    indices = matcher(*outputs_and_targets(layer_cases.arrays(case, "in")))
    expected = layer_cases.arrays(case, "out")
    for i, (queries, targets) in enumerate(indices):
        assert queries.tolist() == expected[f"query_idx{i}"].tolist()
        assert targets.tolist() == expected[f"target_idx{i}"].tolist()
        assert queries.dtype == targets.dtype == torch.int64


@pytest.mark.parametrize("case", ["matcher_focal_a", "matcher_ce_a", "matcher_focal_alpha_gamma"])
def test_the_costs_add_up_to_the_recorded_matrix(layer_cases, case):
    kwargs = dict(layer_cases.facts[case]["constructor"])
    outputs, targets = outputs_and_targets(layer_cases.arrays(case, "in"))
    if kwargs.get("cost_class_type") == "ce_cost":
        class_cost = CrossEntropyCost(kwargs["cost_class"])
    else:
        class_cost = FocalLossCost(
            kwargs.get("alpha", 0.25), kwargs.get("gamma", 2.0), kwargs["cost_class"]
        )
    l1, giou = L1Cost(kwargs["cost_bbox"]), GIoUCost(kwargs["cost_giou"])
    for i, target in enumerate(targets):
        logits, boxes = outputs["pred_logits"][i], outputs["pred_boxes"][i]
        corners = box_cxcywh_to_xyxy(boxes), box_cxcywh_to_xyxy(target["boxes"])
        total = class_cost(logits, target["labels"]) + l1(boxes, target["boxes"]) + giou(*corners)
        close(total, layer_cases.arrays(case, "out")[f"cost{i}"])


def test_single_costs_match_the_recorded_ones(layer_cases):
    inputs, expected = (layer_cases.arrays("match_costs", kind) for kind in ("in", "out"))
    kwargs = layer_cases.facts["match_costs"]["constructor"]
    boxes, targets = inputs["boxes"], inputs["gt_boxes"]
    corners = box_cxcywh_to_xyxy(boxes), box_cxcywh_to_xyxy(targets)
    classes = inputs["logits"], inputs["labels"]
    close(FocalLossCost(**kwargs["FocalLossCost"])(*classes), expected["focal"])
    close(CrossEntropyCost(**kwargs["CrossEntropyCost"])(*classes), expected["ce"])
    close(L1Cost(**kwargs["L1Cost"])(boxes, targets), expected["l1"])
    close(GIoUCost(**kwargs["GIoUCost"])(*corners), expected["giou"])


def test_the_assignment_has_the_least_cost_of_all():
    torch.manual_seed(0)
    logits, boxes = torch.randn(1, 5, 3), torch.rand(1, 5, 4)
    labels, target_boxes = torch.randint(3, (3,)), torch.rand(3, 4)
    target = [{"labels": labels, "boxes": target_boxes}]
    ((queries, matched),) = HungarianMatcher(2, 5, 2)(
        {"pred_logits": logits, "pred_boxes": boxes}, target
    )
    corners = box_cxcywh_to_xyxy(boxes[0]), box_cxcywh_to_xyxy(target_boxes)
    cost = FocalLossCost(weight=2)(logits[0], labels) + L1Cost(5)(boxes[0], target_boxes)
    cost += GIoUCost(2)(*corners)
    every = [
        sum(cost[q, t] for t, q in enumerate(qs)) for qs in itertools.permutations(range(5), 3)
    ]
    assert cost[queries, matched].sum().item() == pytest.approx(min(every).item(), rel=1e-5)


def test_both_matchers_agree_and_say_what_they_are(layer_cases):
    outputs, targets = outputs_and_targets(layer_cases.arrays("matcher_focal_a", "in"))
    weights = HungarianMatcher(2, 5, 2)
    labels, boxes = [t["labels"] for t in targets], [t["boxes"] for t in targets]
    modules = ModifedMatcher()(outputs["pred_logits"], outputs["pred_boxes"], labels, boxes)
    for a, b in zip(weights(outputs, targets), modules, strict=True):
        assert a[0].tolist() == b[0].tolist()
        assert a[1].tolist() == b[1].tolist()
    assert "cost_bbox: 5" in repr(weights)


@pytest.mark.parametrize(
    "kwargs",
    [{"cost_class_type": "hinge"}, dict.fromkeys(["cost_class", "cost_bbox", "cost_giou"], 0)],
)
def test_settings_without_meaning_are_refused(kwargs):
    with pytest.raises(AssertionError):
        HungarianMatcher(**kwargs)


@embedded_only
def test_half_precision_is_matched_in_float32(layer_cases):
    outputs, targets = outputs_and_targets(layer_cases.arrays("matcher_focal_a", "in"))
    half = {key: value.bfloat16() for key, value in outputs.items()}
    exact = {key: value.float() for key, value in half.items()}
    matcher = HungarianMatcher(2, 5, 2)
    with torch.autocast("cpu", torch.bfloat16):
        indices = matcher(half, targets)
    for a, b in zip(indices, matcher(exact, targets), strict=True):
        assert a[0].tolist() == b[0].tolist()
        assert a[1].tolist() == b[1].tolist()


@embedded_only
def test_a_diverged_model_is_still_matched():
    """So that its losses, which name themselves, are what stops the run."""
    outputs = {"pred_logits": torch.full((1, 4, 3), torch.nan), "pred_boxes": torch.rand(1, 4, 4)}
    outputs["pred_boxes"][0, 1] = torch.nan
    target = [{"labels": torch.tensor([1, 2]), "boxes": torch.rand(2, 4)}]
    ((queries, matched),) = HungarianMatcher()(outputs, target)
    assert len(queries) == len(set(queries.tolist())) == 2
    assert sorted(matched.tolist()) == [0, 1]
