"""Distillation as a trainer may set it: compiled, in mixed precision, in padded batches."""

import torch
from tiny_distiller import detector, distiller, train_step

from projects.detr_distill.fitnet import FitNet


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
