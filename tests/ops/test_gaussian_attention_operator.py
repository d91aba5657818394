"""Gaussian-modulated attention under PyTorch's machinery, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from gaussian_cases import LEAVES, example, with_gradients
from torch import Tensor
from torch.autograd import forward_ad

import ops
from ops import _library

needs_kernels = pytest.mark.skipif(
    _library.COMPILED_PATH is None, reason="the operator is not built"
)


def test_bits_do_not_depend_on_threads_or_runs(compiled: str, threads: None) -> None:
    arguments = example(shape=(13, 20), queries=90, channels=24, dtype=torch.float32)
    results = []
    for count in (1, 2, 4, 4):
        torch.set_num_threads(count)
        results.append(with_gradients(ops.gaussian_attention, arguments))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_kernels
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_operator_is_registered_properly(dtype: torch.dtype, dropout: float) -> None:
    given = example(padded=True, dtype=dtype)
    leaves = [given[name].requires_grad_() for name in LEAVES]
    mask, seed = given["key_padding_mask"], torch.tensor([7])
    forward = torch.ops.detr_methods.gaussian_attention.default
    torch.library.opcheck(forward, (*leaves[:3], 7, *leaves[3:], mask, 0.4, dropout, seed))
    plain = [leaf.detach() for leaf in leaves]
    saved = forward(*plain[:3], 7, *plain[3:], mask, 0.4, dropout, seed)
    backward = torch.ops.detr_methods.gaussian_attention_backward.default
    grad = torch.ones_like(saved[0])
    others = (*plain[:3], *saved, 7, *plain[3:], mask, 0.4, dropout, seed)
    torch.library.opcheck(backward, (grad, *others))


@needs_kernels
def test_transforms_see_through_it() -> None:
    arguments = example(padded=True)
    centers = torch.stack([arguments["centers"], arguments["centers"] + 1])

    def loss(places: Tensor, query: Tensor) -> Tensor:
        changed = arguments | {"centers": places, "query": query}
        return ops.gaussian_attention(**changed).square().sum()

    mapped = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=(0, None))
    found = mapped(centers, arguments["query"])
    for row, place in enumerate(centers):
        leaves = [place.clone().requires_grad_(), arguments["query"].clone().requires_grad_()]
        wanted = torch.autograd.grad(loss(*leaves), leaves)
        torch.testing.assert_close(tuple(part[row] for part in found), wanted)


@needs_kernels
def test_second_derivatives_and_forward_mode_are_refused() -> None:
    arguments = example()

    def loss(query: Tensor) -> Tensor:
        return ops.gaussian_attention(**arguments | {"query": query}).square().sum()

    query = arguments["query"].clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(query), query, create_graph=True)
    assert grad.any()
    with pytest.raises(RuntimeError, match="gaussian_attention has no second derivatives"):
        grad.sum().backward()
    with pytest.raises(RuntimeError, match="gaussian_attention has no second derivatives"):
        torch.func.grad(lambda q: torch.func.grad(loss)(q).sum())(query.detach())
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="jvp"):
        loss(forward_ad.make_dual(query.detach(), torch.ones_like(query)))


@needs_kernels
@pytest.mark.parametrize("randomness", ["same", "different"])
def test_dropout_can_be_mapped(randomness: str) -> None:
    arguments = example()
    several = arguments["query"].expand(3, *arguments["query"].shape)

    def loss(query: Tensor) -> Tensor:
        output = ops.gaussian_attention(**arguments | {"query": query}, dropout_p=0.5)
        return output.square().sum()

    torch.manual_seed(3)
    grads = torch.func.vmap(torch.func.grad(loss), randomness=randomness)(several)
    equal = [torch.equal(grads[0], other) for other in grads[1:]]
    assert equal == [randomness == "same"] * 2
    if randomness == "same":
        torch.manual_seed(3)
        torch.testing.assert_close(torch.func.grad(loss)(several[0]), grads[0])


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_compiles_without_a_graph_break(dropout: float) -> None:
    arguments = example(padded=True)
    compiled = torch.compile(ops.gaussian_attention, fullgraph=True, backend="aot_eager")
    torch.manual_seed(1)
    found = with_gradients(compiled, arguments, dropout_p=dropout)
    torch.manual_seed(1)
    wanted = with_gradients(ops.gaussian_attention, arguments, dropout_p=dropout)
    torch.testing.assert_close(found, wanted)


# --- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": None}, TypeError, "query is NoneType, expected a tensor"),
        ({"key": torch.zeros(2, 3, 35, 4)}, ValueError, r"key has shape .*\(2, 3, \?, 5\)"),
        ({"value": torch.zeros(2, 3, 34, 4)}, ValueError, r"value has shape .*\(2, 3, 35, \?\)"),
        ({"spatial_shape": (5, 6)}, ValueError, r"spatial_shape is \(5, 6\), expected .* S = 35"),
        ({"spatial_shape": (-5, -7)}, ValueError, r"spatial_shape is \(-5, -7\), expected \(h, w"),
        (
            {"centers": torch.zeros(2, 2, 6, 2)},
            ValueError,
            r"centers has shape \(2, 2, 6, 2\), expected \(B, H, N, 2\) = \(2, 3, 6, 2\)",
        ),
        (
            {"precision": torch.zeros(2, 1, 5, 2)},
            ValueError,
            r"precision has shape .*, expected \(B, 1, N, 2\) = \(2, 1, 6, 2\)",
        ),
        (
            {"key": torch.zeros(2, 3, 35, 5).half()},
            TypeError,
            "key has dtype float16, expected float32",
        ),
        (
            {"centers": torch.zeros(2, 3, 6, 2).double()},
            TypeError,
            "centers has dtype float64, expected float32",
        ),
        (
            {"key_padding_mask": torch.zeros(2, 35)},
            TypeError,
            "key_padding_mask has dtype float32, expected bool",
        ),
        (
            {"key_padding_mask": torch.zeros(2, 5, 7, dtype=torch.bool)},
            ValueError,
            r"key_padding_mask has shape \(2, 5, 7\), expected \(B, S\) = \(2, 35\)",
        ),
        (
            {"value": torch.zeros(2, 3, 35, 4, device="meta")},
            ValueError,
            "value is on meta, expected cpu as that of query",
        ),
        ({"dropout_p": 1.5}, ValueError, "dropout_p is 1.5, expected a probability below 1"),
        ({"dropout_p": -0.1}, ValueError, "dropout_p is -0.1, expected"),
    ],
)
def test_bad_input_is_one_line(backend: str, change: dict, error: type, message: str) -> None:
    arguments = example(dtype=torch.float32)
    with pytest.raises(error, match=message) as caught:
        ops.gaussian_attention(**(arguments | change))
    assert "\n" not in str(caught.value)


@needs_kernels
def test_the_raw_operator_reads_nothing_outside_its_tensors() -> None:
    given = example(dtype=torch.float32)
    query, key, value, centers, precision = (given[name] for name in LEAVES)
    operator = torch.ops.detr_methods.gaussian_attention
    with pytest.raises(ValueError, match="do not belong together"):
        operator(query, key[:, :, :3], value, 7, centers, precision, None, 1.0, 0.0, None)
    with pytest.raises(ValueError, match="a map of the given width"):
        operator(query, key, value, 0, centers, precision, None, 1.0, 0.0, None)
    with pytest.raises(ValueError, match="centers and precision need the shape"):
        operator(query, key, value, 7, centers[:, :, :5], precision, None, 1.0, 0.0, None)
    mask = torch.zeros(2, 34, dtype=torch.bool)
    with pytest.raises(ValueError, match="key_padding_mask needs the shape"):
        operator(query, key, value, 7, centers, precision, mask, 1.0, 0.0, None)
    with pytest.raises(ValueError, match="dropout needs a seed"):
        operator(query, key, value, 7, centers, precision, None, 1.0, 0.5, None)
