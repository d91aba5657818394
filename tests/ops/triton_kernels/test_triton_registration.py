"""What CUDA's dispatch key calls, on CPU tensors in Triton's interpreter."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable

import pytest
import torch

import ops

NAMES = ("deformable_attention", "gaussian_attention")


@pytest.fixture
def registered(interpreted: Callable, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Return what gives an operator's module with interpreted kernels behind it."""

    def get(name: str):
        kernels = interpreted(name)
        package = importlib.import_module("ops.triton_kernels")
        monkeypatch.setattr(package, name, kernels, raising=False)
        monkeypatch.setitem(sys.modules, f"ops.triton_kernels.{name}", kernels)
        return importlib.import_module(f"ops.{name}")

    return get


@pytest.mark.parametrize("deterministic", [False, True])
def test_deformable_attention_equals_the_cpu(registered: Callable, deterministic: bool) -> None:
    module = registered("deformable_attention")
    torch.manual_seed(0)
    value = torch.randn(2, 3, 17, 4).transpose(1, 2).requires_grad_()  # not contiguous
    locations = torch.rand(2, 5, 3, 2, 2, 2, requires_grad=True)
    weights = torch.rand(2, 5, 3, 2, 2, requires_grad=True)
    sizes = [3, 5, 2, 1]
    output = module._triton_forward(value.detach(), sizes, locations.detach(), weights.detach())
    expected = ops.multi_scale_deformable_attention(value, [(3, 5), (2, 1)], locations, weights)
    torch.testing.assert_close(output, expected)
    grad = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, (value, locations, weights), grad)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(deterministic)
    try:
        found = module._triton_backward(
            grad, value.detach(), sizes, locations.detach(), weights.detach()
        )
    finally:
        torch.use_deterministic_algorithms(before)
    torch.testing.assert_close(tuple(found), wanted)
    with pytest.raises(ValueError, match="spatial_shapes has 20 cells"):
        module._triton_forward(value.detach(), [3, 6, 2, 1], locations, weights)
    with pytest.raises(ValueError, match="grad_output has shape"):
        module._triton_backward(grad[:1], value.detach(), sizes, locations, weights)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gaussian_attention_equals_the_cpu(registered: Callable, dropout: float) -> None:
    module = registered("gaussian_attention")
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, n, 8) for n in (5, 12, 12))
    centers, precision = torch.rand(2, 1, 5, 2) * 3, torch.rand(2, 3, 5, 2)
    mask = torch.zeros(12, 2, dtype=torch.bool).T
    mask[1, 5:] = True
    seed = torch.tensor([123456789012]) if dropout else None
    given = (query, key, value, 4, centers, precision, mask, 0.3, dropout, seed)
    output, logsumexp = module._triton_forward(*given)
    operators = torch.ops.detr_methods
    expected, its_logsumexp = operators.gaussian_attention(*given)  # each backend has its own sums
    torch.testing.assert_close(output, expected)
    grad = torch.randn_like(output)
    others = (query, key, value, output, logsumexp, *given[3:])
    found = module._triton_backward(grad, *others)
    wanted = operators.gaussian_attention_backward(
        grad, query, key, value, expected, its_logsumexp, *given[3:]
    )
    torch.testing.assert_close(tuple(found), wanted)
    with pytest.raises(ValueError, match="spatial_shape is"):
        module._triton_forward(query, key, value, 5, *given[4:])
    with pytest.raises(ValueError, match="grad_output has shape"):
        module._triton_backward(grad[..., :4], *others)
