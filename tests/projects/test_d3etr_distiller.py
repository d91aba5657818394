"""D3ETR's objectives in whole training steps, alone and beside DETRDistill's."""

import pytest
import tiny_adamixer
import torch
from tiny_deformable import SETTINGS as DEFORMABLE
from tiny_deformable import PyramidBackbone, build_deformable
from tiny_detectors import SETTINGS, StridedBackbone, build_single_scale, cross_entropy_criterion
from tiny_distiller import batch, detector, distiller, objectives, train_step
from tiny_smca import build_single_scale_smca

import ops
from detectors import attention as attention_module
from detectors.detr import DETR, DETRDecoder
from detectors.structures import AttentionMaps
from engine.errors import UserError
from projects.detr_distill.attention_maps import (
    CrossAttentionDistillation,
    SelfAttentionDistillation,
)
from projects.detr_distill.distiller import Distiller
from projects.detr_distill.fitnet import FitNet
from projects.detr_distill.prediction import PredictionDistillation
from projects.detr_distill.query_prior import QueryPriorAssignment
from projects.detr_distill.target_aware import TargetAwareDistillation
from projects.detr_distill.teacher import load_teacher
from projects.ks_detr.encoder import share_knowledge

KINDS = (SelfAttentionDistillation, CrossAttentionDistillation, PredictionDistillation)
NAMES = ("self_attention", "cross_attention", "prediction_class", "prediction_bbox")


def both_groups(kinds=KINDS):
    return [kind(group) for group in ("adaptive", "fixed") for kind in kinds]


def d3etr():
    return [*both_groups(), QueryPriorAssignment("last")]


def deformable(seed=0, **changes):
    torch.manual_seed(seed)
    model = build_deformable(DEFORMABLE | changes, {})
    model.backbone = PyramidBackbone()
    return model


def smca(seed):
    torch.manual_seed(seed)
    return build_single_scale_smca()


def adamixer(seed):
    torch.manual_seed(seed)
    return tiny_adamixer.build_adamixer()


def test_it_goes_together_with_detrdistill():
    losses = train_step(distiller(parts=[*objectives()[:2], *d3etr()]))
    for name in NAMES:
        assert losses[f"loss_{name}"] > 0
        assert losses[f"loss_{name}_group"] > 0
    for name in ("loss_logits_positive_class", "loss_target_aware", "loss_group_class"):
        assert losses[name] > 0


def test_a_copy_of_the_teacher_has_nothing_to_learn():
    model = distiller(detector(1), parts=both_groups())
    losses = model(batch())
    for name in ("self_attention", "cross_attention", "prediction_bbox", "prediction_giou"):
        for suffix in ("", "_group"):
            assert losses[f"loss_{name}{suffix}"].item() == pytest.approx(0, abs=1e-5), name


@pytest.mark.parametrize(
    "changes",
    [
        {"num_decoder_layers": 3},
        {"num_decoder_layers": 1},
        {"num_queries": 9},
        {"num_queries": 2},
        {"num_queries": 1},
        {"embed_dim": 64, "num_heads": 8},
    ],
)
@pytest.mark.parametrize("who", ["student", "teacher"])
def test_other_shapes_than_the_others(changes, who):
    losses = train_step(distiller(**{who: detector(3, **changes)}, parts=d3etr()))
    assert all(losses[f"loss_{name}_group"] > 0 for name in NAMES if name != "self_attention")


@pytest.mark.parametrize("kind", [deformable, smca])
def test_other_detectors(kind):
    losses = train_step(distiller(kind(0), kind(1), d3etr()))
    assert all(losses[f"loss_{name}"].isfinite() for name in NAMES)
    assert losses["loss_prediction_class_group"] > 0


