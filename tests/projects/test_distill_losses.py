"""DETRDistill's losses against recorded values and gradients."""

import pytest
import torch
from detrex.layers import box_cxcywh_to_xyxy, box_xyxy_to_cxcywh
from recorded_distillation import RecordedLosses, context, view

from projects.detr_distill.logits import LogitsDistillation, split_queries
from projects.detr_distill.matching import Detections, SoftCost, map_stages, match, match_chosen
from projects.detr_distill.measures import instability
from projects.detr_distill.query_prior import QueryPriorAssignment
from projects.detr_distill.target_aware import TargetAwareDistillation

EXACT = {"rtol": 1e-9, "atol": 1e-9}
OFFICIAL = {"rtol": 1e-6, "atol": 1e-6}  # the original casts soft labels to float32


@pytest.fixture(scope="module")
def recorded(reference_dir):
    return RecordedLosses(reference_dir, "detrdistill")


class Case:
    """The recorded teacher, student, group and ground truth."""

    def __init__(self, recorded):
        self.logits, self.boxes = recorded.leaf("student/logits"), recorded.leaf("student/boxes")
        self.group = [recorded.leaf("group/logits"), recorded.leaf("group/boxes")]
        self.maps = [recorded.leaf(f"student/feat{level}") for level in range(2)]
        self.teacher_maps = [recorded[f"teacher/feat{level}"] for level in range(2)]
        targets = [
            {
                "labels": recorded[f"gt/labels{image}"],
                "boxes": recorded[f"gt/boxes_cxcywh{image}"],
                "boxes_xyxy": recorded[f"gt/boxes_xyxy{image}"],
            }
            for image in range(3)
        ]
        self.context = context(
            view(self.logits, self.boxes, levels=self.maps),
            view(
                recorded["teacher/logits"],
                recorded["teacher/boxes"],
                recorded["teacher/queries"],
                self.teacher_maps,
            ),
            targets,
            view(*self.group),
        )


def inside(boxes):
    """Boxes cxcywh cut at the image's border, as the released code cuts the teacher's."""
    return box_xyxy_to_cxcywh(box_cxcywh_to_xyxy(boxes).clamp(0, 1))


@pytest.fixture
def case(recorded):
    return Case(recorded)


def test_joint_matching_and_losses_are_the_released_ones(recorded, case):
    taught = Detections(recorded["teacher/logits"], inside(recorded["teacher/boxes"]))
    costs = SoftCost()(Detections(case.logits, case.boxes), taught)
    pairs = match(costs)
    for stage in range(2):
        for image in range(3):
            prefix = f"official/stage{stage}/"
            torch.testing.assert_close(
                costs[stage, image], recorded[f"{prefix}cost{image}"], rtol=1e-6, atol=1e-6
            )
            own = pairs.images == image
            order = recorded[f"{prefix}match_student{image}"].argsort()
            teacher = recorded[f"{prefix}match_teacher{image}"][order]
            assert torch.equal(pairs.teacher[stage, own], teacher)
    losses = LogitsDistillation(mode="joint")(case.context)
    for kind, name in (("class", "cls"), ("bbox", "bbox"), ("giou", "iou")):
        stages = (recorded[f"official/stage{k}/loss_{name}_distill"] for k in range(2))
        expected = sum(value.double().sum() for value in stages)
        torch.testing.assert_close(losses[f"loss_logits_{kind}"], expected, **OFFICIAL)
    total = sum(losses.values())
    torch.testing.assert_close(total, recorded["official/logits_kd_total"], **OFFICIAL)
    total.backward()
    torch.testing.assert_close(
        case.logits.grad, recorded["official/logits_kd_grad_logits"], **OFFICIAL
    )
    torch.testing.assert_close(
        case.boxes.grad, recorded["official/logits_kd_grad_boxes"], **OFFICIAL
    )


def test_positives_and_negatives_are_matched_apart(recorded, case):
    positive, negative = split_queries(case.context, [0, 1])
    learner = Detections(case.logits, case.boxes)
    taught = Detections(recorded["teacher/logits"], recorded["teacher/boxes"])
    pairs = match_chosen(
        [(SoftCost()(learner, taught), positive), (SoftCost(0.0)(learner, taught), negative)]
    )
    for stage in range(2):
        for image in range(3):
            prefix = f"paper/stage{stage}/"
            matched = recorded[f"{prefix}teacher_pos{image}"].sort().values
            assert torch.equal(positive[image][stage], matched)
            for kind, found in zip(("pos", "neg"), pairs, strict=True):
                if f"{prefix}{kind}_student{image}" not in recorded:
                    assert not (found.images == image).any()
                    continue
                own = found.images == image
                student = recorded[f"{prefix}{kind}_student{image}"]
                teacher = recorded[f"{prefix}{kind}_teacher{image}"]
                expected = dict(zip(student.tolist(), teacher.tolist(), strict=True))
                ours = zip(
                    found.student[stage, own].tolist(),
                    found.teacher[stage, own].tolist(),
                    strict=True,
                )
                assert dict(ours) == expected


