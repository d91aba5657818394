"""Small helpers of the detectors."""

from detrex.utils.dist import get_rank, get_world_size, is_dist_avail_and_initialized
from detrex.utils.misc import interpolate, inverse_sigmoid

__all__ = [
    "get_rank",
    "get_world_size",
    "interpolate",
    "inverse_sigmoid",
    "is_dist_avail_and_initialized",
]
