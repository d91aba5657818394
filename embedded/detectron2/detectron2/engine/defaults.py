"""What most training programs do the same way: command line, logging, seeds, writers, DDP."""

import argparse
import logging
import os
import sys

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from detectron2.config import LazyConfig
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import (
    CommonMetricPrinter,
    EventWriter,
    JSONWriter,
    TensorboardXWriter,
)
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import setup_logger

__all__ = ["create_ddp_model", "default_argument_parser", "default_setup", "default_writers"]


def create_ddp_model(model: nn.Module, *, fp16_compression: bool = False, **kwargs) -> nn.Module:
    """Wrap the model for training in several processes; return it as it is if there is only one.

    Args:
        model: on this process's device.
        fp16_compression: exchange gradients in half precision.
        **kwargs: further arguments of ``DistributedDataParallel``.
    """
    if comm.get_world_size() == 1:
        return model
    if next(model.parameters()).is_cuda:
        kwargs.setdefault("device_ids", [comm.get_local_rank()])
    ddp = DistributedDataParallel(model, **kwargs)
    if fp16_compression:
        ddp.register_comm_hook(state=None, hook=fp16_compress_hook)
    return ddp


def default_argument_parser(epilog: str | None = None) -> argparse.ArgumentParser:
    """Build the parser of detectron2's command line.

    Args:
        epilog: text after the help; by default it shows examples.
    """
    program = sys.argv[0]
    examples = f"""
Examples:
  train on 8 GPUs:          {program} --config-file cfg.py --num-gpus 8
  change settings:          {program} --config-file cfg.py train.max_iter=1000 optimizer.lr=0.001
  evaluate a checkpoint:    {program} --config-file cfg.py --eval-only train.init_checkpoint=a.pth
  on the first of 2 hosts:  {program} --num-machines 2 --machine-rank 0 --dist-url tcp://HOST:PORT
"""
    parser = argparse.ArgumentParser(
        epilog=epilog or examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--config-file", default="", metavar="FILE", help="the config to run")
    add("--resume", action="store_true", help="continue from the last checkpoint in the output dir")
    add("--eval-only", action="store_true", help="evaluate and do not train")
    add("--num-gpus", type=int, default=1, help="processes per machine, one GPU each if present")
    add("--num-machines", type=int, default=1, help="number of machines")
    add("--machine-rank", type=int, default=0, help="index of this machine, from 0")
    add("--dist-url", default=_default_dist_url(), help="where the processes meet (or 'auto')")
    add(
        "opts",
        nargs=argparse.REMAINDER,
        help="settings to change, as path.to.key=value; must come after all options",
    )
    return parser


def _default_dist_url() -> str:
    """One port per user: a forgotten run shows as an occupied port, and users do not collide."""
    first, count = 49152, 16384  # the range for private use
    user = os.getuid() if hasattr(os, "getuid") else 1
    return f"tcp://127.0.0.1:{first + user % count}"


def default_setup(cfg: DictConfig, args: argparse.Namespace) -> None:
    """Prepare a run: output folder, loggers, a record of what is run, random seeds, cuDNN.

    Args:
        cfg: ``train.output_dir`` receives the log and ``config.yaml`` (nothing is written if it
            is empty); ``train.seed`` + rank seeds this process, negative or absent draws a seed;
            ``train.cudnn_benchmark`` applies to training only.
        args: logged; ``config_file`` and ``eval_only`` are looked at if present.
    """
    output_dir = OmegaConf.select(cfg, "train.output_dir") or None
    if output_dir and comm.is_main_process():
        PathManager.mkdirs(output_dir)

    rank = comm.get_rank()
    setup_logger(output_dir, distributed_rank=rank, name="fvcore")
    logger = setup_logger(output_dir, distributed_rank=rank)
    _log_run(logger, args)
    if output_dir and comm.is_main_process():
        path = os.path.join(output_dir, "config.yaml")
        LazyConfig.save(cfg, path)
        logger.info(f"The config with all settings is in {path}")

    seed = OmegaConf.select(cfg, "train.seed", default=-1)
    seed_all_rng(seed + rank if seed >= 0 else None)
    if not getattr(args, "eval_only", False):
        # Images of an evaluation come in ever new sizes, each of which would be benchmarked.
        benchmark = OmegaConf.select(cfg, "train.cudnn_benchmark", default=False)
        torch.backends.cudnn.benchmark = benchmark


def _log_run(logger: logging.Logger, args: argparse.Namespace) -> None:
    logger.info(f"This is process {comm.get_rank()} of {comm.get_world_size()}, counted from 0")
    logger.info(f"Environment:\n{collect_env_info()}")
    logger.info(f"Started with {args}")
    if config_file := getattr(args, "config_file", ""):
        with PathManager.open(config_file, "r") as file:
            logger.info(f"The config file {config_file} reads:\n{file.read()}")


def default_writers(output_dir: str, max_iter: int | None = None) -> list[EventWriter]:
    """Build writers for the terminal, ``metrics.json`` and TensorBoard.

    Args:
        output_dir: folder for the files, created if missing.
        max_iter: last iteration, to estimate the time left.
    """
    terminal = CommonMetricPrinter(max_iter)
    PathManager.mkdirs(output_dir)
    metrics_file = os.path.join(output_dir, "metrics.json")
    return [terminal, JSONWriter(metrics_file), TensorboardXWriter(output_dir)]
