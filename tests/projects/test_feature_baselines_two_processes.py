"""FitNet, FGD, MGD, FKD and FGFI under distributed training, one process without any object."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from feature_context import context_of
from torch import nn

from projects.detr_distill.fgd import FGD
from projects.detr_distill.fgfi import FGFI
from projects.detr_distill.fitnet import FitNet
from projects.detr_distill.fkd import FKD
from projects.detr_distill.mgd import MGD

MEANS = {"loss_fitnet", "loss_fgfi", *(f"loss_fgd_{part}" for part in FGD.parts)}
"""The losses that are means over processes."""


class Baselines(nn.Module):
    """All of them on the maps of a student of one layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.student = nn.Conv2d(3, 6, 1)
        self.means = nn.ModuleList([FitNet(), FGD(), FGFI(start_iteration=0)])
        self.others = nn.ModuleList([MGD(), FKD(), FGFI(start_iteration=9)])
        self.others[-1].name = "late"
        for objective in (*self.means, *self.others):
            objective.make_adapters([6, 6], [8, 8])

    def forward(self, images, parts):
        levels = inputs()
        context = context_of(
            [torch.tensor([[5.0, 9.0, 40.0, 50.0]]), torch.zeros(0, 4)][images],
            (64, 64),
            student=[self.student(level[images, :3]) for level in levels],
            teacher=[level[images, 3:] for level in levels],
        )
        losses = {}
        for name in parts:
            for objective in getattr(self, name):
                losses |= objective(context)
        return losses


def inputs():
    """What student and teacher see in two images, on two levels."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 11, side, side, generator=generator) for side in (8, 4)]


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = Baselines()
    parallel = nn.parallel.DistributedDataParallel(model)
    results = []
    for others in (False, True):  # a weight without gradient would be missed in the second step
        model.zero_grad()
        losses = parallel(slice(rank, rank + 1), ["means", "others"])
        sum(loss * (others or name in MEANS) for name, loss in losses.items()).backward()
        results.append((losses, {name: p.grad.clone() for name, p in model.named_parameters()}))
    torch.save(results, f"{folder}/{rank}.pth")
    dist.destroy_process_group()


def test_two_processes_learn_what_one_does(tmp_path):
    model = Baselines()
    expected = model(slice(0, 2), ["means"])
    assert expected.keys() == MEANS
    sum(expected.values()).backward()
    mp.spawn(work, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pth", weights_only=True) for rank in range(2))
    for name, loss in expected.items():
        mean = (first[0][0][name].item() + second[0][0][name].item()) / 2
        assert mean == pytest.approx(loss.item(), rel=1e-5), name
    assert second[0][0]["loss_fgfi"] == 0
    assert first[0][0]["loss_fgfi"] > 0
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(first[0][1][name], parameter.grad, rtol=1e-4, atol=1e-6)
    for (_, gradients), (_, same) in zip(first, second, strict=True):
        for name, gradient in gradients.items():
            assert gradient.isfinite().all(), name
            assert torch.equal(gradient, same[name]), name
