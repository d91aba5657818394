"""Pictures of a distillation: who teaches whom, and the command line."""

import json

import numpy as np
import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from PIL import Image
from tiny_deformable import SETTINGS as DEFORMABLE
from tiny_deformable import PyramidBackbone, build_deformable
from tiny_detectors import ROOT, instances, pattern_image
from tiny_distiller import detector, distiller

from engine.errors import UserError
from projects.detr_distill.matching import SoftCost, match
from tools import visualize_distillation as vis
from tools.attention_views import look
from tools.distillation_drawing import draw_instability
from tools.distillation_views import make_watched, observe

CONFIG = ROOT / "projects/detr_distill/configs/detrdistill_conditional_detr_quickstart.py"


def item(size=(64, 96), boxes=((8.0, 8.0, 40.0, 40.0),)):
    image = pattern_image(0, *size)
    return {"image": image, "instances": instances(size, list(boxes), [1] * len(boxes))}


@pytest.fixture
def watched():
    return make_watched(distiller(detector(0), detector(1), []))


def test_both_are_seen_as_in_an_evaluation(watched):
    seen = observe(watched, item())
    assert not watched.training
    for model, view in (
        (detector(0), seen.view(seen.context.student, 1)),
        (detector(1), seen.view(seen.context.teacher, 1)),
    ):
        (alone,) = look(model.eval(), [{"image": item()["image"]}])
        torch.testing.assert_close(view.boxes, alone.boxes)
        torch.testing.assert_close(view.scores, alone.scores)
        torch.testing.assert_close(view.cross, alone.cross, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(view.among, alone.among, rtol=1e-4, atol=1e-5)
        assert view.cells == alone.cells


def test_the_group_has_the_teachers_queries_in_the_students_decoder(watched):
    seen = observe(watched, item())
    swapped = detector(0).eval()
    swapped.query_embed.weight.data.copy_(detector(1).query_embed.weight)
    (alone,) = look(swapped, [{"image": item()["image"]}])
    torch.testing.assert_close(seen.view(seen.context.group, 1).boxes, alone.boxes)


def test_pairs_are_those_of_the_matching_best_first(watched):
    seen = observe(watched, item())
    student, teacher = (look(detector(s).eval(), [{"image": item()["image"]}])[0] for s in (0, 1))
    del student
    pairs = seen.pairs(1, 4)
    scores = [float(teacher.scores[other]) for _, other in pairs]
    assert len(pairs) == 4
    assert scores == sorted(scores, reverse=True)
    context = seen.context
    costs = SoftCost()(
        (context.student.logits, context.student.boxes),
        (context.teacher.logits, context.teacher.boxes),
    )
    every = match(costs)
    expected = zip(every.student[1].tolist(), every.teacher[1].tolist(), strict=True)
    assert set(pairs) <= set(expected)


def test_masks_are_cosines_at_the_cells(watched):
    seen = observe(watched, item())
    masks, queries = seen.masks("memory", 2)
    assert masks.shape == (1, 3, 64, 96)
    states = torch.nn.functional.normalize(seen.context.teacher.states[-1, 0], dim=-1)
    tokens = torch.nn.functional.normalize(seen.context.teacher.memory.tokens[0], dim=-1)
    for place, query in enumerate(queries):
        cosine = (tokens @ states[query]).clamp(min=0.01).view(4, 6)
        expected = cosine / cosine.max()
        # bilinear between cells of 16 pixels: the four pixels about a centre average to its value
        centre = masks[0, 1 + place].view(4, 16, 6, 16)[:, 7:9, :, 7:9].mean((1, 3))
        torch.testing.assert_close(centre, expected, rtol=0.1, atol=0.05)
    assert masks.amax() <= 1


def test_images_without_ground_truth(watched):
    without, empty = ({"image": item()["image"]}, item(boxes=()))
    first, second = (observe(watched, one).masks("memory", 1) for one in (without, empty))
    torch.testing.assert_close(first[0], second[0])


def test_detectors_whose_queries_cannot_be_shared(watched):
    torch.manual_seed(0)
    student = build_deformable(DEFORMABLE, {}, refine=True, two_stage=True)
    student.backbone = PyramidBackbone()
    seen = observe(make_watched(distiller(student, detector(1), [])), item((128, 96)))
    assert not seen.has_group
    assert seen.view(seen.context.student, 1).points is not None
    assert seen.pairs(2, 1)


def test_masks_need_queries_as_wide_as_the_maps(watched):
    seen = observe(watched, item())
    levels = (torch.zeros(1, 7, 4, 6),)
    object.__setattr__(seen.context.teacher.features, "levels", levels)
    with pytest.raises(UserError, match="maps at 'neck' have 7 channels, its queries 32"):
        seen.masks("neck", 1)


def test_instability_is_drawn_once_it_is_logged():
    assert draw_instability([{"iteration": 0, "total_loss": 1.0}]) is None
    records = [
        {"iteration": i, "student_instability_0": 9.0 - i, "teacher_instability_0": 2.0}
        for i in range(4)
    ]
    curves, bars = draw_instability(records).axes
    (student, teacher) = curves.lines
    assert student.get_ydata().tolist() == [9.0, 8.0, 7.0, 6.0]
    assert teacher.get_linestyle() == "--"
    assert [bar.get_height() for bar in bars.patches] == [7.5, 2.0]


# --- the command line ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An image, weights of both detectors, and what a run has logged."""
    path = tmp_path_factory.mktemp("run")
    Image.fromarray(pattern_image(0, 64, 96).permute(1, 2, 0).numpy().astype(np.uint8)).save(
        path / "a.png"
    )
    config = LazyConfig.load(str(CONFIG))
    torch.manual_seed(0)
    for name in ("student", "teacher"):
        model = instantiate(config.model.student)
        torch.save({"model": model.state_dict()}, path / f"{name}.pth")
    record = {"iteration": 5, "student_instability_0": 3.0, "total_loss": 1.0}
    (path / "metrics.json").write_text(json.dumps(record))
    return path


def draw(folder, *arguments):
    command = [
        f"teacher.init_checkpoint={folder / 'teacher.pth'}", "--config-file", str(CONFIG),
        "--checkpoint", str(folder / "student.pth"), "--files", str(folder / "a.png"),
        "--place", "memory", *map(str, arguments),
    ]  # fmt: skip
    vis.main(vis.parse(command))


def test_all_pictures_are_written(folder, tmp_path):
    draw(folder, "--output-dir", folder, "--output", tmp_path, "--top", 2, "--heads", 0)
    names = ("masks", "pairs", "attention", "instability")
    for name in names:
        with Image.open(tmp_path / f"distillation_{name}.png") as picture:
            assert np.ptp(np.asarray(picture.convert("L"))) > 100, name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layer", 3], "there is no layer 3: there are 0 to 2"),
        (["--heads", 8], "there is no head 8: there are 0 to 7"),
        (["--top", 0], "--top 0, --attended 1: expected at least 1"),
        (["--attended", 20], "--attended 20: expected .* at most 50 blocks"),
        (["--output", "/nowhere"], "cannot write /nowhere/distillation_masks.png"),
    ],
)
def test_errors_are_one_line(folder, arguments, message, tmp_path):
    if "--output" not in arguments:
        arguments = [*arguments, "--output", tmp_path]
    with pytest.raises(UserError, match=message) as caught:
        draw(folder, *arguments)
    assert "\n" not in str(caught.value)


def test_a_plain_detector_is_no_distillation(folder):
    config = str(ROOT / "projects/baselines/configs/conditional_detr_quickstart.py")
    arguments = ["--config-file", config, "--files", str(folder / "a.png")]
    with pytest.raises(UserError, match="the model is a ConditionalDETR, expected a Distiller"):
        vis.main(vis.parse(arguments))
