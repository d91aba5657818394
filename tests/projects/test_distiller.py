"""The model that trains a student under a teacher: what belongs to whom, and odd inputs."""

import copy

import pytest
import torch
from tiny_detectors import SETTINGS, StridedBackbone
from tiny_distiller import BOXES, batch, detector, distiller, objectives, train_step
from torch import nn

from detectors.structures import STUDENT, Matches, Predictions, groups_of
from engine.errors import UserError
from projects.detr_distill import logits
from projects.detr_distill.distiller import Distiller
from projects.detr_distill.fitnet import FitNet
from projects.detr_distill.logits import LogitsDistillation
from projects.detr_distill.matching import match_chosen
from projects.detr_distill.measures import matched_quality
from projects.detr_distill.query_prior import QueryPriorAssignment
from projects.detr_distill.target_aware import TargetAwareDistillation
from projects.detr_distill.teacher import load_teacher
from projects.detr_distill.timing import StepClock
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


def test_boxes_of_a_few_pixels_are_found_as_well_as_large_ones():
    size = torch.tensor([[0.5, 0.5, 4 / 1333, 4 / 800]])
    targets = [{"labels": torch.tensor([2]), "boxes": size}]
    matches = Matches(*(torch.zeros(shape, dtype=torch.long) for shape in ((1,), (1, 1), (1, 1))))
    scores = torch.full((1, 1, 1, 5), 0.25)
    quality = matched_quality(scores, size[None, None], matches, targets)
    assert quality.item() == pytest.approx(0.5)


def test_a_group_is_weighted_as_the_students_own_losses():
    student = detector()
    student.criterion.weight_dict = {"loss_bbox": 5.0, "loss_giou": 2.0, "loss_bbox_0": 0.0}
    losses = train_step(distiller(student, parts=[QueryPriorAssignment()]))
    assert losses["loss_group_class"] > 0
    half = [losses["loss_group_bbox"]]
    student.criterion.weight_dict["loss_bbox_0"] = 5.0
    half.append(distiller(student, parts=[QueryPriorAssignment()])(batch())["loss_group_bbox"])
    assert 0 < half[0] < half[1]


def test_what_is_learned_beside_the_student_is_where_the_student_is():
    model = Distiller(
        detector(0, embed_dim=16).double(), detector(1).double(), [FitNet("memory")]
    ).train()
    train_step(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "joint", "positive_class": False}, "mode 'joint' has no positives or negatives"),
        (dict.fromkeys(("positive_class", "positive_boxes", "negative_boxes"), False), "all of"),
    ],
)
def test_switches_of_nothing_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        LogitsDistillation(**options)


def test_negatives_that_teach_nothing_are_not_matched(monkeypatch):
    counts = []
    monkeypatch.setattr(logits, "match_chosen", lambda p: counts.append(len(p)) or match_chosen(p))
    for part in (LogitsDistillation(), LogitsDistillation(negative_boxes=False)):
        losses = train_step(distiller(parts=[part]))
    assert counts == [2, 1]
    assert "loss_logits_positive_bbox" in losses
    assert not any("negative" in name for name in losses)


class Event:
    """As a device's; time passes when it is made."""

    def __init__(self, time):
        self.time, self.waited_for = time, False

    def synchronize(self):
        self.waited_for = True

    def elapsed_time(self, end):
        return end.time - self.time


def test_the_clock_does_not_wait_for_the_step_before(monkeypatch):
    events = [Event(time) for time in (0, 1, 4, 6, 10, 11)]
    following = iter(events)
    monkeypatch.setattr(StepClock, "_now", staticmethod(lambda device: next(following)))
    clock = StepClock()
    for _ in range(3):
        clock.start_step(torch.device("cuda"))
        clock.stop_teacher()
    assert clock.teacher_share == 1 / 4
    assert [event.waited_for for event in events] == [False, True, True, False, False, False]


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
