"""A distiller under distributed training, one process without any object."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiny_detectors import SETTINGS, StridedBackbone, build_conditional, instances, pattern_image

from projects.detr_distill.distiller import Distiller
from projects.detr_distill.fitnet import FitNet
from projects.detr_distill.logits import LogitsDistillation
from projects.detr_distill.query_prior import QueryPriorAssignment
from projects.detr_distill.target_aware import TargetAwareDistillation


def detector(seed, **changes):
    torch.manual_seed(seed)
    model = build_conditional(SETTINGS | changes, {})
    model.backbone = StridedBackbone()
    return model


def distiller():
    student, teacher = detector(0), detector(1, embed_dim=64)
    objectives = [
        LogitsDistillation(),
        TargetAwareDistillation(),
        QueryPriorAssignment(),
        FitNet(),
    ]
    return Distiller(student, teacher, objectives).train()


def inputs():
    boxes = [[[8, 8, 40, 40], [30, 20, 60, 60]], []]
    return [
        {"image": pattern_image(i, 64, 64), "instances": instances((64, 64), b, [1] * len(b))}
        for i, b in enumerate(boxes)
    ]


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = torch.nn.parallel.DistributedDataParallel(distiller())
    for _ in range(2):  # a parameter without gradient would be missed in the second step
        model.zero_grad()
        losses = model([inputs()[rank]])
        sum(losses.values()).backward()
    gradients = {name: p.grad for name, p in model.module.named_parameters()}
    torch.save((losses, gradients), f"{folder}/{rank}.pth")
    dist.destroy_process_group()


def test_two_processes_learn_what_one_does(tmp_path):
    model = distiller()
    losses = model(inputs())
    sum(losses.values()).backward()
    mp.spawn(work, args=(str(tmp_path),), nprocs=2)
    results = [torch.load(tmp_path / f"{rank}.pth", weights_only=True) for rank in range(2)]
    for name, loss in losses.items():
        mean = sum(ranks[0][name].item() for ranks in results) / 2
        assert mean == pytest.approx(loss.item(), rel=1e-5, abs=1e-6), name
    for name, parameter in model.named_parameters():
        assert torch.equal(results[0][1][name], results[1][1][name]), name
        torch.testing.assert_close(results[1][1][name], parameter.grad, rtol=1e-4, atol=1e-5)
