"""Attention and activations against formulas with the same draw, and what they store."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from detectors import lean
from detectors.feed_forward import feed_forward
from detectors.lean import LeanPReLU, ReLUDropout, _ReLUDropout, lean_attention


def drawn(shape, p, rows=None):
    """What the next draws keep, each of some rows, as ReLU with dropout shows it."""
    torch.manual_seed(0)
    parts = torch.ones(shape).split(rows or shape[0])
    kept = torch.cat([ReLUDropout(p).train()(part) > 0 for part in parts])
    torch.manual_seed(0)
    return kept


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(*[st.integers(1, 4)] * 6),
    st.sampled_from([0.0, 0.1, 0.5]),
    st.sampled_from([None, "shared", "own"]),
    st.integers(1, 4),
)
def test_attention_is_the_formula(sizes, p, mask, at_once):
    batch, heads, queries, keys, width, channels = sizes
    torch.manual_seed(1)
    query, key, value = (
        torch.randn(batch, heads, *shape, dtype=torch.float64, requires_grad=True)
        for shape in ((queries, width), (keys, width), (keys, channels))
    )
    shapes = {None: (1,), "shared": (queries, keys), "own": (batch, 1, 1, keys)}
    allowed = torch.rand(shapes[mask]) > 0.5
    allowed[..., 0] = True
    kept = drawn((batch, heads, queries, keys), p, at_once)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lean, "WEIGHTS_AT_ONCE", at_once * heads * queries * keys)
        found = lean_attention(query, key, value, allowed if mask else None, p)
        cotangent = torch.randn_like(found)
        gradients = torch.autograd.grad(found, (query, key, value), cotangent)
    logits = torch.einsum("bhnd,bhsd->bhns", query, key) / width**0.5
    logits = logits.where(allowed, -torch.inf)
    weights = logits.softmax(-1) * kept / (1 - p)
    expected = torch.einsum("bhns,bhsc->bhnc", weights, value)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    expected_gradients = torch.autograd.grad(expected, (query, key, value), cotangent)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.7])
@pytest.mark.parametrize("inplace", [False, True])
def test_relu_dropout_is_the_formula(p, inplace):
    values = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    layer = ReLUDropout(p, inplace).train()
    kept = drawn(values.shape, p)
    found, expected = layer(values.clone()), values.clamp(min=0) * kept / (1 - p)
    torch.testing.assert_close(found, expected)
    cotangent = torch.randn_like(expected)
    torch.testing.assert_close(
        *(torch.autograd.grad(y, values, cotangent) for y in (found, expected))
    )
    assert torch.equal(layer.eval()(values), values.clamp(min=0))


def test_relu_dropout_with_the_dropout_of_other_devices():
    values = torch.randn(50, 7, dtype=torch.float64, requires_grad=True)
    found = _ReLUDropout.apply(values, 0.4)
    kept = found.detach() > 0
    assert 0.4 < (kept.sum() / (values > 0).sum()).item() < 0.8
    assert not (kept & (values <= 0)).any()
    expected = values * kept / 0.6
    torch.testing.assert_close(found, expected)
    cotangent = torch.randn_like(expected)
    torch.testing.assert_close(
        *(torch.autograd.grad(y, values, cotangent) for y in (found, expected))
    )
    hidden = torch.randn(64, 32, requires_grad=True)
    assert stored_bytes(lambda: _ReLUDropout.apply(hidden, 0.1)) == hidden.nbytes
    on_meta = ReLUDropout(0.1, inplace=True).train()(hidden.to("meta"))
    assert (on_meta.shape, on_meta.device.type) == (hidden.shape, "meta")


@pytest.mark.parametrize("slope", [0.25, 3.0, 1e-20, 0.0, -0.5])
@pytest.mark.parametrize("frozen", [False, True])
def test_prelu_is_pytorchs(slope, frozen):
    torch.manual_seed(0)
    values = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    layers = [
        kind(init=slope).double().requires_grad_(not frozen) for kind in (LeanPReLU, nn.PReLU)
    ]
    results = []
    for layer in layers:
        output = layer(values * 2)
        inputs = [values] if frozen else [values, layer.weight]
        results.append((output, *torch.autograd.grad(output.square().sum(), inputs)))
    torch.testing.assert_close(*results)


def test_prelu_overwrites_what_it_may():
    layer, linear = LeanPReLU(), nn.Linear(8, 32)
    tokens = torch.randn(2, 5, 8)
    hidden = linear(tokens)
    assert layer(hidden).data_ptr() == hidden.data_ptr()
    leaf = torch.randn(4, requires_grad=True)
    assert layer(leaf).data_ptr() != leaf.data_ptr()
    assert LeanPReLU(5)(hidden).data_ptr() != hidden.data_ptr()  # a slope a token
    plain = stored_bytes(lambda: nn.PReLU()(linear(tokens)).square())
    assert plain - stored_bytes(lambda: layer(linear(tokens)).square()) >= hidden.nbytes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_prelu_under_autocast(dtype):
    torch.manual_seed(0)
    network = feed_forward(8, 64, 0.0, nn.PReLU())
    tokens = torch.randn(3, 8)
    results = []
    for enabled in (False, True):
        network.zero_grad()
        with torch.autocast("cpu", dtype, enabled=enabled):
            output = network(tokens)
        output.float().square().sum().backward()
        results.append([output.float(), *(p.grad.clone() for p in network.parameters())])
    torch.testing.assert_close(*results, rtol=0.05, atol=0.1)


def test_prelu_of_a_network_is_lean_and_compiles():
    torch.manual_seed(0)
    network = feed_forward(8, 12, 0.0, nn.PReLU())
    assert type(network.activation) is LeanPReLU
    assert type(network.layers[0][1]) is LeanPReLU
    tokens = torch.randn(3, 8, requires_grad=True)
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    results = []
    for function in (network, compiled):
        output = function(tokens)
        inputs = [tokens, *network.parameters()]
        results.append((output, *torch.autograd.grad(output.square().sum(), inputs)))
    torch.testing.assert_close(*results)
    expected = F.prelu(network.layers[0][0](tokens), network.activation.weight)
    torch.testing.assert_close(network.layers[0](tokens), expected)


def stored_bytes(function):
    """What autograd keeps of a call that is not one of its inputs."""
    sizes = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: sizes.update({t.data_ptr(): t.untyped_storage().nbytes()}) or t, lambda t: t
    ):
        function()
    return sum(sizes.values())


def test_what_is_stored_is_small():
    query, key, value = (torch.randn(1, 2, 64, 8, requires_grad=True) for _ in range(3))
    inputs = 3 * query.nbytes
    weights = 2 * 64 * 64
    seed = 8
    kept = stored_bytes(lambda: lean_attention(query, key, value, None, 0.1))
    assert kept == inputs + seed
    wide = torch.randn(1, 2, 64, 4, requires_grad=True)
    assert stored_bytes(lambda: lean_attention(query, key, wide, None, 0.0)) < inputs + 4 * weights
    hidden = torch.randn(64, 32, requires_grad=True)
    assert stored_bytes(lambda: ReLUDropout(0.1).train()(hidden)) == hidden.nbytes


def test_shares_that_are_kept():
    torch.manual_seed(0)
    for p in (0.1, 0.5, 0.9):
        dropped = ReLUDropout(p).train()(torch.ones(999, 1001))
        error = (p * (1 - p) / dropped.numel()) ** 0.5
        assert (dropped == 0).double().mean().item() == pytest.approx(p, abs=5 * error)
        assert dropped.max().item() == pytest.approx(1 / (1 - p))
        zeros = (dropped == 0).double() - p
        for shift in range(1, 9):  # neighbours are independent
            correlation = (zeros[:, shift:] * zeros[:, :-shift]).mean().item()
            assert abs(correlation) < 6 * p * (1 - p) / dropped.numel() ** 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast(dtype):
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 9, 8, requires_grad=True) for _ in range(3))
    torch.manual_seed(0)
    exact = lean_attention(query, key, value, None, 0.1)
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype):
        found = lean_attention(query, key.to(dtype), value, None, 0.1)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), exact, rtol=0.05, atol=0.05)
    found.float().sum().backward()
    assert query.grad.dtype == torch.float32
    assert torch.isfinite(query.grad).all()


def test_compiles_in_one_graph():
    query, key, value = (torch.randn(1, 2, 9, 8, requires_grad=True) for _ in range(3))
    layer = ReLUDropout(0.1).train()

    def run(query, key, value):
        return layer(lean_attention(query, key, value, None, 0.1))

    result = torch.compile(run, backend="aot_eager", fullgraph=True)(query, key, value)
    result.sum().backward()
    assert torch.isfinite(query.grad).all()
