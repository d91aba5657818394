"""Parameter groups for optimisers."""

from collections.abc import Callable
from typing import Any

from torch import nn

__all__ = ["get_default_optimizer_params", "reduce_param_groups"]

_NORMS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.LocalResponseNorm,
)


def get_default_optimizer_params(
    model: nn.Module,
    base_lr: float | None = None,
    weight_decay: float | None = None,
    weight_decay_norm: float | None = None,
    bias_lr_factor: float | None = 1.0,
    weight_decay_bias: float | None = None,
    lr_factor_func: Callable[[str], float] | None = None,
    overrides: dict[str, dict[str, float]] | None = None,
) -> list[dict[str, Any]]:
    """Return the trainable parameters of ``model`` as groups of equal hyper-parameters.

    What is not given here is left to the optimiser's own defaults.

    Args:
        model: frozen parameters are left out, shared ones appear once.
        base_lr: learning rate of all groups.
        weight_decay: weight decay of all groups.
        weight_decay_norm: weight decay of the parameters of normalisation layers instead.
        bias_lr_factor: multiple of ``base_lr`` for parameters named ``bias``.
        weight_decay_bias: weight decay of parameters named ``bias`` instead.
        lr_factor_func: maps ``"<module>.<parameter>"`` to a multiple of ``base_lr``; the module of
            a parameter of the model itself is empty.
        overrides: hyper-parameters by the last part of a parameter's name.
    """
    overrides = _with_bias(overrides or {}, base_lr, bias_lr_factor, weight_decay_bias)
    if lr_factor_func is not None and base_lr is None:
        raise ValueError("lr_factor_func is given without base_lr")
    common = {"lr": base_lr, "weight_decay": weight_decay}
    common = {key: value for key, value in common.items() if value is not None}
    seen = set()
    groups: list[dict[str, Any]] = []
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter in seen or not parameter.requires_grad:
                continue
            seen.add(parameter)
            group = {"params": [parameter], **common}
            if weight_decay_norm is not None and isinstance(module, _NORMS):
                group["weight_decay"] = weight_decay_norm
            if lr_factor_func is not None and base_lr is not None:
                group["lr"] = base_lr * lr_factor_func(f"{module_name}.{name}")
            groups.append({**group, **overrides.get(name, {})})
    return reduce_param_groups(groups)


def _with_bias(
    overrides: dict[str, dict[str, float]],
    base_lr: float | None,
    lr_factor: float | None,
    weight_decay: float | None,
) -> dict[str, dict[str, float]]:
    """Add the special settings of biases, if any, to the overrides."""
    bias = {}
    if lr_factor not in (None, 1.0):
        if base_lr is None:
            raise ValueError(f"bias_lr_factor is {lr_factor} without base_lr")
        bias["lr"] = base_lr * lr_factor
    if weight_decay is not None:
        bias["weight_decay"] = weight_decay
    if bias and "bias" in overrides:
        raise ValueError("settings for 'bias' are given twice: in overrides and on their own")
    return {**overrides, "bias": bias} if bias else overrides


def reduce_param_groups(params: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Merge groups of equal hyper-parameters; of a parameter's several groups the last wins.

    Few large groups let optimisers update many tensors in one step.
    """
    settings: dict[Any, dict[str, Any]] = {}  # by parameter, in order of first appearance
    names: dict[Any, str] = {}
    for group in params:
        shared = {k: v for k, v in group.items() if k not in ("params", "param_names")}
        for parameter in group["params"]:
            settings.setdefault(parameter, {}).update(shared)
        names.update(zip(group["params"], group.get("param_names", ()), strict=False))

    merged: dict[tuple, list[Any]] = {}
    for parameter, setting in settings.items():
        merged.setdefault(tuple(setting.items()), []).append(parameter)
    groups = [{**dict(setting), "params": members} for setting, members in merged.items()]
    if names:
        for group in groups:
            group["param_names"] = [names[parameter] for parameter in group["params"]]
    return groups
