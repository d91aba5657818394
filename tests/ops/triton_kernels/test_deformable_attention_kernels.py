"""The Triton kernels of multi-scale deformable attention, interpreted on the CPU and compiled."""

from __future__ import annotations

import re
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

Shapes = tuple[tuple[int, int], ...]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


class Inputs(NamedTuple):
    value: Tensor
    shapes: Shapes
    locations: Tensor
    weights: Tensor


@pytest.fixture
def kernels(interpreted) -> ModuleType:
    return interpreted("deformable_attention")


def make_inputs(
    shapes: Shapes = ((5, 7), (3, 4)),
    images: int = 2,
    queries: int = 5,
    heads: int = 2,
    channels: int = 8,
    points: int = 2,
    dtype: torch.dtype = torch.float32,
    location_dtype: torch.dtype | None = None,
) -> Inputs:
    """Return random inputs whose points lie in the levels, on their borders and beyond.

    No point is close to a pixel's centre line, where the gradient jumps.
    """
    location_dtype = location_dtype or dtype
    generator = torch.Generator().manual_seed(len(shapes) + channels)
    sample = (images, queries, heads, len(shapes), points)
    sizes = torch.tensor(shapes, dtype=torch.float64).view(-1, 1, 2).flip(-1)
    whole = torch.floor(torch.rand(*sample, 2, generator=generator) * (sizes + 4)) - 2
    rest = 0.1 + 0.8 * torch.rand(*sample, 2, generator=generator)
    tokens = sum(height * width for height, width in shapes)
    return Inputs(
        torch.randn(images, tokens, heads, channels, generator=generator).to(dtype),
        shapes,
        ((whole + rest + 0.5) / sizes).to(location_dtype),
        torch.rand(sample, generator=generator).to(location_dtype),
    )


def expected_output(inputs: Inputs) -> Tensor:
    """Return the operator in float64: every pixel, times the tent around it at the location."""
    value, locations, weights = (t.double() for t in (inputs.value, *inputs[2:]))
    output = value.new_zeros(*locations.shape[:3], value.shape[3])
    start = 0
    for level, (height, width) in enumerate(inputs.shapes):
        x, y = (locations[:, :, :, level] * value.new_tensor([width, height]) - 0.5).unbind(-1)
        counts = (x > -1) & (x < width) & (y > -1) & (y < height)
        tent_x = tent(x.where(counts, -1), width)
        tent_y = tent(y.where(counts, -1), height)
        weight = weights[:, :, :, level].where(counts, 0)
        image = value[:, start : start + height * width].unflatten(1, (height, width))
        output = output + torch.einsum(
            "bnhp,bnhpy,bnhpx,byxhd->bnhd", weight, tent_y, tent_x, image
        )
        start += height * width
    return output.flatten(2)


def tent(coordinate: Tensor, size: int) -> Tensor:
    return (1 - (coordinate[..., None] - torch.arange(size)).abs()).clamp(min=0)


def expected_gradients(inputs: Inputs, grad_output: Tensor) -> tuple[Tensor, ...]:
    leaves = [t.double().requires_grad_() for t in (inputs.value, *inputs[2:])]
    output = expected_output(Inputs(leaves[0], inputs.shapes, *leaves[1:]))
    return torch.autograd.grad(output, leaves, grad_output.double())


def grad_like(inputs: Inputs) -> Tensor:
    images, queries, heads = inputs.locations.shape[:3]
    generator = torch.Generator().manual_seed(1)
    shape = (images, queries, heads * inputs.value.shape[3])
    return torch.randn(shape, generator=generator).to(inputs.value.dtype)


def assert_matches(kernels: ModuleType, inputs: Inputs) -> None:
    """Compare the output and both ways to the gradients with the formula in float64."""
    output = kernels.forward(*inputs)
    assert_near(output, expected_output(inputs), inputs.value.dtype)
    grad_output = grad_like(inputs)
    expected = expected_gradients(inputs, grad_output)
    for deterministic in (False, True):
        gradients = kernels.backward(grad_output, *inputs, deterministic)
        for actual, wanted, leaf in zip(gradients, expected, (inputs[0], *inputs[2:]), strict=True):
            assert_near(actual, wanted, leaf.dtype)