def test_paper_mode(recorded, case):
    losses = LogitsDistillation()(case.context)
    for kind, name, weight in (
        ("positive_class", "pos_cls", 1),
        ("positive_bbox", "pos_l1", 1),
        ("positive_giou", "pos_giou", 1),
        ("negative_bbox", "neg_l1", 1),
        ("negative_giou", "neg_giou", 1),
    ):
        expected = sum(recorded[f"paper/stage{k}/{name}"] for k in range(2)) * weight
        torch.testing.assert_close(losses[f"loss_logits_{kind}"], expected, **EXACT)
    positive = sum(value for name, value in losses.items() if "positive" in name)
    negative = sum(value for name, value in losses.items() if "negative" in name)
    torch.testing.assert_close(positive, recorded["paper/pos_total"], **EXACT)
    torch.testing.assert_close(negative, recorded["paper/neg_total"], **EXACT)
    for part, name in ((positive, "pos"), (negative, "neg")):
        grads = torch.autograd.grad(part, [case.boxes, case.logits], allow_unused=True)
        torch.testing.assert_close(grads[0], recorded[f"paper/{name}_grad_boxes"], **EXACT)
        if name == "pos":
            torch.testing.assert_close(grads[1], recorded["paper/pos_grad_logits"], **EXACT)
        else:
            assert grads[1] is None


def test_released_masks(recorded, case):
    objective = TargetAwareDistillation(max_detections=12)
    objective.make_adapters([16, 16], [16, 16])
    losses = [
        objective.level_loss(level, case.maps[level], case.teacher_maps[level], case.context)
        for level in range(2)
    ]
    torch.testing.assert_close(sum(losses), recorded["official/feature_total"], **OFFICIAL)
    sum(losses).backward()
    for level in range(2):
        torch.testing.assert_close(
            case.maps[level].grad, recorded[f"official/feature_grad{level}"], **OFFICIAL
        )
        masks = [recorded[f"official/stage{stage}/mask{level}"] for stage in range(2)]
        expected = sum(mask.square() for mask in masks) / case.teacher_maps[level].numel()
        weights = objective.cell_weights(case.teacher_maps[level], case.context)
        torch.testing.assert_close(weights, expected, **OFFICIAL)


@pytest.mark.parametrize(("form", "name"), [("eq8", "feature_eq8"), ("eq6", "feature_eq5_eq6")])
def test_masks_of_the_paper(recorded, case, form, name):
    objective = TargetAwareDistillation(form)
    assert objective.weight == 20.0
    objective.make_adapters([16, 16], [16, 16])
    loss = sum(
        objective.level_loss(level, case.maps[level], case.teacher_maps[level], case.context)
        for level in range(2)
    )
    torch.testing.assert_close(loss, recorded[f"paper/{name}"], **EXACT)
    loss.backward()
    for level in range(2):
        expected = recorded[f"paper/{name}_grad{level}"]
        torch.testing.assert_close(case.maps[level].grad, expected, **EXACT)


def test_quality_of_matched_queries(recorded, case):
    quality = TargetAwareDistillation("eq8").query_quality(case.context, [0, 1])
    for stage in range(2):
        expected = recorded[f"paper/stage{stage}/quality_matched_only"]
        torch.testing.assert_close(quality[stage], expected, **EXACT)


@pytest.mark.parametrize(
    ("assignment", "name"),
    [("teacher", "intended_teacher_assignment"), ("own", "as_coded_student_assignment")],
)
def test_group_under_an_assignment(recorded, case, assignment, name):
    total = sum(QueryPriorAssignment(assignment)(case.context).values())
    expected = recorded[f"official/group/{name}/total"].squeeze()
    torch.testing.assert_close(total.double(), expected, rtol=1e-6, atol=1e-5)  # float32 criterion
    total.backward()
    for tensor, kind in zip(case.group, ("logits", "boxes"), strict=True):
        torch.testing.assert_close(
            tensor.grad,
            recorded[f"official/group/{name}/grad_{kind}"],
            rtol=1e-5,
            atol=1e-5,
        )


def test_last_stage_alone_takes_the_teachers_assignment(case):
    given = case.context.teacher_matches
    matches = QueryPriorAssignment("last")._matches(case.context)
    own = case.context.group_matches
    assert torch.equal(matches.queries[-1], given.queries[-1])
    assert torch.equal(matches.queries[:-1], own.queries[:-1])


def test_instability(recorded, case):
    shape = case.context.teacher.logits.shape
    found = instability(case.context.teacher_matches, shape[1], shape[2])
    expected = recorded["paper/instability"].double().mean(1).float()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        (6, 6, [0, 1, 2, 3, 4, 5]),
        (3, 6, [1, 3, 5]),
        (2, 6, [2, 5]),
        (1, 6, [5]),
        (4, 6, [1, 2, 4, 5]),
        (6, 3, [0, 0, 1, 1, 2, 2]),
    ],
)
def test_stages_of_other_depths(student, teacher, expected):
    assert map_stages(student, teacher) == expected