def two_stage(seed):
    torch.manual_seed(seed)
    model = build_deformable(DEFORMABLE, {}, refine=True, two_stage=True)
    model.backbone = PyramidBackbone()
    return model


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", [deformable, two_stage])
def test_a_deformable_teacher_of_another_precision(tmp_path, kind, dtype):
    """Where it looks and what it proposes needs float32."""
    torch.save({"model": kind(1).state_dict()}, tmp_path / "teacher.pth")
    teacher = load_teacher(kind(5), str(tmp_path / "teacher.pth"), dtype)
    found, exact = (distiller(kind(0), model, [FitNet("memory")]) for model in (teacher, kind(1)))
    loss = found(batch())["loss_fitnet"]
    assert loss.item() == pytest.approx(exact(batch())["loss_fitnet"].item(), rel=0.05)


def test_an_adamixer_sees_a_padded_batch_as_its_copy_does():
    model = distiller(adamixer(0), adamixer(0), [FitNet()])
    views = [model._view(side, tiny_adamixer.batch())[0] for side in (model.student, model.teacher)]
    assert views[0].features.padding_masks is not None
    for level, copied in zip(*(view.features.levels for view in views), strict=True):
        torch.testing.assert_close(level, copied)


def test_detectors_of_two_kinds():
    """Maps over the same cells can be compared, whatever made them."""
    student = smca(0)
    teacher = detector(1)
    teacher.backbone = torch.nn.Sequential(torch.nn.AvgPool2d(2, ceil_mode=True), StridedBackbone())
    losses = train_step(distiller(student, teacher, both_groups()[:3]))
    assert losses["loss_cross_attention"] > 0


def test_a_student_whose_encoder_has_branches():
    student, teacher = detector(0), detector(1)
    share_knowledge(student.transformer.encoder)
    student.load_state_dict(detector(0).state_dict(), strict=False)  # sharing has layers anew
    losses = train_step(distiller(student, teacher, d3etr()))
    alone = distiller(detector(0), detector(1), d3etr())(batch())
    for name in NAMES:  # its own branch learns, as without the others
        torch.testing.assert_close(losses[f"loss_{name}"], alone[f"loss_{name}"])


def test_late_maps_change_nothing(monkeypatch):
    """Loss by loss and gradient by gradient: making the weights again, or keeping them."""
    steps = []
    for late in (True, False):
        if not late:
            monkeypatch.setattr(Distiller, "new_maps", AttentionMaps)
        model = distiller(parts=d3etr())
        losses = train_step(model)
        steps.append((losses, {n: p.grad for n, p in model.named_parameters()}))
    for name, value in steps[0][0].items():
        torch.testing.assert_close(value, steps[1][0][name])
    for name, value in steps[0][1].items():
        torch.testing.assert_close(value, steps[1][1][name], rtol=1e-4, atol=1e-5)


def with_dropout(model):
    for layer in model.student.transformer.decoder.layers:
        for attention in layer.attentions:
            attention.dropout = 0.2
    return model


def test_checkpointed_decoder_layers_change_nothing():
    """Both groups of queries, their maps and what dropout leaves of them included."""
    steps = []
    for checkpoint_layers in (False, True):
        model = with_dropout(distiller(parts=[*objectives(), *both_groups()])).double()
        model.student.transformer.decoder.checkpoint_layers = checkpoint_layers
        calls = []
        for layer in model.student.transformer.decoder.layers:
            layer.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        torch.manual_seed(7)
        losses = train_step(model)
        layers = SETTINGS["num_decoder_layers"]
        assert len(calls) == layers * (4 if checkpoint_layers else 2)  # two groups
        steps.append((losses, {n: p.grad for n, p in model.named_parameters()}))
    torch.testing.assert_close(steps[1], steps[0], rtol=1e-12, atol=1e-12)


def test_weights_are_made_for_the_chosen_layers_alone(monkeypatch):
    made = []

    def counting(*arguments):
        made.append(arguments)
        return weights(*arguments)

    weights = attention_module.attention_weights
    monkeypatch.setattr(attention_module, "attention_weights", counting)
    model = distiller(parts=[CrossAttentionDistillation(layers=[1])])
    made.clear()
    loss = model(batch())["loss_cross_attention"]
    assert len(made) == 2  # the student's and the teacher's
    loss.backward()
    assert len(made) == 4


