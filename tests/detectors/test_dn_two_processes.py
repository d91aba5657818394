"""DN-DETR under distributed training, with processes whose images hold no object."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiny_dab import batch, tiny_detector

from detectors.dn_detr import DNDETR

BOXES = ((4.0, 4.0, 60.0, 30.0), (30.0, 20.0, 90.0, 60.0))


def work(rank, folder, boxes_of_ranks):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = torch.nn.parallel.DistributedDataParallel(tiny_detector(DNDETR).train())
    for _ in range(2):  # a parameter without gradient would be missed in the second one
        model.zero_grad()
        losses = model([batch(boxes_of_ranks[rank])[0]])
        sum(losses.values()).backward()
    gradients = {name: p.grad for name, p in model.module.named_parameters()}
    torch.save((losses, gradients), f"{folder}/{rank}.pth")
    dist.destroy_process_group()


@pytest.mark.parametrize("boxes_of_ranks", [(BOXES, ()), ((), ())])
def test_a_process_without_boxes_keeps_in_step(tmp_path, boxes_of_ranks) -> None:
    mp.spawn(work, args=(str(tmp_path), boxes_of_ranks), nprocs=2)
    results = [torch.load(tmp_path / f"{rank}.pth", weights_only=True) for rank in range(2)]
    (losses, gradients), (_, others) = results
    assert "loss_class_dn" in losses
    assert (losses["loss_bbox_dn"] > 0) == bool(boxes_of_ranks[0])
    for name, gradient in gradients.items():
        assert gradient is not None, name
        assert gradient.isfinite().all(), name
        assert torch.equal(gradient, others[name]), name
