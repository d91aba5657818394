"""Convolutions of one pixel whose weights get their gradient from a product, beside PyTorch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ops import Linear, convolution_1x1, linear, pixel_convolution, relu_feed_forward
from ops.pixel_convolution import FEWEST_PRODUCTS

CHANNELS, FILTERS, SIZE = 128, 256, (2, 64, 64)
LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.fixture(autouse=True)
def two_threads(threads):
    torch.set_num_threads(2)


weight_gradient_is_product = pixel_convolution.weight_gradient_is_product  # not of the fixture


@pytest.fixture(autouse=True, params=[False, True], ids=["weights", "images and weights"])
def processor(request, monkeypatch):
    """One where MKL is the faster one at some gradients, whatever this one is."""
    monkeypatch.setattr(pixel_convolution, "weight_gradient_is_product", lambda: True)
    monkeypatch.setattr(pixel_convolution, "is_intel", lambda: request.param)


def inputs(layout=torch.channels_last, size=SIZE, channels=CHANNELS, filters=FILTERS):
    torch.manual_seed(0)
    batch, height, width = size
    images = torch.randn(batch, channels, height, width).contiguous(memory_format=layout)
    weight, bias = torch.randn(filters, channels, 1, 1), torch.randn(filters)
    return [x.requires_grad_() for x in (images, weight, bias)]


def is_ours(output):
    return output.grad_fn.name() == "_ConvolutionBackward"


def assert_close(found, expected):
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.shape == theirs.shape
        assert (mine - theirs).norm() <= 1e-5 * theirs.norm()


def test_the_size_is_just_enough():
    batch, height, width = SIZE
    assert batch * height * width * CHANNELS * FILTERS == FEWEST_PRODUCTS
    assert is_ours(convolution_1x1(*inputs()))
    assert not is_ours(convolution_1x1(*inputs(size=(2, 64, 63))))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"channels": FILTERS, "filters": CHANNELS},
        {"size": (2, 16, 16), "channels": 512, "filters": 1024},  # few pixels beside filters
    ],
)
def test_gradients_are_those_in_float64(layout, sizes):
    leaves = inputs(**sizes)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    output, expected = convolution_1x1(*leaves), F.conv2d(*exact)
    assert output.is_contiguous(memory_format=torch.channels_last)
    assert_close([output], [expected])
    cotangent = torch.randn(output.shape).contiguous(memory_format=layout)
    wanted = torch.autograd.grad(expected, exact, cotangent.double())
    for needed in ([0, 1, 2], [0, 1], [1, 2], [0], [1], [2]):
        found = torch.autograd.grad(output, [leaves[i] for i in needed], cotangent, True)
        assert_close(found, [wanted[i] for i in needed])
        assert all(x.is_contiguous(memory_format=layout_of(x)) for x in found)


def layout_of(gradient):
    """That of a weight and a bias is plain."""
    return torch.channels_last if len(gradient) == SIZE[0] else torch.contiguous_format


def test_the_output_may_be_overwritten():
    leaves = inputs()
    exact = [x.detach().double().requires_grad_() for x in leaves]
    output = convolution_1x1(*leaves)
    output += 1
    torch.relu_(output)
    wanted = torch.autograd.grad((F.conv2d(*exact) + 1).relu().square().sum(), exact)
    assert_close(torch.autograd.grad(output.square().sum(), leaves), wanted)


def test_gradients_keep_their_type_where_backward_is_autocast():
    leaves = inputs(channels=FILTERS, filters=CHANNELS)
    output = convolution_1x1(*leaves)
    cotangent = torch.randn_like(output)
    wanted = torch.autograd.grad(output, leaves, cotangent, True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.autograd.grad(output, leaves, cotangent)
    assert all(x.dtype == torch.float32 for x in found)
    assert_close(found, wanted)


def test_second_derivatives():
    leaves = inputs()
    exact = [x.detach().double().requires_grad_() for x in leaves]
    results = []
    for function, given in ((convolution_1x1, leaves), (F.conv2d, exact)):
        first = torch.autograd.grad(function(*given).square().sum(), given, create_graph=True)
        second = torch.autograd.grad(sum(x.square().sum() for x in first), given)
        results.append([*first, *second])
    assert_close(*results)


def test_batches_of_gradients_and_transforms():
    leaves = inputs()
    output = convolution_1x1(*leaves)
    cotangents = torch.randn(2, *output.shape)
    batched = torch.autograd.grad(output, leaves, cotangents, True, is_grads_batched=True)
    for index, cotangent in enumerate(cotangents):
        wanted = torch.autograd.grad(output, leaves, cotangent, True)
        assert_close([part[index] for part in batched], wanted)

    def loss(weight):
        return convolution_1x1(leaves[0].detach(), weight).square().sum()

    (wanted,) = torch.autograd.grad(loss(leaves[1]), leaves[1])
    assert_close([torch.func.grad(loss)(leaves[1])], [wanted])
    stacked = torch.stack([leaves[0].detach()] * 2)
    mapped = torch.vmap(lambda images: convolution_1x1(images, *leaves[1:]))(stacked)
    assert_close(mapped, [output, output])


@pytest.mark.parametrize(
    "change",
    [
        lambda x, w, b: (x, w.detach(), b),
        lambda x, w, b: (x.double(), w.double(), b.double()),
        lambda x, w, b: (x.bfloat16(), w.bfloat16(), b.bfloat16()),
        lambda x, w, b: (x.contiguous(), w, b),
    ],
)
def test_anything_else_is_pytorchs(change):
    given = change(*inputs())
    output = convolution_1x1(*given)
    assert output.grad_fn.name() == "ConvolutionBackward0"
    assert torch.equal(output, F.conv2d(*given))


@pytest.mark.parametrize(
    ("intel", "vectors", "expected"),
    [
        (True, "AVX512", True),
        (True, "AVX2", True),
        (False, "AVX2", True),
        (False, "AVX512", False),
        (False, "DEFAULT", False),
    ],
)
def test_which_processors_are_faster(monkeypatch, intel, vectors, expected):
    monkeypatch.setattr(pixel_convolution, "is_intel", lambda: intel)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: vectors)
    assert weight_gradient_is_product() == expected


@pytest.mark.parametrize("shape", [(64, 64, 1, 1), (64, 128, 1, 1), (128, 64, 1, 1)])
def test_images_have_a_product_where_they_have_no_fewer_channels(processor, shape):
    wide = shape[1] >= shape[0]
    on_intel = pixel_convolution.is_intel()
    assert pixel_convolution.image_gradient_is_product(torch.empty(shape)) == (on_intel and wide)


def test_other_processors_and_no_gradients_are_pytorchs(monkeypatch):
    with torch.no_grad():
        assert convolution_1x1(*inputs()).grad_fn is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert convolution_1x1(*inputs()).dtype == torch.bfloat16
    monkeypatch.setattr(pixel_convolution, "weight_gradient_is_product", lambda: False)
    assert not is_ours(convolution_1x1(*inputs()))


def test_layers_of_tokens_have_such_gradients():
    images, weight, bias = inputs()
    tokens = images.detach().permute(0, 2, 3, 1).flatten(1, 2).requires_grad_()
    rows = weight.detach()[:, :, 0, 0].requires_grad_()
    output = linear(tokens, rows, bias)
    assert "_ConvolutionBackward" in ancestors(output)
    exact = [x.detach().double().requires_grad_() for x in (tokens, rows, bias)]
    cotangent = torch.randn_like(output)
    wanted = torch.autograd.grad(F.linear(*exact), exact, cotangent.double())
    assert_close(torch.autograd.grad(output, (tokens, rows, bias), cotangent), wanted)


def test_feed_forward_networks_have_such_gradients(monkeypatch):
    layers = Linear(CHANNELS, FILTERS), Linear(FILTERS, CHANNELS)
    tokens = torch.randn(SIZE[0] * SIZE[1] * SIZE[2], CHANNELS)
    given = [tuple(layer.parameters()) for layer in layers]
    leaves, results = [*given[0], *given[1]], []
    for by_product in (True, False):
        monkeypatch.setattr(pixel_convolution, "weight_gradient_is_product", lambda: by_product)  # noqa: B023
        output = relu_feed_forward(tokens, *given, p=0)
        results.append(torch.autograd.grad(output.square().sum(), leaves))
    assert_close(*results)
    assert not all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def ancestors(tensor):
    """Names of all nodes of autograd behind a tensor."""
    names, open_nodes = set(), [tensor.grad_fn]
    while open_nodes:
        node = open_nodes.pop()
        if node is not None:
            names.add(node.name())
            open_nodes += [parent for parent, _ in node.next_functions]
    return names
