"""Winograd convolutions beside PyTorch's in float64."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad

import ops
from ops.convolution import (
    FEWEST_CHANNELS,
    FEWEST_TILES,
    LARGE,
    MULTIPLE,
    _channels_first,
    is_large,
)

OPERATORS = torch.ops.detr_methods
ROOT = Path(__file__).parents[2]
SIZES = [(2, 8, 64), (1, 30, 40), (3, 13, 22), (200, 1, 1), (1, 5, 67)]


def inputs(batch, height, width, channels=64, filters=96, dtype=torch.float32):
    torch.manual_seed(0)
    shapes = (batch, channels, height, width), (filters, channels, 3, 3), (filters,)
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def is_ours(output):
    return "convolution_3x3" in output.grad_fn.name()


def in_double(function, leaves):
    exact = [x.detach().double().requires_grad_() for x in leaves]
    return function(*exact), exact


def direct(images, weight, bias=None, stride=1):
    return F.conv2d(images, weight, bias, stride, padding=1)


def turned(images, weight, bias=None):
    """The convolution that carries gradients back, or with its own weight forth."""
    return direct(images, weight.flip(2, 3).transpose(0, 1), bias)


def assert_close(found, expected, tolerance):
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.shape == theirs.shape
        assert (mine - theirs).norm() <= tolerance * theirs.norm()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_output_and_gradients_are_those_in_float64(compiled, size, layout):
    leaves = inputs(*size)
    leaves[0] = leaves[0].detach().contiguous(memory_format=layout).requires_grad_()
    output = ops.convolution_3x3(*leaves)
    assert is_ours(output)
    assert output.is_contiguous(memory_format=torch.channels_last)
    expected, exact = in_double(direct, leaves)
    assert_close([output], [expected], 4e-6)
    cotangent = torch.randn(output.shape).contiguous(memory_format=layout)
    wanted = torch.autograd.grad(expected, exact, cotangent.double())
    found = torch.autograd.grad(output, leaves, cotangent)
    assert_close(found, wanted, 2e-5)


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 5),
    height=st.integers(1, 21),
    width=st.integers(1, 21),
    channels=st.integers(1, 5),
    filters=st.integers(1, 5),
    biased=st.booleans(),
    turns=st.booleans(),
)
def test_operators_compute_any_size(batch, height, width, channels, filters, biased, turns):
    leaves = inputs(
        batch, height, width, channels * MULTIPLE, filters * MULTIPLE, dtype=torch.float64
    )
    if not biased:
        leaves.pop()
    if turns:
        leaves[1] = leaves[1].detach().transpose(0, 1).requires_grad_()
    output = OPERATORS.convolution_3x3(*leaves, *[None] * (not biased), turns)
    expected, exact = in_double(turned if turns else direct, leaves)
    assert_close([output], [expected], 1e-12)
    cotangent = torch.randn_like(output)
    wanted = torch.autograd.grad(expected, exact, cotangent)
    assert_close(torch.autograd.grad(output, leaves, cotangent), wanted, 1e-12)


@pytest.mark.parametrize(("channels", "size"), [(512, (1, 9, 90)), (128, (1, 200, 120))])
def test_filters_and_images_beyond_the_cache(compiled, channels, size):
    """Filters of 37 MB are read by frequencies, gradients of 1500 tiles are summed in parts."""
    images, weight, _ = inputs(*size, channels, channels)
    output = ops.convolution_3x3(images, weight)
    expected, exact = in_double(direct, [images, weight])
    assert_close([output], [expected], 8e-6)
    cotangent = torch.randn_like(output)
    wanted = torch.autograd.grad(expected, exact, cotangent.double())
    assert_close(torch.autograd.grad(output, [images, weight], cotangent), wanted, 2e-5)


@pytest.mark.parametrize("channels", [64, 512])
def test_threads_change_nothing(threads, channels):
    leaves = inputs(1, 17, 90, channels, channels)
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        output = ops.convolution_3x3(*leaves)
        gradients = torch.autograd.grad(output.square().sum(), leaves[:2])
        results.append([output, *gradients])
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def test_an_image_is_the_same_in_any_batch():
    images, weight, bias = inputs(3, 20, 32)
    together = ops.convolution_3x3(images, weight, bias)
    for image, output in zip(images, together, strict=True):
        assert torch.equal(ops.convolution_3x3(image[None], weight, bias)[0], output)


@pytest.mark.parametrize("size", [(2, 16, 16), (1, 31, 45), (2, 64, 128)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_with_a_stride_of_two(size, layout):
    leaves = inputs(*size)
    leaves[0] = leaves[0].detach().contiguous(memory_format=layout).requires_grad_()
    output = ops.convolution_3x3(*leaves, stride=2)
    assert output.grad_fn.name() == "_StridedConvolutionBackward"
    assert torch.equal(output, direct(*leaves, stride=2))
    expected, exact = in_double(partial(direct, stride=2), leaves)
    cotangent = torch.randn(output.shape).contiguous(memory_format=layout)
    wanted = torch.autograd.grad(expected, exact, cotangent.double(), retain_graph=True)
    for needed in ([0, 1, 2], [0], [1], [2]):
        found = torch.autograd.grad(output, [leaves[i] for i in needed], cotangent, True)
        assert_close(found, [wanted[i] for i in needed], 1e-5)
    first, exact_first = (
        torch.autograd.grad(y.pow(3).sum(), x[:2], create_graph=True)
        for y, x in ((output, leaves), (expected, exact))
    )
    second, exact_second = (
        torch.autograd.grad(sum(g.square().sum() for g in grads), x)
        for grads, x in ((first, leaves), (exact_first, exact))
    )
    assert_close(second, exact_second, 1e-5)


def test_images_are_copied_to_another_layout_alone_where_they_are_large():
    large, small = torch.randn(3, 64, 128, 64), torch.randn(3, 64, 127, 64)
    assert large[0].numel() == LARGE
    for images in (large, small):
        images = images.permute(0, 3, 1, 2)
        copied = _channels_first(images)
        assert copied.is_contiguous()
        assert torch.equal(copied, images)
        assert copied.data_ptr() != images.data_ptr()


def test_other_strides_are_pytorchs():
    images, weight, bias = inputs(2, 16, 16)
    output = ops.convolution_3x3(images, weight, bias, stride=3)
    assert output.grad_fn.name() == "ConvolutionBackward0"
    assert torch.equal(output, direct(images, weight, bias, 3))


def test_only_where_it_pays():
    images, weight, bias = inputs(2, 16, 16)
    assert is_large(images, weight)
    assert FEWEST_TILES == 2 * 4 * 4
    narrow = weight[: FEWEST_CHANNELS - MULTIPLE]
    odd = torch.randn(FEWEST_CHANNELS + 1, 64, 3, 3)
    others = [
        (images[:1], weight),
        (images.double(), weight.double()),
        (images.bfloat16(), weight.bfloat16()),
        (images, narrow),
        (images, odd),
        (images.to("meta"), weight.to("meta")),
    ]
    for pair in others:
        assert not is_large(*pair)
        for stride in (1, 2):
            output = ops.convolution_3x3(*pair, stride=stride)
            assert output.grad_fn.name() == "ConvolutionBackward0"
            assert output.shape == direct(*pair, stride=stride).shape
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.convolution_3x3(images, weight, bias).dtype == torch.bfloat16
    assert torch.equal(ops.convolution_3x3(images[:1], weight), direct(images[:1], weight))


def test_compiled_and_traced_graphs_hold_pytorchs_convolution():
    leaves = [x.detach() for x in inputs(2, 16, 16)]
    expected = direct(*leaves)
    compiled = torch.compile(ops.convolution_3x3, fullgraph=True, backend="eager")
    # its own check would run the function itself, which then is not PyTorch's
    traced = torch.jit.trace(ops.convolution_3x3, tuple(leaves), check_trace=False)
    for function in (compiled, traced):
        assert torch.equal(function(*leaves), expected)


def test_images_without_pixels_and_no_images():
    _, weight, bias = inputs(1, 1, 1)
    for shape in ((0, 64, 5, 5), (2, 64, 0, 5)):
        images = torch.randn(shape, requires_grad=True)
        output = OPERATORS.convolution_3x3(images, weight, bias, False)
        assert output.shape == (shape[0], 96, *shape[2:])
        gradients = torch.autograd.grad(output.sum(), [images, weight, bias])
        assert all(gradient.count_nonzero() == 0 for gradient in gradients)


def test_values_that_are_not_finite_stay_in_their_neighbourhood():
    images, weight, _ = inputs(1, 24, 24)
    images = images.detach()
    images[0, 3, 12, 12] = torch.nan
    output = ops.convolution_3x3(images, weight)
    wrong = output.isnan().any(1)[0].nonzero()
    assert wrong.min() >= 8  # the tiles around it
    assert wrong.max() < 16
    assert output[0, :, 11:14, 11:14].isnan().all()


@pytest.mark.parametrize(("turns", "reference"), [(False, direct), (True, turned)])
def test_second_derivatives(turns, reference):
    leaves = inputs(1, 5, 6, MULTIPLE, MULTIPLE, dtype=torch.float64)
    results = []
    for function in (partial(OPERATORS.convolution_3x3, turned=turns), reference):
        first = torch.autograd.grad(function(*leaves).pow(3).sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(x.square().sum() for x in first), leaves)
        results.append([*first, *second])
    assert_close(*results, 1e-11)


@pytest.mark.parametrize(("stride", "size"), [(1, (16, 16)), (2, (16, 16)), (2, (64, 128))])
def test_batches_of_gradients_and_transforms(stride, size):
    images, weight, bias = inputs(2, *size)
    output = ops.convolution_3x3(images, weight, bias, stride)
    cotangents = torch.randn(3, *output.shape)
    leaves = [images, weight, bias]
    batched = torch.autograd.grad(
        output, leaves, cotangents, is_grads_batched=True, retain_graph=True
    )
    for index, cotangent in enumerate(cotangents):
        wanted = torch.autograd.grad(output, leaves, cotangent, retain_graph=True)
        assert_close([part[index] for part in batched], wanted, 1e-6)

    def loss(image, weight):
        return ops.convolution_3x3(image[None], weight, stride=stride).square().sum()

    large = torch.randn(2, 64, 24, 24)
    found = torch.func.vmap(torch.func.grad(loss, argnums=1), in_dims=(0, None))(large, weight)
    for image, gradient in zip(large, found, strict=True):
        (wanted,) = torch.autograd.grad(loss(image, weight), weight)
        assert_close([gradient], [wanted], 1e-6)


def test_the_operators_are_registered_properly():
    leaves = inputs(2, 5, 6, MULTIPLE, 2 * MULTIPLE)
    torch.library.opcheck(OPERATORS.convolution_3x3.default, (*leaves, False))
    back = torch.randn(2 * MULTIPLE, MULTIPLE, 3, 3, requires_grad=True)
    torch.library.opcheck(OPERATORS.convolution_3x3.default, (leaves[0], back, None, False))
    torch.library.opcheck(
        OPERATORS.convolution_3x3.default, (leaves[0], back.transpose(0, 1), None, True)
    )
    grad_output = torch.randn(2, 2 * MULTIPLE, 5, 6, requires_grad=True)
    torch.library.opcheck(
        OPERATORS.convolution_3x3_weight_gradient.default, (leaves[0], grad_output)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, w, b: (x[0], w, b), "input needs four axes, it has 3"),
        (lambda x, w, b: (x[:, :17], w, b), "input has 17 channels, expected a multiple of 16"),
        (lambda x, w, b: (x, w[:, :32], b), "weight has shape"),
        (lambda x, w, b: (x, w[:9], b), "weight has shape"),
        (lambda x, w, b: (x, w[..., :2], b), "weight has shape"),
        (lambda x, w, b: (x, w.double(), b), "weight needs the input's type"),
        (lambda x, w, b: (x, w, b[:5]), "bias needs one element for each filter"),
    ],
)
def test_kernels_refuse_what_they_cannot_take(capability, change, message):
    with pytest.raises(ValueError, match=message):
        OPERATORS.convolution_3x3(*change(*inputs(1, 8, 8)), False)


def test_turned_filters_need_the_inputs_channels_first(capability):
    images, weight, _ = inputs(1, 8, 8)
    with pytest.raises(ValueError, match="weight has shape"):
        OPERATORS.convolution_3x3(images, weight, None, True)


def test_weight_gradients_need_images_alike(capability):
    images, _, _ = inputs(1, 8, 8)
    with pytest.raises(ValueError, match="expected images like"):
        OPERATORS.convolution_3x3_weight_gradient(images, images[:, :, :7])


def test_without_the_library_it_is_pytorchs(tmp_path):
    script = (
        "import torch, ops\n"
        "x, w = torch.randn(2, 64, 16, 16), torch.randn(64, 64, 3, 3)\n"
        "y = torch.ops.detr_methods.convolution_3x3(x, w, None, False)\n"
        "g = torch.ops.detr_methods.convolution_3x3_weight_gradient(x, y)\n"
        "back = torch.ops.detr_methods.convolution_3x3(y, w, None, True)\n"
        "x.requires_grad_(), w.requires_grad_()\n"
        "expected = torch.nn.functional.conv2d(x, w, padding=1)\n"
        "assert torch.equal(ops.convolution_3x3(x, w), expected)\n"
        "torch.testing.assert_close(y, expected)\n"
        "found = torch.autograd.grad(expected, (x, w), y)\n"
        "torch.testing.assert_close(list(found), [back, g], rtol=1e-4, atol=1e-2)\n"
    )
    variables = {"DETR_METHODS_OPS": str(tmp_path / "none*.so"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-c", script]
    subprocess.run(command, check=True, env=variables, cwd=ROOT)


def test_one_image_and_forward_mode_are_pytorchs():
    image, weight = torch.randn(64, 40, 40), torch.randn(64, 64, 3, 3)
    expected = F.conv2d(image, weight, padding=1)
    assert torch.equal(ops.convolution_3x3(image, weight), expected)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(torch.zeros_like(image)[None], image[None])
        found = forward_ad.unpack_dual(ops.convolution_3x3(dual, weight)).tangent
    torch.testing.assert_close(found[0], expected)