def assert_near(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert actual.dtype == dtype
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    tolerance = TOLERANCE[dtype]
    assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance / 4 * scale)


# --- numbers, interpreted -------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("channels", [4, 8, 32, 40])
def test_every_width_matches_the_formula(kernels, channels: int, heads: int) -> None:
    assert_matches(kernels, make_inputs(channels=channels, heads=heads))


@pytest.mark.parametrize(
    "shapes", [((5, 7),), ((1, 1),), ((1, 9), (6, 1), (3, 3)), ((0, 4), (3, 3))]
)
@pytest.mark.parametrize("points", [1, 3])
def test_every_layout_of_levels_matches_the_formula(kernels, shapes: Shapes, points: int) -> None:
    inputs = make_inputs(shapes, points=points)
    assert_matches(kernels, inputs._replace(locations=inputs.locations.nan_to_num(0.3, 0.3, 0.3)))


@pytest.mark.parametrize(
    ("dtype", "location_dtype"),
    [
        (torch.float64, torch.float64),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_every_dtype_matches_the_formula(kernels, dtype, location_dtype) -> None:
    assert_matches(kernels, make_inputs(dtype=dtype, location_dtype=location_dtype))


def test_more_queries_than_a_tile_match_the_formula(kernels) -> None:
    inputs = make_inputs(images=1, queries=19, channels=32)
    assert kernels._grid(inputs.locations, kernels._tiling(inputs.value, torch.float32))[0] == 6
    assert_matches(kernels, inputs)


@pytest.mark.parametrize("shape", [(0, 5, 2, 2), (2, 0, 2, 2), (2, 5, 0, 2), (2, 5, 2, 0)])
def test_empty_inputs_give_zeros(kernels, shape: tuple[int, int, int, int]) -> None:
    images, queries, levels, points = shape
    inputs = make_inputs(((3, 4),) * levels, images, queries, points=points)
    value = inputs.value if levels else torch.zeros(2, 0, 2, 8)
    inputs = inputs._replace(value=value)
    assert torch.equal(kernels.forward(*inputs), torch.zeros(images, queries, 16))
    for deterministic in (False, True):
        gradients = kernels.backward(grad_like(inputs), *inputs, deterministic)
        for gradient, leaf in zip(gradients, (inputs[0], *inputs[2:]), strict=True):
            assert torch.equal(gradient, torch.zeros_like(leaf))


def test_levels_without_pixels_give_zeros(kernels) -> None:
    inputs = make_inputs(((3, 4),))._replace(shapes=((0, 4),), value=torch.zeros(2, 0, 2, 8))
    assert torch.equal(kernels.forward(*inputs), torch.zeros(2, 5, 16))
    gradients = kernels.backward(grad_like(inputs), *inputs, False)
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("where", [float("nan"), float("inf"), -float("inf"), -0.125, 1.125, 1e30])
def test_points_that_do_not_count_are_as_if_absent(kernels, where: float, deterministic) -> None:
    """A pixel coordinate of exactly -1 (-0.125 here) or of the size (1.125) is outside too."""
    inputs = make_inputs(((4, 4), (4, 4)), images=1, heads=1, channels=4)
    absent = inputs.weights.clone()
    locations = inputs.locations.clone()
    for axis in (0, 1):  # x of one point and y of another
        locations[:, :, :, axis, 1, axis] = where
        locations[:, :, :, axis, 1, 1 - axis] = 0.4
        absent[:, :, :, axis, 1] = 0
    broken = inputs._replace(locations=locations, weights=absent.where(absent != 0, torch.nan))
    inputs = inputs._replace(weights=absent)
    assert torch.equal(kernels.forward(*broken), kernels.forward(*inputs))
    grad_output = grad_like(inputs)
    actual = kernels.backward(grad_output, *broken, deterministic)
    expected = kernels.backward(grad_output, *inputs, deterministic)
    assert torch.equal(actual[0], expected[0])
    for gradient, wanted in zip(actual[1:], expected[1:], strict=True):
        for level in (0, 1):
            assert not gradient[:, :, :, level, 1].any()
            assert torch.equal(gradient[:, :, :, level, 0], wanted[:, :, :, level, 0])


def test_only_the_deterministic_gradients_ignore_the_order_of_the_programs(
    kernels, monkeypatch
) -> None:
    inputs = make_inputs(((2, 2),), images=1, queries=40, heads=1, channels=32)
    arguments = (grad_like(inputs), *inputs)
    forth = [kernels.backward(*arguments, deterministic) for deterministic in (False, True)]
    reverse_programs(monkeypatch)
    back = [kernels.backward(*arguments, deterministic) for deterministic in (False, True)]
    assert not torch.equal(forth[0][0], back[0][0])
    for first, second in zip(forth[1], back[1], strict=True):
        assert torch.equal(first, second)
    assert_close(forth[0], back[0])


def reverse_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the interpreter run a grid's programs from the last to the first."""
    builder = pytest.importorskip("triton.runtime.interpreter").interpreter_builder
    set_index = builder.set_grid_idx

    def set_reversed(x: int, y: int, z: int) -> None:
        set_index(builder.grid_dim[0] - 1 - x, y, z)

    monkeypatch.setattr(builder, "set_grid_idx", set_reversed)


# --- machine code, compiled -----------------------------------------------------------------------


def launch(kernels: ModuleType, inputs: Inputs, deterministic: bool = False) -> None:
    kernels.forward(*inputs)
    kernels.backward(grad_like(inputs), *inputs, deterministic)


def count(pattern: str, kernel: Any) -> int:
    assert len(kernel.asm["cubin"]) > 1000
    return len(re.findall(pattern, kernel.asm["ptx"]))


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("dtype", "forward_load", "backward_load"),
    [(torch.float32, "v4.b32", "v4.b32"), (torch.bfloat16, "v4.b32", "v2.b32")],
)
def test_code_moves_channels_in_vectors(
    compiled, compile_only, capability: int, dtype, forward_load: str, backward_load: str
) -> None:
    """A thread has 16 bytes of value in forward, and in backward of its float32 gradient."""
    launched = compile_only(capability)
    launch(compiled("deformable_attention"), make_inputs(heads=8, channels=32, dtype=dtype))
    forward, backward = launched
    corners = 4 * 2  # of a point in each level
    assert count(rf"ld\.global[.\w]*\.{forward_load}", forward) == corners * 2
    assert count(rf"ld\.global[.\w]*\.{backward_load}", backward) >= corners + 1
    assert count(r"bar\.sync|shfl", forward) == 0
    additions = count(r"(?:atom|red)\.global[.\w]*relaxed\.add[.\w]*\.f32", backward)
    assert additions == (corners if capability >= 90 else 4 * corners)


def test_deterministic_code_has_no_atomics(compiled, compile_only) -> None:
    launched = compile_only(90)
    inputs = make_inputs(heads=8, channels=32)
    launch(compiled("deformable_attention"), inputs, deterministic=True)
    assert [kernel.name for kernel in launched[1:]] == ["_backward_kernel", "_sum_kernel"]
    assert not any(count(r"\b(?:atom|red)\.", kernel) for kernel in launched)


def test_code_is_compiled_once_for_all_sizes(compiled, compile_only) -> None:
    launched = compile_only(90)
    for queries, shapes in [(5, ((5, 7), (3, 4))), (1, ((1, 16), (1, 1))), (16, ((32, 2), (8, 8)))]:
        inputs = make_inputs(shapes, images=queries, queries=queries, heads=8, channels=32)
        launch(compiled("deformable_attention"), inputs)
    assert len(launched) == 6
    assert len({kernel.hash for kernel in launched}) == 2
