"""The linear layer that is a convolution where that is faster, beside PyTorch's own."""

from __future__ import annotations

import io

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from detectors.attention import QuerySelfAttention
from detectors.feed_forward import feed_forward
from ops import Linear, MultiScaleDeformableAttention, linear
from ops.linear_layer import FEWEST_CHANNELS, FEWEST_PRODUCTS

INPUTS, OUTPUTS = 128, 256
TOKENS = FEWEST_PRODUCTS // (INPUTS * OUTPUTS)


class Convolutions(TorchDispatchMode):
    """Counts them."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.convolution.default
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def two_threads(threads):
    torch.set_num_threads(2)


def convolutions(tokens, weight, bias=None):
    with Convolutions() as counter:
        output = linear(tokens, weight, bias)
    assert output.shape == (*tokens.shape[:-1], len(weight))
    assert output.is_contiguous()
    return counter.count


def inputs(*shape, bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    tokens = torch.randn(*shape, INPUTS, dtype=dtype)
    return tokens, torch.randn(OUTPUTS, INPUTS, dtype=dtype), torch.randn(OUTPUTS) if bias else None


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", ["batch first", "batch second", "rows"])
def test_output_and_gradients_are_those_in_float64(bias, layout):
    tokens, weight, offset = inputs(2, TOKENS // 2, bias=bias)
    if layout == "batch second":
        tokens = tokens.transpose(0, 1).contiguous().transpose(0, 1)
    elif layout == "rows":
        tokens = tokens.flatten(0, 1)
    given = [x.requires_grad_() for x in (tokens, weight, offset) if x is not None]
    assert convolutions(*given) == 1
    exact = [x.detach().double().requires_grad_() for x in given]
    output, expected = linear(*given), F.linear(*exact)
    torch.testing.assert_close(output, expected.float(), rtol=1e-5, atol=1e-4)
    grad = torch.randn_like(output)
    found = torch.autograd.grad(output, given, grad)
    for mine, theirs in zip(
        found, torch.autograd.grad(expected, exact, grad.double()), strict=True
    ):
        assert (mine - theirs).norm() <= 1e-5 * theirs.norm()


def test_second_derivatives():
    tokens, weight, _ = (x if x is None else x.requires_grad_() for x in inputs(TOKENS, bias=False))
    exact = tokens.detach().double().requires_grad_(), weight.detach().double().requires_grad_()

    def penalty(function, *given):
        (grad,) = torch.autograd.grad(function(*given).square().sum(), given[0], create_graph=True)
        return torch.autograd.grad(grad.square().sum(), given[1])[0]

    expected = penalty(F.linear, *exact)
    assert (penalty(linear, tokens, weight) - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("tokens", [0, 1, TOKENS - 1])
def test_few_tokens_are_pytorchs_product(tokens):
    given = inputs(tokens)
    assert convolutions(*given) == 0
    assert torch.equal(linear(*given), F.linear(*given))


def test_few_channels_are_pytorchs_product():
    few = FEWEST_CHANNELS - 1
    for weight in (torch.randn(few, 512), torch.randn(512, few)):
        tokens = torch.randn(FEWEST_PRODUCTS // weight.numel() + 1, weight.shape[1])
        assert convolutions(tokens, weight) == 0


def test_one_thread_is_pytorchs_product():
    torch.set_num_threads(1)
    assert convolutions(*inputs(TOKENS)) == 0


def test_onednn_can_be_turned_off():
    with torch.backends.mkldnn.flags(enabled=False):
        assert convolutions(*inputs(TOKENS)) == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_are_pytorchs_product(dtype):
    tokens, weight, _ = inputs(TOKENS, dtype=dtype)
    assert convolutions(tokens, weight) == 0
    assert linear(tokens, weight).dtype == dtype


def test_autocast_decides_the_type():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert convolutions(*inputs(TOKENS)) == 0
        assert linear(*inputs(TOKENS)).dtype == torch.bfloat16


def test_traces_and_graphs_have_no_convolution():
    layer, (tokens, *_) = Linear(INPUTS, OUTPUTS), inputs(TOKENS)
    assert "convolution" not in str(torch.jit.trace(layer, tokens).inlined_graph)
    graphs = []
    compiled = torch.compile(
        layer, backend=lambda graph, _: graphs.append(graph.code) or graph.forward, fullgraph=True
    )
    torch.testing.assert_close(compiled(tokens), layer(tokens), rtol=1e-5, atol=1e-5)
    assert len(graphs) == 1
    assert "conv2d" not in graphs[0]


def test_transformers_multiply_so():
    tokens = torch.randn(8, 512, 256)  # of 256 channels to 256 they are just enough
    deformable = MultiScaleDeformableAttention(256, 8, 1, 16, batch_first=True)
    references = torch.rand(8, 512, 1, 2)
    runs = {
        "hidden, output": lambda: feed_forward(256, 1024, 0.1, None)(tokens),
        "queries and keys, values, output": lambda: QuerySelfAttention(256, 8)(tokens, tokens),
        "offsets, values, output": lambda: deformable(
            tokens, reference_points=references, spatial_shapes=[(16, 32)]
        ),
    }
    for layers, run in runs.items():
        with Convolutions() as counter:
            run()
        assert counter.count == len(layers.split(", ")), layers


def test_weights_are_those_of_pytorchs_layer():
    torch.manual_seed(0)
    theirs = torch.nn.Linear(INPUTS, OUTPUTS)
    torch.manual_seed(0)
    mine = Linear(INPUTS, OUTPUTS)
    file = io.BytesIO()
    torch.save(theirs.state_dict(), file)
    file.seek(0)
    for name, value in torch.load(file).items():
        assert torch.equal(mine.state_dict()[name], value)
    tokens, *_ = inputs(TOKENS)
    torch.testing.assert_close(mine(tokens), theirs(tokens), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(1,), ()])
def test_a_bias_may_be_one_number(shape):
    tokens, weight, _ = inputs(TOKENS)
    bias = torch.ones(shape)
    assert convolutions(tokens, weight, bias) == 0
    assert torch.equal(linear(tokens, weight, bias), F.linear(tokens, weight, bias))


def test_forward_mode_is_pytorchs_product():
    tokens, weight, bias = inputs(TOKENS)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(tokens, torch.ones_like(tokens))
        found = forward_ad.unpack_dual(linear(dual, weight.requires_grad_(), bias)).tangent
    torch.testing.assert_close(found, F.linear(torch.ones_like(tokens), weight))
