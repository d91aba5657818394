"""Normalisation layers and their names in configs."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["FrozenBatchNorm2d", "get_norm"]

_BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


class FrozenBatchNorm2d(nn.Module):
    """Batch normalisation with fixed statistics and affine parameters, all of them buffers.

    A fresh one is the identity.
    """

    _version = 3
    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_features, eps=1e-5):
        super().__init__()
        self.num_features, self.eps = num_features, eps
        identity = {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0 - eps}
        for name, value in identity.items():
            self.register_buffer(name, torch.full((num_features,), value))
        self.register_buffer("num_batches_tracked", None)  # a tensor only when converted from BN

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` of shape (B, C, H, W)."""
        if not x.requires_grad:
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        # With a gradient to compute, batch_norm would also keep what weight and bias would need.
        scale = self.weight * torch.rsqrt(self.running_var + self.eps)
        shift = self.bias - self.running_mean * scale
        scale, shift = (t.to(x.dtype).view(-1, 1, 1) for t in (scale, shift))
        return x * scale + shift

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        counter = prefix + "num_batches_tracked"
        if self.num_batches_tracked is None:
            state_dict.pop(counter, None)
        else:  # checkpoints of frozen layers have no counter
            state_dict.setdefault(counter, self.num_batches_tracked)
        if (local_metadata.get("version") or 0) < 2:  # these had the statistics folded away
            state_dict.setdefault(prefix + "running_mean", torch.zeros_like(self.running_mean))
            state_dict.setdefault(prefix + "running_var", torch.ones_like(self.running_var))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def __repr__(self) -> str:
        return f"FrozenBatchNorm2d(num_features={self.num_features}, eps={self.eps})"

    @classmethod
    def convert_frozen_batchnorm(cls, module):
        """Replace every batch normalisation inside ``module``, in place; return the result."""
        return _replace(module, _BATCH_NORMS, lambda bn: _copy_norm(bn, cls(bn.num_features)))

    @classmethod
    def convert_frozenbatchnorm2d_to_batchnorm2d(cls, module: nn.Module) -> nn.Module:
        """Replace every frozen normalisation inside ``module``, in place; return the result."""
        return _replace(module, cls, lambda bn: _copy_norm(bn, nn.BatchNorm2d(bn.num_features)))


def get_norm(norm, out_channels) -> nn.Module | None:
    """Build the normalisation layer that a config names.

    Args:
        norm: ``"BN"``, ``"SyncBN"``, ``"FrozenBN"``, ``"GN"`` (32 groups), a callable that takes
            the number of channels, or ``None`` or ``""`` for no layer. Other names: KeyError.
        out_channels: number of channels to normalise.
    """
    if norm is None or norm == "":
        return None
    return (_NORMS[norm] if isinstance(norm, str) else norm)(out_channels)


_NORMS: dict[str, Callable[[int], nn.Module]] = {
    "BN": nn.BatchNorm2d,
    "SyncBN": nn.SyncBatchNorm,
    "FrozenBN": FrozenBatchNorm2d,
    "GN": lambda channels: nn.GroupNorm(32, channels),
}


def _replace(module: nn.Module, kinds, convert: Callable) -> nn.Module:
    if isinstance(module, kinds):
        return convert(module)
    for name, child in module.named_children():
        module.add_module(name, _replace(child, kinds, convert))
    return module


def _copy_norm(source: nn.Module, target: nn.Module) -> nn.Module:
    """Copy statistics, affine values (where the source has them), eps and the step counter."""
    for name in ("weight", "bias", "running_mean", "running_var"):
        value = getattr(source, name)
        if value is not None:
            getattr(target, name).data = value.detach().clone()
    target.eps = source.eps
    target.num_batches_tracked = source.num_batches_tracked
    return target
