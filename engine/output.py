"""The output folder of a run: log, config, and what an earlier run has left there."""

import argparse
import itertools
import logging
from collections.abc import Callable
from pathlib import Path

import torch
from detectron2.config import LazyConfig
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger
from omegaconf import DictConfig

from .errors import LocalError, UserError
from .hooks import lost_records, truncate_metrics
from .reproduce import save_snapshot
from .trainer import DistillationTrainer, unwrap

__all__ = ["create_output", "prepare_output", "save_config", "setup_run", "snapshot_writer"]

logger = logging.getLogger(__name__)


def create_output(config: DictConfig) -> None:
    """Create ``train.output_dir`` and log into it.

    Raises:
        UserError: it is not set or cannot be created.
    """
    folder = config.train.output_dir
    if not folder or not isinstance(folder, str):
        raise UserError(f"train.output_dir is {folder!r}, expected a folder")
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create train.output_dir {folder}: {error.strerror}") from error
    for name in ("engine", "detectors", "detrex", "projects"):
        setup_logger(folder, distributed_rank=comm.get_rank(), name=name)


def setup_run(config: DictConfig, args: argparse.Namespace) -> None:
    """Log what is run, seed this process, choose cuDNN's way: detectron2's default_setup.

    Unlike that it saves no config, which would replace an earlier run's before anything is built.
    """
    folder, rank = config.train.output_dir, comm.get_rank()
    for name in ("detectron2", "fvcore"):
        setup_logger(folder, distributed_rank=rank, name=name)
    logger.info("Environment:\n%s", collect_env_info())
    logger.info("Started with %s", args)
    text = Path(args.config_file).read_text(encoding="utf-8")
    logger.info("The config file %s reads:\n%s", args.config_file, text)
    seed_all_rng(config.train.seed + rank)
    if not args.eval_only:  # images of ever new sizes would each be benchmarked
        torch.backends.cudnn.benchmark = config.train.get("cudnn_benchmark", False)


def save_config(config: DictConfig, name: str) -> None:
    """Write the config to a file in the output folder, once for all processes."""
    if comm.is_main_process():
        path = Path(config.train.output_dir, name)
        try:
            LazyConfig.save(config, str(path))
        except OSError as error:
            raise LocalError(f"cannot write {path}: {error.strerror}") from error


def prepare_output(config: DictConfig, start: int) -> tuple[bool, bool]:
    """Make the folder that of this run, once all that can be refused has been.

    Removes from metrics.json what will be written again or sets an earlier run's files aside, then
    saves the config.

    Returns:
        whether an interruption has prevented the log line, and the evaluation, of the iteration
        before ``start``.
    """
    folder = Path(config.train.output_dir)
    no_line, no_evaluation = False, False
    if comm.is_main_process():
        if start:
            truncate_metrics(folder / "metrics.json", start)
            no_line, no_evaluation = lost_records(folder / "metrics.json", start - 1)
        else:
            set_aside(folder)
        save_config(config, "config.yaml")
    due = start % config.train.log_period == 0 or start == config.train.max_iter
    no_line, no_evaluation = comm.all_gather((no_line and due, no_evaluation))[0]
    return no_line, no_evaluation


def set_aside(folder: Path) -> None:
    """Move the results of an earlier run to the first free of previous, previous-2, …"""
    patterns = ["model_*.pth", "nonfinite_*.pth", "last_checkpoint", "metrics.json", "events.*"]
    patterns.append("config*.yaml")
    files = [path for pattern in patterns for path in folder.glob(pattern)]
    if not files:
        return
    names = itertools.chain(["previous"], (f"previous-{count}" for count in itertools.count(2)))
    previous = next(folder / name for name in names if not (folder / name).exists())
    previous.mkdir()
    for path in files:
        path.rename(previous / path.name)
    logger.info("Starting anew: the earlier run's files are now in %s", previous)


def snapshot_writer(folder: str, trainer: DistillationTrainer) -> Callable[[int, dict], str]:
    """Return a function that keeps what reproduces a step whose loss is not finite."""

    def write(iteration: int, snapshot: dict) -> str:
        path = Path(folder, f"nonfinite_{iteration:07d}.pth")
        model = unwrap(trainer.model).state_dict()
        state = {"model": model, "trainer": trainer.state_dict(), **snapshot}
        save_snapshot(state, path)
        return str(path)

    return write
