"""FitNet, FGD, MGD, FKD and FGFI in training, a wide teacher over a narrow student."""

import pytest
import torch
from feature_context import context_of
from tiny_deformable import SETTINGS, PyramidBackbone, build_deformable
from tiny_detectors import instances, pattern_image

from projects.detr_distill.distiller import Distiller
from projects.detr_distill.fgd import FGD
from projects.detr_distill.fgfi import FGFI
from projects.detr_distill.fitnet import FitNet
from projects.detr_distill.fkd import FKD
from projects.detr_distill.mgd import MGD

NAMES = {
    FitNet: ["fitnet"],
    FGD: ["fgd_foreground", "fgd_background", "fgd_attention", "fgd_relation"],
    MGD: ["mgd"],
    FKD: ["fkd_masked", "fkd_channel", "fkd_spatial", "fkd_non_local"],
    FGFI: ["fgfi"],
}
BASELINES = pytest.mark.parametrize("kind", NAMES)
BOXES = [[[8, 8, 40, 40], [30, 20, 60, 60]], [[0, 0, 1, 1]]]


def make(kind, **options):
    """An objective that counts from the first step."""
    return kind(**options, **({"start_iteration": 0} if kind is FGFI else {}))


def detector(embed_dim, seed):
    torch.manual_seed(seed)
    model = build_deformable(SETTINGS | {"embed_dim": embed_dim}, {})
    model.backbone = PyramidBackbone()
    return model


def distiller(*objectives):
    student, teacher = detector(16, 0), detector(32, 1)
    torch.manual_seed(2)
    return Distiller(student, teacher, objectives).train()


def batch(boxes=BOXES):
    sizes = [(64, 64), (48, 80)]
    return [
        {"image": pattern_image(i, *size), "instances": instances(size, b, [1] * len(b))}
        for i, (size, b) in enumerate(zip(sizes, boxes, strict=True))
    ]


def distillation_losses(losses):
    names = {f"loss_{name}" for parts in NAMES.values() for name in parts}
    return {name: value for name, value in losses.items() if name in names}


def check_gradients(module):
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@BASELINES
def test_a_single_cell_is_enough(kind):
    model = distiller(make(kind))  # whose last level has one for each 64 pixels
    sum(distillation_losses(model(batch()[:1])).values()).backward()
    check_gradients(model.training_parts)


@BASELINES
@pytest.mark.parametrize("place", ["neck", "memory"])
@pytest.mark.parametrize("boxes", [BOXES, [[], BOXES[0]], [[], []]])
def test_a_step_gives_every_weight_a_gradient(kind, place, boxes):
    model = distiller(make(kind, place=place))
    losses = model(batch(boxes))
    found = distillation_losses(losses)
    assert sorted(found) == sorted(f"loss_{name}" for name in NAMES[kind])
    for name, value in found.items():
        assert value.isfinite(), name
        empty = not any(boxes) and name in ("loss_fgd_foreground", "loss_fgfi")
        assert (value == 0) == empty, name
    sum(found.values()).backward()
    check_gradients(model.training_parts)
    reached = model.student.transformer.encoder if place == "memory" else model.student.neck
    assert any(p.grad is not None for p in reached.parameters())


@BASELINES
def test_training_lowers_the_loss(kind):
    torch.manual_seed(0)
    objective = make(kind)
    objective.make_adapters([6], [8])
    student = torch.randn(2, 6, 8, 10, requires_grad=True)
    boxes = [torch.tensor(each, dtype=torch.float32).reshape(-1, 4) for each in BOXES]
    teacher = torch.nn.functional.interpolate(torch.randn(2, 8, 2, 2), (8, 10), mode="bilinear")
    context = context_of(boxes, (64, 80), student=[student], teacher=[teacher])
    optimizer = torch.optim.Adam([student, *objective.parameters()], lr=0.05)
    history = []
    for _ in range(40):
        loss = sum(objective(context).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert sum(history[-5:]) < 0.7 * sum(history[:5])


@BASELINES
def test_mixed_precision_does_not_reach_the_loss(kind):
    torch.manual_seed(0)
    objective = make(kind)
    objective.make_adapters([6, 6], [8, 8])
    student, teacher = (
        [torch.randn(2, channels, side, side).bfloat16() for side in (8, 4)] for channels in (6, 8)
    )
    boxes = [torch.tensor(each, dtype=torch.float32) for each in BOXES]
    exact = context_of(boxes, (64, 64), student=[m.float() for m in student], teacher=teacher)
    torch.manual_seed(3)
    expected = objective(exact)
    torch.manual_seed(3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = objective(context_of(boxes, (64, 64), student=student, teacher=teacher))
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected[name], rtol=0, atol=0)


# --- FGFI's late start --------------------------------------------------------------------------


def late_steps(objective, count):
    """Losses of some steps; every one gives every weight a gradient, at first of zeros."""
    objective.make_adapters([6], [8])
    torch.manual_seed(0)
    losses = []
    for _ in range(count):
        maps = [torch.randn(1, 6, 8, 8, requires_grad=True)], [torch.randn(1, 8, 8, 8)]
        box = torch.tensor([[10.0, 10.0, 40.0, 40.0]])
        loss = objective(context_of([box], (64, 64), student=maps[0], teacher=maps[1]))["loss_fgfi"]
        objective.zero_grad()
        loss.backward()
        check_gradients(objective)
        moved = any(p.grad.any() for p in objective.parameters())
        assert moved == maps[0][0].grad.any().item() == (loss.item() > 0)
        losses.append(loss.item())
    return losses


def test_fgfi_starts_late():
    assert [loss > 0 for loss in late_steps(FGFI(start_iteration=3), 5)] == [False] * 3 + [True] * 2
    assert FGFI().start_iteration == 400


def test_fgfi_goes_on_counting_where_it_stopped():
    first, second = FGFI(start_iteration=3), FGFI(start_iteration=3)
    late_steps(first, 2)
    second.make_adapters([6], [8])
    second.load_state_dict(first.state_dict())
    assert [loss > 0 for loss in late_steps(second, 3)] == [False, True, True]
