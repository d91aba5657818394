"""May a layer's weights be used without calling the layer?"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook


def is_watched(*modules: nn.Module) -> bool:
    """Whether calling one of the modules does more than its class says: there are hooks."""
    by_others = _has_any_global_hook() and not torch.compiler.is_exporting()  # which sets its own
    return by_others or any(map(_has_hook, modules))


def _has_hook(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)
    )
