"""Index streams that are shared out between processes."""

from .distributed_sampler import InferenceSampler, RandomSubsetTrainingSampler, TrainingSampler

__all__ = ["InferenceSampler", "RandomSubsetTrainingSampler", "TrainingSampler"]
