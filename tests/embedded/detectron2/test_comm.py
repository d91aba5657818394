"""Communication, with one process and with four on two pretended machines."""

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.utils import comm


def test_single_process():
    assert comm.get_world_size() == comm.get_local_size() == 1
    assert comm.get_rank() == comm.get_local_rank() == 0
    assert comm.is_main_process()
    comm.synchronize()
    assert comm.gather({"a": 1}) == [{"a": 1}]
    assert comm.all_gather(3) == [3]
    assert comm.reduce_dict({"l": torch.tensor(2.0)}) == {"l": torch.tensor(2.0)}
    np.random.seed(0)
    expected = np.random.randint(2**31)
    np.random.seed(0)
    assert comm.shared_random_seed() == expected


def exchange(rank: int, folder: str) -> None:
    """What every process of the test below does; an error in any of them fails the test."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=4
    )
    comm.create_local_process_group(2)
    assert (comm.get_world_size(), comm.get_rank()) == (4, rank)
    assert (comm.get_local_size(), comm.get_local_rank()) == (2, rank % 2)
    assert comm.is_main_process() == (rank == 0)
    comm.synchronize()

    data = {"rank": rank, "array": np.arange(rank)}
    assert [len(item["array"]) for item in comm.all_gather(data)] == [0, 1, 2, 3]
    assert comm.gather(rank, dst=1) == ([0, 1, 2, 3] if rank == 1 else [])
    machine = comm.get_local_process_group()
    assert comm.all_gather(rank, group=machine) == ([0, 1] if rank < 2 else [2, 3])

    np.random.seed(rank)
    seeds = comm.all_gather(comm.shared_random_seed())
    np.random.seed(0)
    assert seeds == [np.random.randint(2**31)] * 4

    values = {key: torch.tensor(float(rank * scale)) for key, scale in [("b", 1), ("a", 10)]}
    mean, total = comm.reduce_dict(values), comm.reduce_dict(values, average=False)
    assert set(mean) == {"a", "b"}
    if rank == 0:
        assert mean == {"a": 15.0, "b": 1.5}
        assert total == {"a": 60.0, "b": 6.0}
    dist.destroy_process_group()


def test_four_processes_on_two_machines(tmp_path):
    # forked: a new interpreter would import torch four times
    mp.start_processes(exchange, args=(str(tmp_path),), nprocs=4, start_method="fork")
