"""Dropout with a counter-based mask: values and gradients, memory, PyTorch's machinery, errors."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from dropout_masks import drawn_seed, mask_of, seeded
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import ops
from ops import _library, dropout
from ops.dropout import relu_gradient_

OPERATORS = torch.ops.detr_methods
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [(), (0, 3), (1,), (37,), (3, 5, 7), (2, 4096), (3, 4099), (131, 700)]


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    return {"rtol": 4 * torch.finfo(dtype).eps, "atol": 4 * torch.finfo(dtype).eps}


# --- values and gradients ------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.1, 0.5, 0.93])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sum_with_dropout_is_the_formula(
    compiled: str, dtype: torch.dtype, shape: tuple[int, ...], p: float
) -> None:
    torch.manual_seed(1)
    values, residual, cotangent = (torch.randn(shape).to(dtype) for _ in range(3))
    inputs = values.requires_grad_(), residual.requires_grad_()
    factor = mask_of(shape, p).double() / (1 - p)
    found = ops.dropout_add(*inputs, p, seed=seeded())
    assert found.dtype == dtype
    expected = residual.double() + values.double() * factor
    torch.testing.assert_close(found.double(), expected, **tolerance(dtype))
    alone = ops.dropout_add(values, p=p, seed=seeded())
    torch.testing.assert_close(alone.double(), values.double() * factor, **tolerance(dtype))
    for_values, for_residual = torch.autograd.grad(found, inputs, cotangent)
    expected = cotangent.double() * factor
    torch.testing.assert_close(for_values.double(), expected, **tolerance(dtype))
    assert torch.equal(for_residual, cotangent)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_relu_with_dropout_is_the_formula(
    compiled: str, dtype: torch.dtype, shape: tuple[int, ...], inplace: bool
) -> None:
    torch.manual_seed(1)
    values, cotangent = (torch.randn(shape).to(dtype) for _ in range(2))
    values.requires_grad_()
    factor = mask_of(shape, 0.3, drawn_seed(4)).double() / (1 - 0.3)
    found = ops.relu_dropout(values.clone(), 0.3, inplace=inplace)
    assert found.dtype == dtype
    expected = values.double().clamp(min=0) * factor
    torch.testing.assert_close(found.double(), expected, **tolerance(dtype))
    (grad,) = torch.autograd.grad(found, values, cotangent)
    expected = cotangent.double() * factor * (values.double() > 0)
    torch.testing.assert_close(grad.double(), expected, **tolerance(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernels_do_what_their_references_do(compiled: str, dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    values, residual = (torch.randn(3, 1500).to(dtype) for _ in range(2))
    arguments = values, 0.2, seeded()
    close = tolerance(dtype)
    for added in (None, residual):
        found = OPERATORS.dropout_add(values, added, 0.2, seeded())
        expected = dropout.reference(values, added, 0.2, seeded())
        torch.testing.assert_close(found, expected, **close)
        if added is None:
            assert torch.equal(found == 0, expected == 0)
    found = OPERATORS.relu_dropout(*arguments)
    assert torch.equal(found, dropout._reference_relu(*arguments))
    given = residual, found, 0.2
    expected = dropout._reference_relu_backward(*given)
    assert torch.equal(OPERATORS.relu_dropout_backward(*given), expected)
    for relu in (False, True):
        found, expected = values.clone(), values.clone()
        OPERATORS.dropout_(found, 0.2, seeded(), relu)
        dropout._reference_in_place(expected, 0.2, seeded(), relu)
        assert torch.equal(found, expected)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(0, 300),
    columns=st.integers(0, 70),
    p=st.floats(0, 0.9),
    wide=st.booleans(),
    transposed=st.booleans(),
)
def test_a_gradient_is_overwritten_and_summed(
    compiled: str, rows: int, columns: int, p: float, wide: bool, transposed: bool
) -> None:
    torch.manual_seed(rows)
    dtype = torch.float64 if wide else torch.float32
    output = torch.randn(2, rows, columns, dtype=dtype).relu()
    grad = torch.randn(2, rows, columns, dtype=dtype)
    if transposed:
        grad = grad.transpose(0, 1).contiguous().transpose(0, 1)
    expected = dropout._reference_relu_backward(grad, output, p)
    sums = relu_gradient_(grad, output, p)
    assert torch.equal(grad, expected)
    exact = expected.double().sum((0, 1))
    torch.testing.assert_close(sums.double(), exact, rtol=1e-5, atol=1e-4 / (1 - p))


def test_gradients_are_summed_in_one_order(compiled: str, threads: None) -> None:
    torch.manual_seed(0)
    output, grad = torch.randn(3001, 40).relu(), torch.randn(3001, 40)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(relu_gradient_(grad.clone(), output, 0.3))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_both_derivatives_agree_with_finite_differences(compiled: str) -> None:
    torch.manual_seed(3)
    values, residual = (torch.randn(4, 5, dtype=torch.float64) for _ in range(2))
    inputs = values.requires_grad_(), residual.requires_grad_()

    def added(x: Tensor, y: Tensor) -> Tensor:
        return ops.dropout_add(x, y, 0.4, seed=seeded())

    def rectified(x: Tensor, inplace: bool) -> Tensor:
        torch.manual_seed(0)
        return ops.relu_dropout(x.clone(), 0.4, inplace=inplace)

    torch.autograd.gradcheck(added, inputs)
    torch.autograd.gradgradcheck(added, inputs)
    for inplace in (False, True):
        torch.autograd.gradcheck(lambda x, i=inplace: rectified(x, i), values)
        torch.autograd.gradgradcheck(lambda x, i=inplace: rectified(x, i), values)


def test_a_tensor_of_another_layout_has_the_same_mask(compiled: str) -> None:
    torch.manual_seed(0)
    dense = torch.randn(6, 10, 8)
    layouts = [
        dense.transpose(0, 2).contiguous().transpose(0, 2),
        torch.randn(6, 10, 16)[..., ::2].copy_(dense),
        dense[:, None].to(memory_format=torch.channels_last)[:, 0],
    ]
    wanted = ops.dropout_add(dense, dense, 0.3, seed=seeded())
    rectified = OPERATORS.relu_dropout(dense, 0.3, seeded())
    for values, residual in itertools.product(layouts, layouts):
        assert torch.equal(ops.dropout_add(values, residual, 0.3, seed=seeded()), wanted)
    for values in layouts:
        assert torch.equal(OPERATORS.relu_dropout(values, 0.3, seeded()), rectified)
        OPERATORS.dropout_(values, 0.3, seeded(), True)
        assert torch.equal(values, rectified)
    leaf = dense.clone().requires_grad_()
    transposed = torch.randn(8, 10, 6).transpose(0, 2)  # the gradient's layout is another one
    found = ops.dropout_add(leaf, p=0.3, seed=seeded())
    (grad,) = torch.autograd.grad(found, leaf, transposed)
    torch.testing.assert_close(grad, transposed * mask_of((6, 10, 8), 0.3) / 0.7)


def test_nan_passes_relu_and_what_is_dropped_is_zero(compiled: str) -> None:
    values = torch.full((100,), float("nan"))
    values[50:] = float("inf")
    dropped = ~mask_of((100,), 0.5)
    for found in (
        ops.dropout_add(values, p=0.5, seed=seeded()),
        OPERATORS.relu_dropout(values, 0.5, seeded()),
    ):
        assert torch.equal(found == 0, dropped)
        assert found[:50][~dropped[:50]].isnan().all()
        assert found[50:][~dropped[50:]].isposinf().all()


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_the_wider_type_is_the_sum_s(low: torch.dtype) -> None:
    torch.manual_seed(0)
    values, residual = torch.randn(50).to(low), torch.randn(50)
    for pair in ((values, residual), (values.float(), residual.to(low))):
        inputs = [x.requires_grad_() for x in pair]
        found = ops.dropout_add(*inputs, 0.5, seed=seeded())
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, pair[1] + 2 * pair[0] * mask_of((50,), 0.5))
        grads = torch.autograd.grad(found.sum(), inputs)
        assert [grad.dtype for grad in grads] == [x.dtype for x in inputs]


# --- memory --------------------------------------------------------------------------------------


def test_a_seed_is_all_that_is_stored() -> None:
    values = torch.randn(64, 32, requires_grad=True)
    stored: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: stored.append(t) or t, lambda t: t):
        ops.dropout_add(values, values, 0.1)
        assert sum(tensor.nbytes for tensor in stored) == 8
        stored.clear()
        result = ops.relu_dropout(values, 0.1)
        assert [tensor.data_ptr() for tensor in stored] == [result.data_ptr()]


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_a_linear_layer_s_output_is_overwritten(p: float) -> None:
    linear, tokens = nn.Linear(8, 12).double(), torch.randn(2, 5, 8, dtype=torch.float64)
    hidden = linear(tokens)
    memory, before = hidden.data_ptr(), hidden.detach().clone()
    factor = mask_of(hidden.shape, p, drawn_seed(0)) / (1 - p)
    found = ops.relu_dropout(hidden, p, inplace=True)
    assert found.data_ptr() == memory
    torch.testing.assert_close(found, before.clamp(min=0) * factor)
    found.square().sum().backward()
    expected = (2 * found * factor).detach()
    torch.testing.assert_close(linear.bias.grad, expected.sum((0, 1)))
    torch.testing.assert_close(linear.weight.grad, torch.einsum("bnc,bnd->cd", expected, tokens))


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_a_parameter_is_not_overwritten_through_a_view(p: float) -> None:
    parameter = nn.Parameter(torch.randn(4, 4))
    before = parameter.detach().clone()
    ops.relu_dropout(parameter.view(16), p, inplace=True)
    assert torch.equal(parameter, before)


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_overwriting_what_another_gradient_needs_is_an_error(p: float) -> None:
    leaf = torch.randn(5, requires_grad=True)
    values = leaf.exp()  # keeps its result
    found = ops.relu_dropout(values, p, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        found.sum().backward()


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_leaves_and_shared_memory_are_never_overwritten(p: float) -> None:
    leaf = torch.full((5,), -1.0, requires_grad=True)
    ops.relu_dropout(leaf, p, inplace=True).sum().backward()
    shared = torch.full((1,), -1.0).expand(5)
    ops.relu_dropout(shared, p, inplace=True)
    for kept in (leaf, shared):
        assert torch.equal(kept, torch.full((5,), -1.0))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: type) -> None:
    with mode():
        values = torch.ones(1000)
        found = ops.relu_dropout(values, 0.5, inplace=True)
        assert found.data_ptr() == values.data_ptr()
        assert set(found.tolist()) == {0.0, 2.0}
        assert set(ops.dropout_add(torch.ones(1000), p=0.5).tolist()) == {0.0, 2.0}


# --- PyTorch's machinery -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_operators_are_registered_properly(dtype: torch.dtype) -> None:
    values, residual = (torch.randn(3, 4).to(dtype).requires_grad_() for _ in range(2))
    for added in (None, residual):
        torch.library.opcheck(OPERATORS.dropout_add.default, (values, added, 0.3, seeded()))
    torch.library.opcheck(OPERATORS.relu_dropout.default, (values, 0.3, seeded()))
    result = OPERATORS.relu_dropout(values, 0.3, seeded()).detach()
    torch.library.opcheck(OPERATORS.relu_dropout_backward.default, (residual, result, 0.3))
    if dtype in (torch.float32, torch.float64):
        in_place = residual.detach().clone(), result, 0.3
        torch.library.opcheck(OPERATORS.relu_dropout_backward_.default, in_place)
    for relu in (False, True):
        in_place = values.detach().clone(), 0.3, seeded(), relu
        torch.library.opcheck(OPERATORS.dropout_.default, in_place)


@pytest.mark.parametrize("training", [False, True])
def test_compiles_without_a_graph_break(training: bool) -> None:
    def run(x: Tensor, y: Tensor) -> Tensor:
        hidden = ops.relu_dropout(x @ y, 0.3, training, inplace=True)
        return ops.dropout_add(hidden, x, 0.3, training)

    inputs = [torch.randn(6, 6, requires_grad=True) for _ in range(2)]
    results = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(1)
        output = function(*inputs)
        results.append((output, *torch.autograd.grad(output.square().sum(), inputs)))
    torch.testing.assert_close(*results)


def test_a_batch_of_gradients_has_one_mask() -> None:
    values = torch.randn(4, 6, requires_grad=True)
    found = (
        ops.dropout_add(values, p=0.5, seed=seeded()),
        OPERATORS.relu_dropout(values, 0.5, seeded()),
    )
    cotangents = torch.randn(3, 4, 6)
    for output in found:
        (batched,) = torch.autograd.grad(
            output, values, cotangents, is_grads_batched=True, retain_graph=True
        )
        for row, cotangent in zip(batched, cotangents, strict=True):
            (grad,) = torch.autograd.grad(output, values, cotangent, retain_graph=True)
            assert torch.equal(row, grad)


def test_transforms_see_through_it() -> None:
    rows, residual = torch.randn(3, 5), torch.randn(5)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return ops.dropout_add(x, y, 0.5, seed=seeded()).square().sum()

    mapped = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=(0, None))
    found = mapped(rows, residual)
    for index, row in enumerate(rows):
        leaves = row.clone().requires_grad_(), residual.clone().requires_grad_()
        wanted = torch.autograd.grad(loss(*leaves), leaves)
        torch.testing.assert_close(tuple(part[index] for part in found), wanted)
    hidden = torch.func.vmap(lambda x: ops.relu_dropout(x, 0.5), randomness="different")
    kept = hidden(torch.ones(4, 64)) > 0
    assert len({tuple(row.tolist()) for row in kept}) == 4


def test_without_the_library_the_masks_are_the_same(tmp_path: Path) -> None:
    script = (
        "import torch, ops\n"
        "torch.manual_seed(3)\n"
        "x = torch.linspace(-1, 1, 61, requires_grad=True)\n"
        "hidden = ops.relu_dropout(x * 2, 0.3, inplace=True)\n"
        "ops.dropout_add(hidden * 3, x, 0.3).square().sum().backward()\n"
        "print(hidden.tolist(), x.grad.tolist())\n"
    )
    outputs = []
    for library in (_library.COMPILED_PATH or "", str(tmp_path / "none.so")):
        result = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", script],
            cwd=Path(__file__).resolve().parents[2],
            env={**os.environ, "DETR_METHODS_OPS": library},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert result.returncode == 0, result.stderr
        numbers = result.stdout.replace("[", " ").replace("]", " ").replace(",", " ").split()
        outputs.append(torch.tensor([float(number) for number in numbers]))
    torch.testing.assert_close(*outputs)
    assert (outputs[0] == 0).sum() > 30


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"values": None}, TypeError, "values is NoneType, expected a tensor"),
        ({"values": torch.ones(3).long()}, TypeError, "values has dtype int64, expected float32"),
        ({"residual": 1.0}, TypeError, "residual is float, expected a tensor"),
        ({"residual": torch.ones(3).long()}, TypeError, "residual has dtype int64, expected fl"),
        ({"residual": torch.ones(1)}, ValueError, r"residual has shape \(1,\), expected \(3,\)"),
        ({"residual": torch.ones(3, device="meta")}, ValueError, "residual is on meta, expected c"),
        ({"p": 1.0}, ValueError, "p is 1.0, expected a probability below 1"),
        ({"p": -0.1}, ValueError, "p is -0.1, expected a probability below 1"),
        ({"p": float("nan")}, ValueError, "p is nan, expected a probability below 1"),
    ],
)
def test_bad_input_is_one_line(change: dict, error: type, message: str) -> None:
    arguments = {"values": torch.ones(3), "residual": torch.ones(3), "p": 0.1}
    for training in (True, False):
        with pytest.raises(error, match=message) as caught:
            ops.dropout_add(**(arguments | change), training=training)
        assert "\n" not in str(caught.value)
    if "residual" not in change:
        del arguments["residual"]
        with pytest.raises(error, match=message):
            ops.relu_dropout(**(arguments | change))


@pytest.mark.skipif(_library.COMPILED_PATH is None, reason="the operator is not built")
def test_the_raw_operators_read_nothing_outside_their_tensors() -> None:
    values = torch.ones(5)
    with pytest.raises(ValueError, match="residual needs the shape and type"):
        OPERATORS.dropout_add(values, values[:4], 0.1, seeded())
    with pytest.raises(ValueError, match="residual needs the shape and type"):
        OPERATORS.dropout_add(values, values.double(), 0.1, seeded())
    with pytest.raises(ValueError, match="seed needs one element of type int64"):
        OPERATORS.dropout_add(values, None, 0.1, torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="seed needs one element of type int64"):
        OPERATORS.relu_dropout(values, 0.1, torch.ones(1))
    with pytest.raises(ValueError, match="p is not a probability below 1"):
        OPERATORS.dropout_(values, 1.0, seeded(), False)
    with pytest.raises(ValueError, match="grad_output needs the shape and type"):
        OPERATORS.relu_dropout_backward(values[:4], values, 0.1)
