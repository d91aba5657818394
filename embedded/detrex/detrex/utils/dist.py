"""Facts about the process group that also hold without one."""

import torch.distributed as dist

__all__ = ["get_rank", "get_world_size", "is_dist_avail_and_initialized"]


def is_dist_avail_and_initialized() -> bool:
    """Whether this process belongs to a process group."""
    return dist.is_available() and dist.is_initialized()


def get_world_size() -> int:
    """Return the number of processes; 1 without a process group."""
    return dist.get_world_size() if is_dist_avail_and_initialized() else 1


def get_rank() -> int:
    """Return this process's rank; 0 without a process group."""
    return dist.get_rank() if is_dist_avail_and_initialized() else 0
