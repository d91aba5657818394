"""A transformer's feed-forward network, for many tokens on the CPU as one operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .dropout import draw_seed, relu_dropout, relu_gradient_
from .linear_layer import as_image, as_tokens, is_faster_as_convolution, linear
from .pixel_convolution import gradients


def relu_feed_forward(
    tokens: Tensor,
    hidden: tuple[Tensor, Tensor | None],
    output: tuple[Tensor, Tensor | None],
    p: float = 0.1,
    training: bool = True,
    keep_hidden: bool = True,
) -> Tensor:
    """``linear(relu_dropout(linear(tokens)))``, in the backward pass with one hidden layer less.

    Where both layers are convolutions, see :func:`linear`, the hidden layer's gradient is
    overwritten as it passes the activation, and its sum, the bias's gradient, comes from the same
    pass. Anywhere else, and where no gradient is asked for, this is the three operators.

    Args:
        tokens: (..., C).
        hidden: weight (F, C) and bias (F,) or None of the first layer.
        output: weight (N, F) and bias (N,) or None of the second.
        p: probability with which an element of the hidden layer is dropped, below 1.
        training: whether anything is dropped.
        keep_hidden: if not, one operator computes the hidden layer again in the backward pass; the
            three keep it.

    Returns:
        (..., N).

    Raises:
        ValueError: if p is no probability below 1.
        TypeError: if the hidden layer is not floating.
    """
    if is_one_operator(tokens, hidden[0], output[0]):
        return _FeedForward.apply(tokens, *hidden, *output, p if training else 0.0, keep_hidden)
    values = relu_dropout(linear(tokens, *hidden), p, training, inplace=True)
    return linear(values, *output)


def is_one_operator(tokens: Tensor, *weights: Tensor) -> bool:
    """Whether :func:`relu_feed_forward` with these weights gains anything as one."""
    return (
        torch.is_grad_enabled()
        and all(is_faster_as_convolution(tokens, weight) for weight in weights)
        and not torch._C._are_functorch_transforms_active()
    )


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        output_weight: Tensor,
        output_bias: Tensor | None,
        p: float,
        keep_hidden: bool,
    ) -> Tensor:
        seed = draw_seed() if p > 0 else None
        hidden = relu_dropout(linear(tokens, weight, bias), p, inplace=True, seed=seed)
        kept = hidden if keep_hidden else None
        ctx.save_for_backward(tokens, weight, bias, kept, output_weight, seed)
        ctx.p = p
        return linear(hidden, output_weight, output_bias)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        tokens, weight, bias, hidden, output_weight, seed = ctx.saved_tensors
        if hidden is None:
            with torch.no_grad(), torch.autocast("cpu", enabled=False):  # as forward
                hidden = relu_dropout(linear(tokens, weight, bias), ctx.p, inplace=True, seed=seed)
        if torch.is_grad_enabled() or _is_mapped(grad_output):
            saved = tokens, weight, bias, hidden, output_weight
            found = _differentiable_gradients(grad_output, *saved, ctx.p)
            needed = ctx.needs_input_grad
            asked = (x if need else None for x, need in zip(found, needed, strict=False))
            return *asked, None, None
        for_tokens, for_weight, for_bias, *for_output = ctx.needs_input_grad[:5]
        before = for_tokens or for_weight or for_bias
        grad_hidden, *of_output = _gradients(
            grad_output, hidden, output_weight, (before, *for_output)
        )
        if grad_hidden is None:
            return None, None, None, *of_output, None, None
        of_bias = relu_gradient_(grad_hidden, hidden, ctx.p)
        needed = for_tokens, for_weight, False
        grad_tokens, of_weight, _ = _gradients(grad_hidden, tokens, weight, needed)
        return grad_tokens, of_weight, of_bias if for_bias else None, *of_output, None, None


def _is_mapped(grad: Tensor) -> bool:
    """Whether a gradient stands for a batch of them, of PyTorch's newer or older kind."""
    batched = torch._C._functorch
    return batched.is_batchedtensor(grad) or batched.is_legacy_batchedtensor(grad)


def _gradients(
    grad_output: Tensor, tokens: Tensor, weight: Tensor, needed: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Of a linear layer's tokens (..., K), weight (N, K) and bias (N,), as far as needed."""
    of_image, of_weight, of_bias = gradients(
        as_image(grad_output), as_image(tokens), weight[:, :, None, None], needed
    )
    of_tokens = None if of_image is None else as_tokens(of_image, tokens)
    return of_tokens, None if of_weight is None else of_weight[:, :, 0, 0], of_bias


def _differentiable_gradients(
    grad_output: Tensor,
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    hidden: Tensor,
    output_weight: Tensor,
    p: float,
) -> tuple[Tensor, ...]:
    """Those of tokens, weights and biases, by what autograd and ``torch.vmap`` see through."""
    factor = (hidden <= 0).logical_not().to(hidden.dtype) / (1 - p)  # also lets NaN through
    hidden = linear(tokens, weight, bias) * factor  # the saved one does not know its inputs
    grad_hidden = grad_output @ output_weight * factor
    rows, grad_rows, hidden_rows, grad_hidden_rows = (
        x.reshape(-1, x.shape[-1]) for x in (tokens, grad_output, hidden, grad_hidden)
    )
    return (
        grad_hidden @ weight,
        grad_hidden_rows.T @ rows,
        grad_hidden_rows.sum(0),
        grad_rows.T @ hidden_rows,
        grad_rows.sum(0),
    )
