"""Multi-scale deformable attention against a loop over its formula, recorded numbers and itself."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from deformable_cases import LEVELS, by_formula, example, gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded_cases import close
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

import ops
from ops import _library
from ops.deformable_attention import reference

# --- values and gradients -----------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 5, 16, 32, 72])
def test_output_is_the_formula(backend: str, channels: int) -> None:
    arguments = example(channels=channels)
    expected = by_formula(*arguments)
    torch.testing.assert_close(ops.multi_scale_deformable_attention(*arguments), expected)
    single = example(channels=channels, dtype=torch.float32)
    output = ops.multi_scale_deformable_attention(*single)
    torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    levels=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=4),
    images=st.integers(1, 3),
    queries=st.integers(1, 5),
    heads=st.integers(1, 3),
    channels=st.integers(1, 20),
    points=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_kernels_and_reference_agree(**sizes) -> None:
    arguments = example(**sizes)
    value, levels, locations, weights = arguments
    leaves = [tensor.requires_grad_() for tensor in (value, locations, weights)]
    ours = ops.multi_scale_deformable_attention(leaves[0], levels, *leaves[1:])
    theirs = reference(leaves[0], levels, *leaves[1:])
    torch.testing.assert_close(ours, theirs)
    grad = torch.rand_like(ours)
    torch.testing.assert_close(
        torch.autograd.grad(ours, leaves, grad), torch.autograd.grad(theirs, leaves, grad)
    )


@pytest.mark.parametrize("channels", [1, 3])
def test_gradients_are_finite_differences(backend: str, channels: int) -> None:
    value, levels, locations, weights = example(queries=3, heads=2, channels=channels)
    # the outer edges and points beyond them; a pixel's centre would be a kink
    edges = torch.tensor([0.0, 1.0, -0.01, 1.01, 0.5, -3.0], dtype=torch.float64)
    locations.view(-1)[: len(edges)] = edges
    leaves = [tensor.requires_grad_() for tensor in (value, locations, weights)]
    assert torch.autograd.gradcheck(
        lambda v, x, w: ops.multi_scale_deformable_attention(v, levels, x, w), leaves
    )


@pytest.mark.parametrize("case", ["msda_raw_random", "msda_raw_outside", "msda_raw_borders"])
def test_recorded_outputs_and_gradients(layer_cases, backend: str, case: str) -> None:
    inputs = layer_cases.arrays(case, "in")
    names = ("value", "sampling_locations", "attention_weights")
    leaves = [inputs[name].clone().requires_grad_() for name in names]
    shapes = inputs["value_spatial_shapes"]
    output = ops.multi_scale_deformable_attention(leaves[0], shapes, *leaves[1:])
    close(output, layer_cases.arrays(case, "out")["out"])
    (output * inputs["out_weight"]).sum().backward()
    smooth = ~inputs.get("at_pixel_centre", torch.zeros(output.shape[:0], dtype=torch.bool))
    for name, leaf in zip(names, leaves, strict=True):
        expected = layer_cases.arrays(case, "grad")[name]
        where = smooth[..., None] if name == "sampling_locations" else torch.tensor(True)
        assert leaf.grad is not None
        close(leaf.grad * where, expected * where)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30, -1e30])
def test_a_location_that_is_nowhere_contributes_nothing(backend: str, bad: float) -> None:
    value, levels, locations, weights = example()
    locations[0, 0, 0, 0, 0, 1] = bad
    locations[1, 2, 1, 1, 1, 0] = bad
    without = weights.clone()
    without[0, 0, 0, 0, 0] = without[1, 2, 1, 1, 1] = 0
    output = ops.multi_scale_deformable_attention(value, levels, locations, weights)
    torch.testing.assert_close(output, by_formula(value, levels, locations, without))
    grad_value, grad_locations, grad_weights = gradients(
        (value, levels, locations, weights), torch.ones_like(output)
    )
    assert grad_value.isfinite().all()
    assert grad_weights[0, 0, 0, 0, 0] == 0
    assert (grad_locations[0, 0, 0, 0, 0] == 0).all()
    assert grad_locations.isfinite().all()


def test_values_that_are_not_sampled_do_not_matter(backend: str) -> None:
    value, levels, locations, weights = example(levels=((4, 4),), spread=0.0)
    value[:, [0, 3, 12, 15]] = math.nan  # all locations are the map's centre
    assert ops.multi_scale_deformable_attention(value, levels, locations, weights).isfinite().all()


# --- types and layouts --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("coordinates", ["low", "single", "mixed"])
@pytest.mark.parametrize("channels", [1, 21])
def test_low_precision_rounds_only_inputs_and_outputs(
    backend: str, dtype: torch.dtype, coordinates: str, channels: int
) -> None:
    value, levels, locations, weights = example(channels=channels, queries=40)
    low = {"low": (dtype, dtype), "single": (torch.float32,) * 2, "mixed": (torch.float32, dtype)}
    types = low[coordinates]
    given = value.to(dtype), levels, locations.to(types[0]), weights.to(types[1])
    exact = given[0].double(), levels, given[2].double(), given[3].double()
    output = ops.multi_scale_deformable_attention(*given)
    assert output.dtype == dtype
    epsilon = torch.finfo(dtype).eps
    expected = ops.multi_scale_deformable_attention(*exact)
    torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=epsilon)
    grad = torch.rand_like(output)
    for found, wanted in zip(gradients(given, grad), gradients(exact, grad.double()), strict=True):
        tolerance = epsilon * float(wanted.abs().max())
        torch.testing.assert_close(found.double(), wanted, atol=tolerance, rtol=epsilon)
    assert [g.dtype for g in gradients(given, grad)] == [dtype, *types]


def test_any_layout_will_do(backend: str) -> None:
    value, levels, locations, weights = example()
    expected = by_formula(value, levels, locations, weights)
    strided = (
        value.transpose(1, 3).contiguous().transpose(1, 3),
        locations.flip(-1).contiguous().flip(-1),
        torch.stack([weights, weights], dim=-1)[..., 1],
    )
    output = ops.multi_scale_deformable_attention(strided[0], levels, *strided[1:])
    torch.testing.assert_close(output, expected)
    shared = value[:1].expand_as(value)
    output = ops.multi_scale_deformable_attention(shared, levels, locations, weights)
    torch.testing.assert_close(output, by_formula(shared, levels, locations, weights))
    grad = torch.ones(()).double().expand_as(output)
    found = gradients((strided[0], levels, *strided[1:]), grad)
    wanted = gradients((value, levels, locations, weights), grad.contiguous())
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    "sizes",
    [
        {"queries": 0},
        {"images": 0},
        {"heads": 0},
        {"channels": 0},
        {"points": 0},
        {"levels": ()},
        {"levels": ((0, 3), (2, 2))},
        {"levels": ((0, 0),)},
    ],
)
def test_nothing_in_nothing_out(backend: str, sizes: dict) -> None:
    arguments = example(**sizes)
    value, _, locations, _ = arguments
    output = ops.multi_scale_deformable_attention(*arguments)
    assert output.shape == (len(value), locations.shape[1], value.shape[2] * value.shape[3])
    torch.testing.assert_close(output, by_formula(*arguments).reshape(output.shape))
    found = gradients(arguments, torch.ones_like(output))
    assert [g.shape for g in found] == [t.shape for t in arguments if isinstance(t, Tensor)]
    assert all(g.isfinite().all() for g in found)


@pytest.mark.parametrize("levels", [[[5, 7], [3, 4], [1, 1]], torch.tensor(LEVELS)])
def test_level_sizes_come_as_numbers_or_as_a_tensor(backend: str, levels) -> None:
    value, _, locations, weights = example()
    output = ops.multi_scale_deformable_attention(value, levels, locations, weights)
    torch.testing.assert_close(output, by_formula(value, LEVELS, locations, weights))


def test_autocast_lowers_values_and_keeps_locations(backend: str) -> None:
    arguments = example(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output = ops.multi_scale_deformable_attention(*arguments)
    assert output.dtype == torch.bfloat16
    value, *others = arguments
    expected = ops.multi_scale_deformable_attention(value.bfloat16(), *others)
    torch.testing.assert_close(output, expected, atol=0, rtol=0)


# --- PyTorch's machinery ------------------------------------------------------------------------


needs_kernels = pytest.mark.skipif(
    _library.COMPILED_PATH is None, reason="the operator is not built"
)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_operator_is_registered_properly(dtype: torch.dtype) -> None:
    value, levels, locations, weights = example(dtype=dtype)
    flat = [size for pair in levels for size in pair]
    operators = torch.ops.detr_methods
    forward = operators.multi_scale_deformable_attention
    backward = operators.multi_scale_deformable_attention_backward
    leaves = [tensor.requires_grad_() for tensor in (value, locations, weights)]
    grad = torch.ones(value.shape[0], locations.shape[1], 15, dtype=dtype)
    for overload, shapes in (("default", flat), ("device_shapes", torch.tensor(levels))):
        arguments = leaves[0], shapes, *leaves[1:]
        torch.library.opcheck(getattr(forward, overload), arguments)
        plain = leaves[0].detach(), shapes, *(leaf.detach() for leaf in leaves[1:])
        torch.library.opcheck(getattr(backward, overload), (grad, *plain))


@needs_kernels
def test_transforms_see_through_it() -> None:
    value, levels, locations, weights = example()
    several = torch.stack([locations, locations * 0.9])

    def loss(v: Tensor, x: Tensor, w: Tensor) -> Tensor:
        return ops.multi_scale_deformable_attention(v, levels, x, w).square().sum()

    mapped = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1, 2)), in_dims=(None, 0, None))
    found = mapped(value, several, weights)
    for row, place in enumerate(several):
        leaves = [tensor.detach().requires_grad_() for tensor in (value, place, weights)]
        wanted = torch.autograd.grad(loss(*leaves), leaves)
        torch.testing.assert_close(tuple(part[row] for part in found), wanted)


@needs_kernels
@pytest.mark.parametrize("as_tensor", [False, True])
def test_second_derivatives_are_refused(as_tensor: bool) -> None:
    value, levels, locations, weights = example()
    shapes = torch.tensor(levels) if as_tensor else levels
    value.requires_grad_()

    def loss(v: Tensor) -> Tensor:
        return ops.multi_scale_deformable_attention(v, shapes, locations, weights).square().sum()

    (grad,) = torch.autograd.grad(loss(value), value, create_graph=True)
    assert grad.any()
    refusal = "multi_scale_deformable_attention has no second derivatives"
    with pytest.raises(RuntimeError, match=refusal):
        grad.sum().backward()
    if not as_tensor:  # which no transform looks into
        with pytest.raises(RuntimeError, match=refusal):
            torch.func.grad(lambda v: torch.func.grad(loss)(v).sum())(value.detach())


@needs_kernels
def test_forward_mode_is_refused() -> None:
    value, levels, locations, weights = example()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(value, torch.ones_like(value))
        with pytest.raises(RuntimeError, match="jvp"):
            ops.multi_scale_deformable_attention(dual, levels, locations, weights)


@pytest.mark.parametrize("empty", [(0, 2), (0, 1), (3, 0), (0, 70)])
def test_levels_without_cells_give_nothing(backend: str, empty: tuple[int, int]) -> None:
    value = torch.ones(1, 1, 1, 1)
    locations, weights = torch.full((1, 1, 1, 2, 1, 2), 0.5), torch.ones(1, 1, 1, 2, 1)
    found = ops.multi_scale_deformable_attention(value, [(1, 1), empty], locations, weights)
    assert found.item() == 1


def test_sizes_may_be_numpy_s_and_tensors_without_data() -> None:
    value, levels, locations, weights = example()
    tensors = value, locations, weights
    expected = ops.multi_scale_deformable_attention(value, levels, *tensors[1:])
    found = ops.multi_scale_deformable_attention(value, np.array(levels), *tensors[1:])
    assert torch.equal(found, expected)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) for x in (torch.tensor(levels), *tensors)]
        fake = ops.multi_scale_deformable_attention(fakes[1], fakes[0], *fakes[2:])
    assert (fake.shape, fake.dtype) == (expected.shape, expected.dtype)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_compiles_without_a_graph_break(as_tensor: bool) -> None:
    value, levels, locations, weights = example(dtype=torch.float32)
    shapes = torch.tensor(levels) if as_tensor else levels
    compiled = torch.compile(
        ops.multi_scale_deformable_attention, fullgraph=True, backend="aot_eager"
    )
    leaves = [tensor.requires_grad_() for tensor in (value, locations, weights)]
    output = compiled(leaves[0], shapes, *leaves[1:])
    expected = ops.multi_scale_deformable_attention(leaves[0], levels, *leaves[1:])
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(
        torch.autograd.grad(output.sum(), leaves), torch.autograd.grad(expected.sum(), leaves)
    )


# --- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"value": torch.zeros(2, 3)}, ValueError, r"value has shape \(2, 3\), expected \(B, S, H"),
        ({"value": [1.0]}, TypeError, "value is list, expected a tensor"),
        (
            {"locations": torch.zeros(2, 6, 3, 3, 2, 3)},
            ValueError,
            r"sampling_locations has shape \(2, 6, 3, 3, 2, 3\), expected \(B, N, H, V, P, 2\) = ",
        ),
        (
            {"weights": torch.zeros(2, 6, 3, 3, 4)},
            ValueError,
            r"attention_weights has shape .*, expected .* = \(2, 6, 3, 3, 2\)",
        ),
        ({"levels": ((5, 7), (3, 4))}, ValueError, "spatial_shapes has 2 levels, expected 3 as in"),
        (
            {"levels": ((5, 7), (3, 4), (-1, -1))},
            ValueError,
            r"spatial_shapes has \(-1, -1\) at level 2, expected sizes >= 0",
        ),
        (
            {"levels": ((5, 7), (3, 4), (1, 2))},
            ValueError,
            "spatial_shapes has 49 cells in all, expected S = 48 as in value",
        ),
        ({"levels": 7}, ValueError, "spatial_shapes is 7, expected a sequence of pairs"),
        ({"levels": ((5.0, 7), (3, 4), (1, 1))}, TypeError, "spatial_shapes holds 5.0, expected"),
        (
            {"levels": torch.zeros(3, 3, dtype=torch.int64)},
            ValueError,
            r"spatial_shapes has shape \(3, 3\), expected \(V, 2\) = \(3, 2\)",
        ),
        (
            {"levels": torch.zeros(3, 2)},
            TypeError,
            "spatial_shapes has dtype float32, expected int",
        ),
        (
            {"value": torch.zeros(2, 48, 3, 5, dtype=torch.int64)},
            TypeError,
            "value has dtype int64, expected float32 or float64 or bfloat16 or float16",
        ),
        (
            {"weights": torch.zeros(2, 6, 3, 3, 2, dtype=torch.float16)},
            TypeError,
            "attention_weights has dtype float16, expected float32",
        ),
        (
            {"weights": torch.zeros(2, 6, 3, 3, 2, device="meta")},
            ValueError,
            "attention_weights is on meta, expected cpu as that of value",
        ),
    ],
)
def test_bad_input_is_one_line(backend: str, change: dict, error: type, message: str) -> None:
    names = ("value", "levels", "locations", "weights")
    arguments = dict(zip(names, example(dtype=torch.float32), strict=True)) | change
    with pytest.raises(error, match=message) as caught:
        ops.multi_scale_deformable_attention(*arguments.values())
    assert "\n" not in str(caught.value)
