"""One or several processes: started here, or by torchrun."""

import argparse
import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from detectron2.engine import launch
from detectron2.utils import comm
from torch.multiprocessing import ProcessExitedException

from .errors import UserError, exit_now

__all__ = ["run_in_processes", "started_by_torchrun"]

logger = logging.getLogger(__name__)

_PATIENCE = 5  # seconds


def run_in_processes(work: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """Call ``work(args)``, which returns an exit code, in each process; return the highest code."""
    if "train.device=cpu" in (args.opts or []):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # also what detectron2's launch decides by
    if started_by_torchrun(os.environ):
        return _run_under_torchrun(work, args)
    if args.num_gpus * args.num_machines <= 1:
        return work(args)
    return _run_launched(work, args)


def started_by_torchrun(environment: Mapping[str, str]) -> bool:
    """Whether a launcher has already started this process as one of several."""
    return all(name in environment for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))


def check_gpu_count(per_machine: int) -> None:
    """Stop if there is CUDA, but fewer devices than processes."""
    found = torch.cuda.device_count()
    if torch.cuda.is_available() and per_machine > found:
        raise UserError(f"--num-gpus is {per_machine}, but this machine has {found}")


def _run_under_torchrun(work: Callable, args: argparse.Namespace) -> int:
    rank = int(os.environ["LOCAL_RANK"])
    has_device = torch.cuda.is_available() and rank < torch.cuda.device_count()
    if has_device:
        torch.cuda.set_device(rank)
    # with a device a config may still choose the CPU, so gloo is there in any case
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if has_device else "gloo")
    try:
        return work(args)
    finally:
        torch.distributed.destroy_process_group()


def _run_launched(work: Callable, args: argparse.Namespace) -> int:
    check_gpu_count(args.num_gpus)
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, _pass_on)
    try:
        launch(
            _exit_with_code,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(work, args),
        )
    except ProcessExitedException as ended:  # the process itself has said why
        return ended.exit_code if ended.exit_code > 0 else 128 - ended.exit_code
    return 0


def _exit_with_code(work: Callable, args: argparse.Namespace) -> None:
    os.environ["LOCAL_RANK"] = str(comm.get_local_rank())
    try:
        code = work(args)
    except RuntimeError as error:
        if " by peer" in str(error):  # the connection was closed, or reset
            time.sleep(_PATIENCE)  # the process at its other end is the one that knows why
        raise
    if code:
        exit_now(code)  # the process group's threads may abort a process that ends in order


def _pass_on(signum: int, _frame: Any) -> None:
    for child in multiprocessing.active_children():
        if child.pid is not None:
            os.kill(child.pid, signum)
