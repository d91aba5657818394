"""Multi-scale deformable attention's kernels: the ways they go by sizes, threads and types."""

from __future__ import annotations

import pytest
import torch
from deformable_cases import example, gradients

import ops
from ops.deformable_attention import reference


def assert_equals_reference(arguments) -> None:
    value, levels, *points = arguments
    output = ops.multi_scale_deformable_attention(*arguments)
    grad = torch.rand_like(output)
    leaves = [x.detach().double().requires_grad_() for x in (value, *points)]
    expected = reference(leaves[0], levels, *leaves[1:])
    wanted = (expected, *torch.autograd.grad(expected, leaves, grad.double()))
    found = (output, *gradients(arguments, grad))
    tolerance = 1e-12 if value.dtype == torch.float64 else 1e-4
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours - theirs).norm() <= tolerance * theirs.norm()


# --- sizes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("queries", [31, 32, 33, 90])  # 48 tokens are read often from 32 on
@pytest.mark.parametrize("threads_in_use", [1, 2, 5])  # with five, levels are taken apart
@pytest.mark.parametrize("channels", [1, 5, 32])
def test_values_that_are_read_often(
    compiled: str, threads: None, queries: int, threads_in_use: int, channels: int
) -> None:
    torch.set_num_threads(threads_in_use)
    assert_equals_reference(example(queries=queries, channels=channels, dtype=torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("channels", [4, 8, 16, 24, 64, 256])  # whole vectors and others
@pytest.mark.parametrize("threads_in_use", [1, 2])
def test_a_single_head(
    compiled: str, threads: None, dtype: torch.dtype, channels: int, threads_in_use: int
) -> None:
    torch.set_num_threads(threads_in_use)
    assert_equals_reference(example(heads=1, queries=40, channels=channels, dtype=dtype))


@pytest.mark.parametrize("queries", [1, 7, 8, 9, 17])
def test_queries_around_those_that_are_fetched_ahead(compiled: str, queries: int) -> None:
    assert_equals_reference(example(queries=queries, channels=16, dtype=torch.float32))


# --- determinism --------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [1, 3])
def test_bits_do_not_depend_on_threads_or_runs(compiled: str, threads: None, heads: int) -> None:
    arguments = example(images=1, heads=heads, queries=1500, channels=24, dtype=torch.float32)
    grad = torch.rand_like(ops.multi_scale_deformable_attention(*arguments))
    results = []
    for count in (1, 2, 4, 4):
        torch.set_num_threads(count)
        output = ops.multi_scale_deformable_attention(*arguments)
        results.append((output, *gradients(arguments, grad)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_threads_have_enough_to_do_for_large_inputs(threads: None) -> None:
    torch.set_num_threads(2)
    arguments = example(queries=700, channels=8, dtype=torch.float32)
    output = ops.multi_scale_deformable_attention(*arguments)
    torch.testing.assert_close(output, reference(*arguments), atol=1e-5, rtol=1e-5)


# --- the operator itself ------------------------------------------------------------------------


def test_the_raw_operator_reads_nothing_outside_its_tensors(capability: str) -> None:
    value, _, locations, weights = example(dtype=torch.float32)
    operator = torch.ops.detr_methods.multi_scale_deformable_attention
    huge = 2**62
    for shapes in ([5, 7, 3, 4, 1, 2], [5, 7, 3, 4], [huge, 4, 3, 4, 1, 1], [-5, -7, 3, 4, 1, 1]):
        with pytest.raises(ValueError, match=r"spatial_shapes|do not belong together"):
            operator(value, shapes, locations, weights)
    with pytest.raises(ValueError, match="do not belong together"):
        operator(value[:1], [5, 7, 3, 4, 1, 1], locations, weights)
    with pytest.raises(TypeError, match="have types"):
        operator(value, [5, 7, 3, 4, 1, 1], locations.double(), weights.double())