def test_one_matching_for_all_layers_images_and_objectives(monkeypatch):
    calls = []

    def counting(costs, sizes):
        calls.append(tuple(costs.shape))
        return assign(costs, sizes)

    assign = ops.linear_sum_assignment
    model = distiller(parts=both_groups())
    monkeypatch.setattr(ops, "linear_sum_assignment", counting)
    model(batch())
    queries, layers = SETTINGS["num_queries"], SETTINGS["num_decoder_layers"]
    with_teacher = [shape for shape in calls if shape == (layers, queries, 2 * queries)]
    assert len(with_teacher) == 1
    assert len(calls) == 2  # the other one is with the ground truth


@pytest.mark.parametrize("boxes", [[[], [[0, 0, 9, 9]]], [[], []]])
def test_images_without_objects(boxes):
    train_step(distiller(parts=d3etr()), batch(boxes))


def test_mixed_precision():
    exact = distiller(parts=d3etr())(batch())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = train_step(distiller(parts=d3etr()))
    for name in NAMES:
        assert losses[f"loss_{name}"].dtype == torch.float32
        assert losses[f"loss_{name}"].item() == pytest.approx(
            exact[f"loss_{name}"].item(), rel=0.1, abs=0.02
        )


def softmax_detector():
    settings = SETTINGS | {"num_classes": 5}
    model = build_single_scale(DETR, DETRDecoder, cross_entropy_criterion(settings), settings, {})
    model.backbone = StridedBackbone()
    return model


def test_softmax_classes_have_the_fixed_group_alone():
    """Attention of queries that are the same on both sides needs no scores."""
    parts = both_groups(KINDS[:2])[2:]
    train_step(distiller(softmax_detector(), softmax_detector(), parts))
    by_scores = TargetAwareDistillation(place="memory")
    for part in (SelfAttentionDistillation(), PredictionDistillation("fixed"), by_scores):
        with pytest.raises(UserError, match=r"the student predicts .* softmax \(ce_loss\)"):
            distiller(softmax_detector(), softmax_detector(), [part])
    with pytest.raises(UserError, match=r"student scores classes by ce_loss, .* by focal_loss"):
        distiller(softmax_detector(), detector(1), [QueryPriorAssignment()])
    train_step(distiller(softmax_detector(), softmax_detector(), [QueryPriorAssignment()]))


def test_what_cannot_be_compared_is_said_at_once():
    losses = distiller(adamixer(0), adamixer(1), [SelfAttentionDistillation()])(batch())
    assert losses["loss_self_attention"] > 0
    with pytest.raises(UserError, match=r"student is of type AdaMixer, whose .* add up to 1"):
        distiller(adamixer(0), adamixer(1), [CrossAttentionDistillation()])
    with pytest.raises(UserError, match=r"the student attends to maps .* the teacher to samples"):
        distiller(teacher=deformable(1), parts=[CrossAttentionDistillation()])
    coarse = detector(1)
    coarse.backbone = torch.nn.Sequential(torch.nn.AvgPool2d(2), StridedBackbone())
    with pytest.raises(UserError, match=r"maps of \(\(8, 8\),\) cells, the teacher .*\(\(4, 4\),"):
        distiller(teacher=coarse, parts=[CrossAttentionDistillation()])
    with pytest.raises(UserError, match=r"has layers \[2\], the student's decoder has 0 to 1"):
        distiller(parts=[SelfAttentionDistillation(layers=[2])])
    with pytest.raises(UserError, match=r"has layers \[\], expected some or None for all"):
        distiller(parts=[SelfAttentionDistillation(layers=[])])


def test_another_padding_is_noticed_in_its_step():
    """One that the first image, which needs none, does not show."""
    padded = detector(1)
    padded.size_divisibility = 128
    model = distiller(teacher=padded, parts=[CrossAttentionDistillation()])
    with pytest.raises(UserError, match="the student attends to maps of"):
        model(batch())
