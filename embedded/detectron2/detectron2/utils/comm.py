"""Communication between the processes of a run; everything also works with a single process."""

from typing import Any

import numpy as np
import torch
import torch.distributed as dist

_local_group: dist.ProcessGroup | None = None
_cpu_group: dist.ProcessGroup | None = None


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def get_world_size() -> int:
    """Number of processes in the run."""
    return dist.get_world_size() if _is_distributed() else 1


def get_rank() -> int:
    """Rank of this process among all processes."""
    return dist.get_rank() if _is_distributed() else 0


def is_main_process() -> bool:
    """Whether this process has rank 0."""
    return get_rank() == 0


def create_local_process_group(num_workers_per_machine: int) -> None:
    """Create the group of the processes on this machine; all processes call it together.

    Ranks are assumed to be contiguous per machine, as launchers number them.
    """
    global _local_group
    world_size, size = get_world_size(), num_workers_per_machine
    if _local_group is not None:
        assert dist.get_world_size(_local_group) == size, (
            f"local process group: already created with {dist.get_world_size(_local_group)} "
            f"processes, now asked for {size}"
        )
        return
    assert world_size % size == 0, (
        f"local process group: {world_size} processes do not divide into machines of {size}"
    )
    for first in range(0, world_size, size):
        ranks = list(range(first, first + size))
        group = dist.new_group(ranks)  # every process must take part in creating every group
        if get_rank() in ranks:
            _local_group = group


def get_local_process_group() -> dist.ProcessGroup:
    """Return the group of the processes on this machine."""
    assert _local_group is not None, (
        "local process group: not created; start processes with detectron2's launch() or call "
        "comm.create_local_process_group() after torch.distributed.init_process_group()"
    )
    return _local_group


def get_local_rank() -> int:
    """Rank of this process on its machine."""
    return dist.get_rank(get_local_process_group()) if _is_distributed() else 0


def get_local_size() -> int:
    """Number of processes on this machine."""
    return dist.get_world_size(get_local_process_group()) if _is_distributed() else 1


def synchronize() -> None:
    """Wait until all processes have come here."""
    if get_world_size() == 1:
        return
    if dist.get_backend() == dist.Backend.NCCL:
        dist.barrier(device_ids=[torch.cuda.current_device()])
    else:
        dist.barrier()


def _object_group() -> dist.ProcessGroup | None:
    """All processes, on a CPU backend, so that exchanged objects take no GPU memory.

    ``None`` is torch's name for the default group.
    """
    global _cpu_group
    if dist.get_backend() != dist.Backend.NCCL:
        return None
    if _cpu_group is None:
        _cpu_group = dist.new_group(backend="gloo")
    return _cpu_group


def all_gather(data: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Return the list of every process's ``data`` (anything that pickles), in rank order."""
    if get_world_size() == 1:
        return [data]
    group = group or _object_group()
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, data, group=group)
    return gathered


def gather(data: Any, dst: int = 0, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Return the list of every process's ``data`` on rank ``dst``, an empty list elsewhere."""
    if get_world_size() == 1:
        return [data]
    group = group or _object_group()
    gathered: list[Any] | None = None
    if get_rank() == dst:
        gathered = [None] * dist.get_world_size(group)
    dist.gather_object(data, gathered, dst=dst, group=group)
    return gathered or []


def shared_random_seed() -> int:
    """Return a random number that is the same in all processes; all of them must call this."""
    return all_gather(int(np.random.randint(2**31)))[0]


def reduce_dict(
    input_dict: dict[str, torch.Tensor], average: bool = True
) -> dict[str, torch.Tensor]:
    """Average (or sum) scalar tensors over all processes; only rank 0 receives the result.

    Every process must pass the same keys.
    """
    if get_world_size() == 1:
        return input_dict
    keys = sorted(input_dict)
    with torch.no_grad():
        values = torch.stack([input_dict[key] for key in keys])
        dist.reduce(values, dst=0)
        if average and is_main_process():
            values /= get_world_size()
    return dict(zip(keys, values, strict=True))
