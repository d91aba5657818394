"""Start a program in several processes that can talk to each other."""

import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from detectron2.utils import comm

__all__ = ["DEFAULT_TIMEOUT", "launch"]

DEFAULT_TIMEOUT = timedelta(minutes=30)


def launch(
    main_func: Callable[..., Any],
    num_gpus_per_machine: int,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str | None = None,
    args: tuple = (),
    timeout: timedelta = DEFAULT_TIMEOUT,
) -> None:
    """Run ``main_func(*args)`` in every process of a run, or right here if it is the only one.

    Processes use one GPU each and NCCL where CUDA is available, else the CPU and gloo.

    Args:
        main_func: importable by name, since the processes are spawned.
        num_gpus_per_machine: processes on each machine.
        num_machines: machines, on each of which this is called.
        machine_rank: index of this machine.
        dist_url: where the processes meet, such as ``tcp://10.0.0.1:49200``; ``auto`` picks a free
            local port; None reads the environment variables ``MASTER_ADDR`` and ``MASTER_PORT``.
        args: arguments of ``main_func``, picklable.
        timeout: how long a process waits for the others.

    Raises:
        torch.multiprocessing.ProcessRaisedException: a process failed, with its traceback; the
            others have been ended.
        torch.multiprocessing.ProcessExitedException: a process ended with another exit code
            than 0 or by a signal.
    """
    world_size = num_machines * num_gpus_per_machine
    if world_size <= 1:
        main_func(*args)
        return
    if dist_url == "auto":
        assert num_machines == 1, (
            f"dist_url is 'auto' with {num_machines} machines, expected an address they all reach"
        )
        dist_url = f"tcp://127.0.0.1:{_free_port()}"
    first_rank = machine_rank * num_gpus_per_machine
    mp.start_processes(
        _run_process,
        args=(first_rank, world_size, num_gpus_per_machine, dist_url, timeout, main_func, args),
        nprocs=num_gpus_per_machine,
        start_method="spawn",
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _run_process(
    local_rank: int,
    first_rank: int,
    world_size: int,
    local_size: int,
    dist_url: str | None,
    timeout: timedelta,
    main_func: Callable[..., Any],
    args: tuple,
) -> None:
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        gpus = torch.cuda.device_count()
        assert local_size <= gpus, f"{local_size} processes asked for, but found {gpus} GPUs"
        torch.cuda.set_device(local_rank)
    else:
        torch.set_num_threads(max(1, torch.get_num_threads() // local_size))
    dist.init_process_group(
        backend="nccl" if on_gpu else "gloo",
        init_method=dist_url,
        world_size=world_size,
        rank=first_rank + local_rank,
        timeout=timeout,
    )
    comm.create_local_process_group(local_size)
    # Without a first meeting, processes that set up for long could exceed the timeout.
    comm.synchronize()
    main_func(*args)
    # Only after success: it waits for the others, who wait in vain for a failed process.
    dist.destroy_process_group()
