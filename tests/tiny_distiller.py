"""A tiny student under a tiny teacher, and a step of its training."""

import torch
from tiny_detectors import SETTINGS, StridedBackbone, build_conditional, instances, pattern_image

from projects.detr_distill.distiller import Distiller
from projects.detr_distill.logits import LogitsDistillation
from projects.detr_distill.query_prior import QueryPriorAssignment
from projects.detr_distill.target_aware import TargetAwareDistillation

BOXES = [[[8, 8, 40, 40], [30, 20, 60, 60]], [[0, 0, 1, 1]]]


def detector(seed=0, **changes):
    torch.manual_seed(seed)
    model = build_conditional(SETTINGS | changes, {})
    model.backbone = StridedBackbone()
    return model


def objectives():
    return [LogitsDistillation(), TargetAwareDistillation(), QueryPriorAssignment()]


def distiller(student=None, teacher=None, parts=None):
    torch.manual_seed(2)
    parts = objectives() if parts is None else parts
    return Distiller(student or detector(0), teacher or detector(1), parts).train()


def batch(boxes=BOXES):
    sizes = [(64, 64), (48, 80)]
    return [
        {"image": pattern_image(i, *size), "instances": instances(size, b, [1] * len(b))}
        for i, (size, b) in enumerate(zip(sizes, boxes, strict=True))
    ]


def train_step(model, inputs=None):
    losses = model(inputs or batch())
    sum(losses.values()).backward()
    for name, value in losses.items():
        assert value.isfinite(), name
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    return losses
