"""Distillation as a run may set it: compiled, in mixed precision, between kinds of detectors."""

import copy

import every_detector
import pytest
import torch
from tiny_distiller import detector, distiller, train_step

from engine.errors import UserError
from projects.detr_distill.attention_maps import (
    CrossAttentionDistillation,
    SelfAttentionDistillation,
)
from projects.detr_distill.fitnet import FitNet
from projects.detr_distill.matching import Detections, SoftCost
from projects.detr_distill.queries import QueryAdapter
from projects.detr_distill.teacher import load_teacher


@pytest.mark.slow
def test_a_compiled_step_is_the_eager_one():
    steps = []
    for compiled in (False, True):
        student, teacher = (detector(seed, num_encoder_layers=1) for seed in range(2))
        model = distiller(student, teacher, [FitNet("memory")])
        if compiled:
            torch._dynamo.reset()
            model.compile(backend="eager")
        losses = train_step(model)
        steps.append((losses, {name: p.grad for name, p in model.named_parameters()}))
    torch.testing.assert_close(steps[1], steps[0])


def views(model, inputs):
    """The student's in training and the teacher's."""
    targets = model.student.prepare_targets(inputs)
    with torch.no_grad():
        student, _ = model._view(model.student, inputs, targets)
        return student, model._view(model.teacher, inputs)[0]


def attention_objectives(kind):
    """Those that detectors of this kind have."""
    if kind == "detr_cross_entropy":  # whose scores no matching can go by
        return [SelfAttentionDistillation("fixed"), CrossAttentionDistillation("fixed")]
    if kind == "adamixer":  # whose samples have no weights
        return [SelfAttentionDistillation()]
    return [SelfAttentionDistillation(), CrossAttentionDistillation()]


@pytest.mark.parametrize("kind", every_detector.BUILDERS)
def test_a_copy_of_the_teacher_sees_padding_as_it_does(kind):
    teacher = every_detector.build(kind)
    model = distiller(copy.deepcopy(teacher), teacher, attention_objectives(kind))
    inputs = every_detector.batch()
    student, taught = views(model, inputs)
    assert student.features.padding_masks is not None
    torch.testing.assert_close(student.logits, taught.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(student.boxes, taught.boxes, rtol=0, atol=1e-5)
    for name, value in model(inputs).items():
        if "attention" in name:
            assert value.item() == pytest.approx(0, abs=1e-6), name


OPTIONS = {
    "conditional": "transformer.decoder.mask_padding_in_training",
    "dab": "transformer.decoder.mask_padding_in_training",
    "dn_deformable": "transformer.decoder.embed_unpadded_in_training",
    "adamixer": "mask_padding_in_training",
}


def set_option(model, name, value):
    module, _, option = name.rpartition(".")
    assert hasattr(model.get_submodule(module), option)
    setattr(model.get_submodule(module), option, value)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("kind", OPTIONS)
def test_how_padding_is_seen_is_for_the_student_to_say(kind, own):
    teacher = every_detector.build(kind)
    set_option(teacher, OPTIONS[kind], not own)
    student = copy.deepcopy(teacher)
    set_option(student, OPTIONS[kind], own)
    learner, taught = views(distiller(student, teacher, [FitNet()]), every_detector.batch())
    torch.testing.assert_close(learner.logits, taught.logits, rtol=0, atol=1e-5)


def test_a_teacher_of_another_kind_keeps_off_padding():
    teacher = every_detector.build("conditional")
    model = distiller(every_detector.build("detr"), teacher, [CrossAttentionDistillation()])
    _, taught = views(model, every_detector.batch())
    padding = taught.memory.padding_mask
    for made in taught.attention.cross_attention:
        for row in range(2):
            assert (made(slice(row, row + 1))[..., padding[row]] == 0).all()


def test_a_teacher_that_masks_nothing_in_evaluation_does_as_in_training():
    teacher = every_detector.build("detr")
    student = copy.deepcopy(teacher)
    teacher.mask_padding_at_inference = False
    learner, taught = views(distiller(student, teacher, [FitNet()]), every_detector.batch())
    torch.testing.assert_close(learner.logits, taught.logits, rtol=0, atol=1e-5)


SHARED = (
    {"detr", "conditional", "smca", "multi_scale_smca", "deformable", "refining"},
    {"dab", "dn", "dn_deformable"},
    {"adamixer"},
)


@pytest.mark.parametrize("kind", sorted(set.union(*SHARED)))
def test_queries_are_shared_between_detectors_that_place_them_alike(kind):
    student = every_detector.build(kind)
    alike = next(kinds for kinds in SHARED if kind in kinds)
    for other in sorted(set.union(*SHARED)):
        teacher = every_detector.build(other)
        if other in alike:
            learned = QueryAdapter(student, teacher)(teacher.learned_queries())
            assert learned.content.shape[-1] == student.learned_queries().content.shape[-1]
            continue
        with pytest.raises(UserError, match=r"positions of .* cannot stand for each other"):
            QueryAdapter(student, teacher)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_costs_are_precise_in_mixed_precision(dtype):
    torch.manual_seed(0)
    sides = [Detections(torch.randn(2, 1, 30, 80) - 4, torch.rand(2, 1, 30, 4)) for _ in range(2)]
    exact = SoftCost()(*sides)
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(SoftCost()(*sides), exact)


@pytest.mark.parametrize("kind", ["conditional", "dab", "two_stage", "smca", "adamixer"])
def test_a_smaller_teacher_decodes_in_float32(tmp_path, kind):
    torch.save({"model": every_detector.build(kind).state_dict()}, tmp_path / "teacher.pth")
    teacher = load_teacher(every_detector.build(kind), str(tmp_path / "teacher.pth"), "bfloat16")
    made = {}
    for name, module in teacher.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(
                lambda *call, name=name: made.update({name: call[2].dtype})
            )
    model = distiller(every_detector.build(kind), teacher, [FitNet()])
    _, taught = views(model, every_detector.batch())
    assert taught.memory.tokens.dtype == taught.states.dtype == torch.float32
    assert {level.dtype for level in taught.features.levels} == {torch.float32}
    early = {name for name in made if name.startswith("transformer.encoder.")}
    assert {made[name] for name in early} <= {torch.bfloat16}
    assert {made[name] for name in made.keys() - early} == {torch.float32}
