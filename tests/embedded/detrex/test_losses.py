import pytest
import torch
import torch.nn.functional as F
from detrex.modeling import (
    CrossEntropyLoss,
    DiceLoss,
    FocalLoss,
    GIoULoss,
    L1Loss,
    cross_entropy,
    dice_loss,
    giou_loss,
    l1_loss,
    reduce_loss,
    sigmoid_focal_loss,
    smooth_l1_loss,
    weight_reduce_loss,
)
from recorded_cases import close


def test_focal_losses_are_the_recorded_ones(layer_cases):
    inputs, expected = (layer_cases.arrays("focal_losses", kind) for kind in ("in", "out"))
    logits, one_hot, labels = inputs["logits"], inputs["one_hot"], inputs["labels"]
    actual = {
        "none": sigmoid_focal_loss(logits, one_hot, reduction="none"),
        "mean": sigmoid_focal_loss(logits, one_hot),
        "sum": sigmoid_focal_loss(logits, one_hot, reduction="sum"),
        "avg_factor_3": sigmoid_focal_loss(logits, one_hot, avg_factor=3),
        "alpha_off": sigmoid_focal_loss(logits, one_hot, alpha=-1),
        "gamma_1": sigmoid_focal_loss(logits, one_hot, alpha=0.5, gamma=1),
        "module_avg_4": FocalLoss(loss_weight=2.0)(logits, labels, avg_factor=4),
        "module_activated": FocalLoss(activated=True)(logits.sigmoid(), labels),
    }
    for name, loss in actual.items():
        close(loss, expected[name])
    with pytest.raises(ValueError, match="avg_factor"):
        sigmoid_focal_loss(logits, one_hot, reduction="sum", avg_factor=3)


def test_other_losses_are_the_recorded_ones(layer_cases):
    inputs, expected = (layer_cases.arrays("other_losses", kind) for kind in ("in", "out"))
    logits, labels, weight = inputs["logits"], inputs["labels"], inputs["weight"]
    boxes, targets = inputs["pred_boxes"], inputs["target_boxes"]
    masks, mask_targets = inputs["mask_logits"], inputs["mask_targets"]
    none = boxes[:0]
    actual = {
        "ce_mean": CrossEntropyLoss()(logits, labels),
        "ce_weighted_avg5": CrossEntropyLoss(loss_weight=2.0)(
            logits, labels, weight, avg_factor=5, class_weight=inputs["class_weight"]
        ),
        "l1_mean": L1Loss()(boxes, targets),
        "l1_avg3": L1Loss(loss_weight=5.0)(boxes, targets, avg_factor=3),
        "giou_mean": GIoULoss()(boxes, targets),
        "giou_weight": GIoULoss(loss_weight=2.0)(boxes, targets, weight, avg_factor=4),
        "giou_none": giou_loss(boxes, targets, reduction="none"),
        "dice": DiceLoss()(masks, mask_targets),
        "dice_fn": dice_loss(masks.sigmoid(), mask_targets, reduction="none"),
        "l1_empty": l1_loss(none, none),
        "giou_empty": giou_loss(none, none),
    }
    for name, loss in actual.items():
        close(loss, expected[name])


def test_cross_entropy_weights_and_ignored_labels():
    logits, labels = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 1, 0])
    weight, class_weight = torch.rand(6), torch.rand(4)
    per_entry = -logits.log_softmax(1)[torch.arange(6), labels] * class_weight[labels]
    loss = cross_entropy(logits, labels, weight, class_weight, avg_factor=5)
    close(loss, (per_entry * weight).sum() / 5)
    ignoring = cross_entropy(logits, labels, ignore_index=1, avg_non_ignore=True)
    close(ignoring, F.cross_entropy(logits, labels, ignore_index=1))


def test_dice_loss_of_perfect_and_empty_predictions():
    masks = (torch.rand(3, 4, 4) > 0.5).float()
    close(dice_loss(masks, masks, reduction="none"), torch.zeros(3), atol=1e-6)
    assert dice_loss(1 - masks, masks).item() > 0.5


@pytest.mark.parametrize("beta", [0.1, 1.0, 2.5])
def test_smooth_l1_is_torchs(beta):
    a, b = torch.randn(2, 5, 4) * 3
    close(smooth_l1_loss(a, b, beta=beta), F.smooth_l1_loss(a, b, beta=beta))


def test_reductions():
    loss = torch.tensor([1.0, 2.0, 3.0])
    assert reduce_loss(loss, "none") is loss
    assert (reduce_loss(loss, "mean").item(), reduce_loss(loss, "sum").item()) == (2, 6)
    weight = torch.tensor([1.0, 0.0, 2.0])
    assert weight_reduce_loss(loss, weight, "sum").item() == 7
    assert weight_reduce_loss(loss, weight, avg_factor=2).item() == pytest.approx(3.5)
    assert weight_reduce_loss(loss, weight, "none", avg_factor=2).tolist() == [1, 0, 6]
    with pytest.raises(ValueError, match="median"):
        reduce_loss(loss, "median")
