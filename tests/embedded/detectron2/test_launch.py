"""launch() and create_ddp_model: gloo processes on the CPU, checked from the parent."""

import json
import os
import time

import pytest
import torch
import torch.distributed as dist
from detectron2.engine import SimpleTrainer, create_ddp_model, launch
from detectron2.utils import comm
from torch import nn
from torch.multiprocessing import ProcessRaisedException

if torch.cuda.is_available():
    pytest.skip("launch uses one GPU per process here", allow_module_level=True)


def _train_one_rank(folder, steps):
    """Each of two ranks sees half of the batch that a single process would see."""
    rank, size = comm.get_rank(), comm.get_world_size()
    model = nn.Linear(3, 1)
    with torch.no_grad():
        model.weight.fill_(0.5)
        model.bias.zero_()

    class WithLoss(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = model

        def forward(self, x):
            return {"loss": self.linear(x).square().mean()}

    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(8, 3, generator=generator).chunk(size)[rank] for _ in range(steps)]
    wrapped = create_ddp_model(WithLoss(), device_ids=None, broadcast_buffers=False)
    trainer = SimpleTrainer(wrapped, batches, torch.optim.SGD(model.parameters(), lr=0.1))
    trainer.train(0, steps)
    report = {
        "size": size,
        "local": [comm.get_local_rank(), comm.get_local_size()],
        "backend": dist.get_backend() if dist.is_initialized() else None,
        "wrapped": type(wrapped).__name__,
        "device_ids": getattr(wrapped, "device_ids", None),
        "weight": model.weight.flatten().tolist(),
        "metrics": sorted(trainer.storage.latest()),
    }
    if comm.is_main_process():
        report["losses"] = [v for v, _ in trainer.storage.history("total_loss").values()]
    with open(os.path.join(folder, f"{size}_{rank}.json"), "w") as file:
        json.dump(report, file)


def _fail_in_rank_1():
    if comm.get_rank() == 1:
        raise ValueError("rank one is broken")
    time.sleep(600)


def _read(folder, size, rank):
    return json.loads((folder / f"{size}_{rank}.json").read_text())


def test_two_gloo_processes_train_like_one(tmp_path):
    launch(_train_one_rank, 1, args=(str(tmp_path), 4))
    launch(_train_one_rank, 2, dist_url="auto", args=(str(tmp_path), 4))
    one, first, second = _read(tmp_path, 1, 0), _read(tmp_path, 2, 0), _read(tmp_path, 2, 1)

    assert (one["backend"], one["wrapped"]) == (None, "WithLoss")
    assert (first["local"], second["local"]) == ([0, 2], [1, 2])
    assert (first["backend"], first["wrapped"]) == ("gloo", "DistributedDataParallel")
    assert first["device_ids"] is None
    assert first["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert first["weight"] == pytest.approx(one["weight"], rel=1e-5)
    assert first["weight"] == second["weight"]
    assert "total_loss" in first["metrics"]
    assert second["metrics"] == ["rank_data_time"]


def test_a_failed_process_fails_the_parent_with_its_error():
    start = time.monotonic()
    with pytest.raises(ProcessRaisedException, match="rank one is broken"):
        launch(_fail_in_rank_1, 2, dist_url="auto")
    assert time.monotonic() - start < 300  # the other one is not waited for


def test_a_single_process_runs_inline():
    seen = []
    launch(lambda *args: seen.append((args, os.getpid(), dist.is_initialized())), 1, args=(1, 2))
    assert seen == [((1, 2), os.getpid(), False)]
    with pytest.raises(KeyError):  # not wrapped into anything
        launch(lambda: {}["missing"], 1)


def test_auto_address_is_for_one_machine():
    with pytest.raises(AssertionError):
        launch(print, 1, num_machines=2, dist_url="auto")
