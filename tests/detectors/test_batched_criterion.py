"""The batched criterion against detrex's, layer by layer."""

import pytest
import torch
from detrex.modeling import HungarianMatcher
from detrex.modeling import SetCriterion as LayerCriterion
from tiny_detectors import SETTINGS, build_single_scale

import ops
from detectors import criterion as module
from detectors.conditional_detr import ConditionalDecoder, ConditionalDETR
from detectors.criterion import SetCriterion, average_num_boxes

KINDS = {"focal_loss": "focal_loss_cost", "ce_loss": "ce_cost"}


def build(cls, kind="focal_loss", **options):
    matcher = HungarianMatcher(2.0, 5.0, 2.0, KINDS[kind], alpha=0.3, gamma=1.5)
    weights = {"loss_class": 1.0, "loss_bbox": 5.0, "loss_giou": 2.0}
    return cls(4, matcher, weights, loss_class_type=kind, alpha=0.3, gamma=1.5, **options)


def example(counts, kind="focal_loss", groups=3, queries=6, seed=0):
    """Predictions of all groups and the targets."""
    generator = torch.Generator().manual_seed(seed)
    classes = 4 + (kind == "ce_loss")
    logits = torch.randn(groups, len(counts), queries, classes, generator=generator)
    boxes = torch.rand(groups, len(counts), queries, 4, generator=generator) * 0.5 + 0.2
    targets = [
        {
            "labels": torch.randint(4, (count,), generator=generator),
            "boxes": torch.rand(count, 4, generator=generator) * 0.4 + 0.2,
        }
        for count in counts
    ]
    return logits, boxes, targets


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("counts", [[3, 0, 1], [0, 0], [9, 2]])
def test_losses_matches_and_gradients_are_those_of_single_layers(kind, counts):
    logits, boxes, targets = example(counts, kind)
    leaves = logits.requires_grad_(), boxes.requires_grad_()
    ours, theirs = build(SetCriterion, kind), build(LayerCriterion, kind)
    matches = ours.match(logits, boxes, targets)
    num_boxes = average_num_boxes(targets, logits.device)
    losses = ours.group_losses(logits, boxes, targets, matches, num_boxes)
    total = 0.0
    starts = [sum(counts[:image]) for image in range(len(counts))]
    for group in range(len(logits)):
        outputs = {"pred_logits": logits[group], "pred_boxes": boxes[group]}
        expected, indices = theirs(outputs, targets, return_indices=True)
        for name, value in expected.items():
            torch.testing.assert_close(losses[name][group], value)
            total = total + value
        pairs = [
            (image, int(query), int(target) + starts[image])
            for image, (queries, columns) in enumerate(indices[-1])
            for query, target in zip(queries, columns, strict=True)
        ]
        found = zip(matches.images, matches.queries[group], matches.targets[group], strict=True)
        assert [tuple(map(int, pair)) for pair in found] == pairs
    wanted = torch.autograd.grad(total, leaves, retain_graph=True)
    found = torch.autograd.grad(sum(value.sum() for value in losses.values()), leaves)
    torch.testing.assert_close(found, wanted)


def test_all_groups_and_images_are_matched_in_one_call(monkeypatch):
    calls = []

    def counted(costs, sizes):
        calls.append(costs.shape)
        return ops.linear_sum_assignment(costs, sizes)

    counted_ops = type("Ops", (), {"linear_sum_assignment": staticmethod(counted)})
    monkeypatch.setattr(module, "ops", counted_ops)
    logits, boxes, targets = example([3, 0, 1])
    build(SetCriterion).match(logits, boxes, targets)
    assert calls == [(3, 6, 4)]


def test_a_diverged_model_shows_in_its_losses():
    logits, boxes, targets = example([2, 1])
    logits[1, 0, 3] = torch.nan
    boxes[2, 1] = torch.inf
    criterion = build(SetCriterion)
    matches = criterion.match(logits, boxes, targets)
    losses = criterion.group_losses(logits, boxes, targets, matches, 3.0)
    assert losses["loss_class"].isfinite().tolist() == [True, False, True]
    assert losses["loss_bbox"].isfinite().tolist() == [True, True, False]


def test_losses_that_are_not_wanted_are_not_there():
    logits, boxes, targets = example([2, 1])
    criterion = build(SetCriterion, losses=["boxes"])
    matches = criterion.match(logits, boxes, targets)
    assert set(criterion.group_losses(logits, boxes, targets, matches, 3.0)) == {
        "loss_bbox",
        "loss_giou",
    }


def test_a_detector_refuses_detrexs_criterion():
    criterion = build(LayerCriterion)
    with pytest.raises(TypeError, match=r"criterion is detrex\..*SetCriterion, expected a detec"):
        build_single_scale(ConditionalDETR, ConditionalDecoder, criterion, SETTINGS, {})


@pytest.mark.parametrize("kind", list(KINDS))
def test_no_query_has_no_loss(kind):
    """As in denoising without targets."""
    logits, boxes, targets = example([0], kind, queries=0)
    criterion = build(SetCriterion, kind)
    losses = criterion.group_losses(
        logits, boxes, targets, criterion.match(logits, boxes, targets), 1.0
    )
    assert all((value == 0).all() for value in losses.values())
