"""Are the settings of a run in range?"""

import math
from typing import Any

import torch
from detectron2.utils import comm
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from .building import construction
from .errors import UserError
from .trainer import autocast_dtype

__all__ = ["check_groups", "check_settings", "require_settings", "resolve_device"]

# What every run reads, below `train`.
_READ = (
    "amp.enabled",
    "amp.dtype",
    "channels_last",
    "compile.enabled",
    "compile.options",
    "device",
    "model_ema.enabled",
    "model_ema.decay",
    "model_ema.use_ema_weights_for_eval_only",
    "seed",
)
# What a training reads besides.
_READ_IN_TRAINING = (
    "accumulation_steps",
    "checkpointer.period",
    "clip_grad.enabled",
    "clip_grad.params",
    "ddp",
    "eval_period",
    "init_partial",
    "log_period",
    "max_iter",
)


def require_settings(config: DictConfig, *, training: bool) -> None:
    """Stop if a setting that the run reads is missing or null.

    Raises:
        UserError: names it.
    """
    keys = [f"train.{key}" for key in _READ + (_READ_IN_TRAINING if training else ())]
    keys += ["evaluation", "dataloader.test", *(["dataloader.train"] if training else [])]
    for key in keys:
        try:
            value = OmegaConf.select(config, key)
        except OmegaConfBaseException as error:  # it refers to what is not there
            raise UserError(f"{key}: {str(error).splitlines()[0]}") from error
        if value is None:
            raise UserError(f"{key} is missing or null, expected a value")
    for key in ("dataloader.test", "dataloader.train"):
        node = OmegaConf.select(config, key)
        if node is not None and not (isinstance(node, DictConfig) and "_target_" in node):
            raise UserError(f"{key} is {node}, expected a call with _target_")


def resolve_device(device: str, key: str = "train.device") -> str:
    """Return the device that the setting ``key`` asks for; "auto" takes CUDA where there is one."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except (RuntimeError, TypeError):
        kind = ""
    if kind not in ("cpu", "cuda"):
        raise UserError(f"{key} is '{device}', expected auto, cpu or cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError(f"{key} is '{device}', but this machine has no CUDA: use cpu")
    return device


def check_settings(config: DictConfig) -> None:
    """Stop if a training setting is out of range."""
    settings = config.train
    if "wandb" in settings and settings.wandb.enabled:
        raise UserError("train.wandb.enabled is True, but only TensorBoard and metrics.json exist")
    autocast_dtype(settings.amp.enabled, settings.amp.dtype, settings.device)
    for key, value in (
        ("max_iter", settings.max_iter),
        ("log_period", settings.log_period),
        ("eval_period", settings.eval_period),
        ("accumulation_steps", settings.accumulation_steps),
        ("checkpointer.period", settings.checkpointer.period),
        ("checkpointer.max_to_keep", settings.checkpointer.get("max_to_keep")),
    ):
        if value is None and key == "checkpointer.max_to_keep":
            continue
        if not isinstance(value, int):
            raise UserError(f"train.{key} is {value}, expected a whole number")
        if value < 1 and key != "eval_period":
            raise UserError(f"train.{key} is {value}, expected at least 1")
    check_seed(settings.seed)
    if settings.clip_grad.enabled:
        check_clipping(settings.clip_grad.params)
    if settings.model_ema.enabled:
        check_averaging(settings.model_ema)


def check_seed(seed: Any) -> None:
    """Stop if some process's seed, ``train.seed`` plus its rank, is beyond numpy's 32 bits."""
    highest = 2**32 - comm.get_world_size()
    if not isinstance(seed, int) or seed > highest:
        raise UserError(f"train.seed is {seed}, expected a whole number up to {highest}")


def check_clipping(options: DictConfig) -> None:
    """Stop if gradients cannot be clipped as ``train.clip_grad.params`` says."""
    limit = options.get("max_norm")
    if not isinstance(limit, int | float) or not limit > 0:  # NaN is not above 0 either
        raise UserError(f"train.clip_grad.params.max_norm is {limit}, expected above 0")
    weight = nn.Parameter(torch.zeros(1))
    weight.grad = torch.zeros(1)
    with construction("the gradient clipping of train.clip_grad.params"):
        torch.nn.utils.clip_grad_norm_([weight], **{str(key): options[key] for key in options})


def check_groups(optimizer: torch.optim.Optimizer) -> None:
    """Stop if a group of parameters has a learning rate or weight decay that is no number."""
    for group in optimizer.param_groups:
        for key in ("lr", "weight_decay"):
            value = group.get(key, 0.0)
            if not isinstance(value, int | float | torch.Tensor):
                raise UserError(f"the optimizer has the {key} {value!r}, expected a number")


def check_averaging(settings: DictConfig) -> None:
    """Stop if weights cannot be averaged as ``train.model_ema`` says."""
    decay = settings.decay
    if not isinstance(decay, int | float) or math.isnan(decay) or not 0 <= decay <= 1:
        raise UserError(f"train.model_ema.decay is {decay}, expected 0 to 1")
    if settings.get("device"):
        resolve_device(settings.device, "train.model_ema.device")
