import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detrex.modeling import BaseCriterion, HungarianMatcher, SetCriterion
from detrex.modeling.criterion.criterion import sigmoid_focal_loss
from recorded_cases import close, embedded_only

FOCAL = {"loss_class_type": "focal_loss", "alpha": 0.25, "gamma": 2.0}
CROSS_ENTROPY = {"loss_class_type": "ce_loss", "eos_coef": 0.1}
CASES = [
    ("criterion_focal_0", FOCAL),
    ("criterion_focal_1", FOCAL),
    ("criterion_focal_no_boxes", FOCAL),
    ("criterion_ce_0", CROSS_ENTROPY),
    ("criterion_ce_1", CROSS_ENTROPY),
]


def build(settings, matcher_weight=2):
    cost = "ce_cost" if settings["loss_class_type"] == "ce_loss" else "focal_loss_cost"
    weight = 1 if cost == "ce_cost" else matcher_weight
    matcher = HungarianMatcher(weight, 5, 2, cost)
    return SetCriterion(6, matcher, weight_dict={"loss_class": 1}, **settings)


def outputs_and_targets(inputs):
    outputs = {"pred_logits": inputs["pred_logits"], "pred_boxes": inputs["pred_boxes"]}
    aux = {"pred_logits": inputs["aux0_logits"], "pred_boxes": inputs["aux0_boxes"]}
    targets = [{"labels": inputs[f"labels{i}"], "boxes": inputs[f"boxes{i}"]} for i in range(2)]
    return {**outputs, "aux_outputs": [aux]}, targets


@pytest.mark.parametrize(("case", "settings"), CASES)
def test_losses_and_gradients_are_the_recorded_ones(layer_cases, case, settings):
    inputs, gradients = layer_cases.arrays(case, "in"), layer_cases.arrays(case, "grad")
    assert gradients
    for name in gradients:
        inputs[name].requires_grad_()
    losses = build(settings)(*outputs_and_targets(inputs))
    expected = layer_cases.facts[case]["losses_unweighted"]
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(expected, rel=1e-4)
    sum(losses.values()).backward()
    for name, gradient in gradients.items():
        close(inputs[name].grad, gradient)


def test_base_criterion_has_the_recorded_losses(layer_cases):
    inputs = layer_cases.arrays("base_criterion", "in")
    losses = BaseCriterion(num_classes=6)(*outputs_and_targets(inputs))
    expected = layer_cases.facts["base_criterion"]["losses"]
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(expected, rel=1e-4)


def test_focal_loss_of_the_criterion_is_the_recorded_one(layer_cases):
    inputs = layer_cases.arrays("focal_losses", "in")
    loss = sigmoid_focal_loss(inputs["logits"][None], inputs["one_hot"][None].float(), num_boxes=3)
    close(loss, layer_cases.arrays("focal_losses", "out")["criterion_version_num_boxes_3"])


def test_state_and_selected_losses(layer_cases):
    assert not build(FOCAL).state_dict()
    weight = build(CROSS_ENTROPY).empty_weight
    assert weight.tolist() == pytest.approx([1] * 6 + [0.1])
    outputs, targets = outputs_and_targets(layer_cases.arrays("criterion_focal_0", "in"))
    criterion = build(FOCAL)
    criterion.losses = ["boxes"]
    losses, indices = criterion(outputs, targets, return_indices=True)
    assert set(losses) == {"loss_bbox", "loss_giou", "loss_bbox_0", "loss_giou_0"}
    last = criterion.matcher(outputs, targets)
    assert len(indices) == 2
    assert [[i.tolist() for i in pair] for pair in indices[-1]] == [
        [i.tolist() for i in pair] for pair in last
    ]
    assert "num_classes: 6" in repr(criterion)
    with pytest.raises(AssertionError):
        criterion.get_loss("masks", outputs, targets, last, 1)
    with pytest.raises(AssertionError):
        SetCriterion(6, criterion.matcher, {}, loss_class_type="hinge")


@embedded_only
@pytest.mark.parametrize("settings", [FOCAL, CROSS_ENTROPY])
def test_half_precision_predictions(layer_cases, settings):
    case = "criterion_ce_0" if settings is CROSS_ENTROPY else "criterion_focal_0"
    outputs, targets = outputs_and_targets(layer_cases.arrays(case, "in"))
    del outputs["aux_outputs"]
    half = {key: value.bfloat16().requires_grad_() for key, value in outputs.items()}
    exact = {key: value.float() for key, value in half.items()}
    criterion = build(settings)
    with torch.autocast("cpu", torch.bfloat16):
        losses = criterion(half, targets)
    assert all(loss.dtype == torch.float32 for loss in losses.values())
    for name, loss in criterion(exact, targets).items():
        close(losses[name], loss)
    sum(losses.values()).backward()
    assert all(value.grad.isfinite().all() for value in half.values())


@embedded_only
def test_a_diverged_model_has_losses_that_are_not_finite(layer_cases):
    outputs, targets = outputs_and_targets(layer_cases.arrays("criterion_focal_0", "in"))
    outputs = {key: torch.full_like(outputs[key], torch.nan) for key in list(outputs)[:2]}
    losses = build(FOCAL)(outputs, targets)
    assert all(loss.isnan() for loss in losses.values())


def losses_of_two_processes(rank, store, inputs, results):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    outputs, targets = outputs_and_targets(inputs)
    own = {key: outputs[key][rank : rank + 1] for key in ("pred_logits", "pred_boxes")}
    losses = build(FOCAL)(own, targets[rank : rank + 1])
    results[rank] = {name: loss.item() for name, loss in losses.items()}
    dist.destroy_process_group()


def test_boxes_are_averaged_over_processes(layer_cases, tmp_path):
    """The mean over two processes is the loss of one with both images."""
    inputs = layer_cases.arrays("criterion_focal_0", "in")
    with mp.Manager() as manager:
        results = manager.dict()
        arguments = (str(tmp_path / "store"), inputs, results)
        mp.start_processes(losses_of_two_processes, arguments, nprocs=2, start_method="fork")
        first, second = results[0], results[1]
    outputs, targets = outputs_and_targets(inputs)
    del outputs["aux_outputs"]
    expected = {k: v.item() for k, v in build(FOCAL)(outputs, targets).items()}
    assert {k: (first[k] + second[k]) / 2 for k in first} == pytest.approx(expected, rel=1e-5)
