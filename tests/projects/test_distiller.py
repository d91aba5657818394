"""The model that trains a student under a teacher: what belongs to whom, and odd inputs."""

import copy

import pytest
import torch
from tiny_detectors import SETTINGS, StridedBackbone
from tiny_distiller import BOXES, batch, detector, distiller, objectives, train_step
from torch import nn

from detectors.structures import STUDENT, Predictions, groups_of
from engine.errors import UserError
from projects.detr_distill.target_aware import TargetAwareDistillation
from projects.detr_distill.teacher import load_teacher
from projects.ks_detr.encoder import share_knowledge


def test_the_teacher_is_outside_and_asleep():
    model = distiller()
    before = copy.deepcopy(model.teacher.state_dict())
    train_step(model)
    assert model.training
    assert model.student.training
    assert not any(module.training for module in model.teacher.modules())
    assert not any(parameter.requires_grad for parameter in model.teacher.parameters())
    assert all(torch.equal(before[key], value) for key, value in model.teacher.state_dict().items())
    own = set(model.parameters())
    assert not own & set(model.teacher.parameters())
    assert model.state_dict().keys() == {
        f"student.{key}" for key in detector().state_dict()
    }  # these objectives learn nothing, as both have the same width


def test_a_students_losses_are_its_own():
    alone, taught = detector(0).train(), distiller(detector(0))
    expected, losses = alone(batch()), taught(batch())
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value)
    assert losses.keys() > expected.keys()


def test_in_evaluation_it_is_the_student():
    model = distiller().eval()
    alone = detector(0).eval()
    for found, expected in zip(model(batch()), alone(batch()), strict=True):
        found, expected = found["instances"], expected["instances"]
        assert torch.equal(found.scores, expected.scores)
        assert torch.equal(found.pred_boxes.tensor, expected.pred_boxes.tensor)


def test_a_copy_of_the_teacher_has_nothing_to_learn_of_boxes():
    model = distiller(detector(1))
    losses = model(batch())
    for kind in ("positive_bbox", "positive_giou", "negative_bbox", "negative_giou"):
        assert losses[f"loss_logits_{kind}"].item() == pytest.approx(0, abs=1e-5)
    assert losses["loss_target_aware"].item() == pytest.approx(0, abs=1e-8)
    # the teacher's queries in the same decoder say what the teacher says
    own = sum(value for name, value in losses.items() if name.startswith("loss_class"))
    assert losses["loss_group_class"].item() == pytest.approx(own.item(), rel=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_decoder_layers": 3},
        {"num_decoder_layers": 1},
        {"num_encoder_layers": 1},
        {"num_queries": 9},
        {"num_queries": 2},
        {"num_queries": 1},
        {"embed_dim": 64},
    ],
)
@pytest.mark.parametrize("who", ["student", "teacher"])
def test_other_shapes_than_the_others(changes, who):
    given = {who: detector(3, **changes)}
    train_step(distiller(**given))


@pytest.mark.parametrize("boxes", [[[], BOXES[0]], [[], []]])
def test_images_without_objects(boxes):
    losses = train_step(distiller(), batch(boxes))
    if not any(boxes):
        assert losses["loss_logits_positive_class"] == 0
        assert losses["loss_group_bbox"] == 0
        assert losses["loss_logits_negative_bbox"] > 0  # all are negatives then


def test_teacher_that_sees_nothing():
    teacher = detector(1)
    nn.init.constant_(teacher.class_embed.bias, -100.0)
    train_step(distiller(teacher=teacher, parts=[*objectives(), TargetAwareDistillationEq8()]))


def TargetAwareDistillationEq8():
    objective = TargetAwareDistillation("eq8", place="memory")
    objective.name = "eq8"
    return objective


def test_mixed_precision():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        train_step(distiller())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_teacher_of_another_precision(tmp_path, dtype):
    torch.save({"model": detector(1).state_dict()}, tmp_path / "teacher.pth")
    teacher = load_teacher(detector(5), str(tmp_path / "teacher.pth"), dtype)
    assert teacher.transformer.encoder.layers[0].ffns[0].layers[0][0].weight.dtype == getattr(
        torch, dtype
    )
    losses = train_step(distiller(teacher=teacher))
    exact = distiller()(batch())
    for name in ("loss_logits_negative_bbox", "loss_target_aware"):
        assert losses[name].item() == pytest.approx(exact[name].item(), rel=0.1)


def test_missing_and_broken_teachers(tmp_path):
    with pytest.raises(UserError, match=r"set teacher\.init_checkpoint=FILE"):
        load_teacher(detector(), "")
    with pytest.raises(UserError, match=r"teacher\.init_checkpoint: .*nowhere\.pth not found"):
        load_teacher(detector(), "nowhere.pth")
    path = tmp_path / "teacher.pth"
    torch.save({"model": detector(1).state_dict()}, path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(UserError, match=r"teacher\.init_checkpoint: cannot read checkpoint"):
        load_teacher(detector(), str(path))
    torch.save({"model": detector(1, num_classes=7).state_dict()}, path)
    with pytest.raises(UserError, match="of another architecture"):
        load_teacher(detector(), str(path))
    with pytest.raises(UserError, match=r"teacher\.dtype is 'int8', expected one of float32"):
        load_teacher(detector(), str(path), "int8")


def test_what_cannot_be_compared_is_said_at_once():
    with pytest.raises(UserError, match="student has num_classes 5, the teacher 7"):
        distiller(teacher=detector(1, num_classes=7))
    twice = distiller(parts=[TargetAwareDistillation(), TargetAwareDistillation(place="memory")])
    with pytest.raises(UserError, match="two objectives return loss_target_aware"):
        twice(batch())
    coarse = detector(1)
    coarse.backbone = nn.Sequential(nn.AvgPool2d(2), StridedBackbone())
    with pytest.raises(UserError, match=r"at 'neck': of the same image the student's are \[\(8, 8"):
        distiller(teacher=coarse)


def test_a_student_and_a_teacher_that_share_knowledge():
    student, teacher = detector(0), detector(1)
    share_knowledge(student.transformer.encoder)
    share_knowledge(teacher.transformer.encoder)
    losses = train_step(distiller(student, teacher))
    assert "loss_class_share_v" in losses
    assert "loss_group_class" in losses


def test_metrics_are_measured():
    model = distiller()
    for _ in range(2):
        model(batch())
    metrics = {name: float(value) for name, value in model.metrics.items()}
    assert 0 < metrics["teacher_share"] < 1
    for who in ("student", "teacher"):
        assert 0 < metrics[f"{who}_quality"] < 1
        assert 0 <= metrics[f"{who}_instability_0"] <= 2 * SETTINGS["num_queries"]


@pytest.mark.parametrize("aux_loss", [True, False])
def test_known_matches_are_those_of_their_layers(aux_loss):
    torch.manual_seed(4)
    student = detector()
    student.aux_loss = aux_loss
    targets = student.prepare_targets(batch())
    logits, boxes = torch.randn(2, 2, 6, 5), torch.rand(2, 2, 6, 4)
    predictions = Predictions(logits, boxes, groups_of((STUDENT,), 2))
    matches = student.criterion.match(logits, boxes, targets)
    assert not torch.equal(*matches.queries)  # else it would not matter whose they are
    expected, found = (student.losses(predictions, targets, known) for known in (None, matches))
    assert found == expected
