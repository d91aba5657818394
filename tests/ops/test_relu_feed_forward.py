"""The feed-forward network that is one operator, beside its formula in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import ops
from ops import feed_forward, pixel_convolution
from ops.dropout import draw_seed, kept
from ops.linear_layer import FEWEST_PRODUCTS

CHANNELS, HIDDEN, OUTPUTS = 64, 512, 96
TOKENS = FEWEST_PRODUCTS // (CHANNELS * HIDDEN)


@pytest.fixture(autouse=True)
def two_threads(threads):
    torch.set_num_threads(2)


@pytest.fixture(autouse=True, params=[False, True], ids=["AMD", "Intel"])
def processor(request, monkeypatch):
    """Each kind, whatever this one is."""
    monkeypatch.setattr(pixel_convolution, "is_intel", lambda: request.param)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    return request.param


def inputs(tokens=TOKENS, dtype=torch.float32):
    torch.manual_seed(0)
    shapes = (
        (2, tokens // 2, CHANNELS),
        (HIDDEN, CHANNELS),
        (HIDDEN,),
        (OUTPUTS, HIDDEN),
        (OUTPUTS,),
    )
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def run(tokens, weight, bias, output_weight, output_bias, p=0.3, **options):
    hidden, output = (weight, bias), (output_weight, output_bias)
    return ops.relu_feed_forward(tokens, hidden, output, p, **options)


def is_one(output):
    return output.grad_fn.name() == "_FeedForwardBackward"


def in_double(given, p, seed):
    """The formula's output and its inputs, with the mask that the seed of PyTorch gives."""
    tokens, weight, bias, *output = (x.detach().double().requires_grad_() for x in given)
    torch.manual_seed(seed)
    mask = kept((*tokens.shape[:-1], HIDDEN), p, draw_seed()) if p > 0 else 1
    hidden = F.linear(tokens, weight, bias).relu() * mask / (1 - p)
    return F.linear(hidden, *output), [tokens, weight, bias, *output]


def assert_close(found, expected):
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.shape == theirs.shape
        assert (mine - theirs).norm() <= 1e-5 * theirs.norm()


@pytest.mark.parametrize("layout", ["batch first", "batch second", "rows"])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("keep_hidden", [True, False])
def test_output_and_gradients_are_those_in_float64(p, layout, keep_hidden):
    given = inputs()
    if layout == "batch second":
        given[0] = given[0].detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    elif layout == "rows":
        given[0] = given[0].detach().flatten(0, 1).requires_grad_()
    torch.manual_seed(5)
    output = run(*given, p, keep_hidden=keep_hidden)
    assert is_one(output)
    assert output.is_contiguous()
    expected, exact = in_double(given, p, seed=5)
    assert_close([output], [expected])
    cotangent = torch.randn_like(output)
    wanted = torch.autograd.grad(expected, exact, cotangent.double())
    for _ in range(2):  # nothing that is saved is overwritten
        found = torch.autograd.grad(output, given, cotangent, retain_graph=True)
        assert_close(found, wanted)
    assert all(x.is_contiguous() for x in found)
    untouched = cotangent.clone()
    torch.autograd.grad(output, given, cotangent)
    assert torch.equal(cotangent, untouched)


def test_it_is_the_three_operators(monkeypatch):
    given, results = inputs(), []
    for one in (True, False):
        if not one:
            monkeypatch.setattr(feed_forward, "is_one_operator", lambda *_: False)
        torch.manual_seed(1)
        output = run(*given)
        assert is_one(output) == one
        results.append((output, *torch.autograd.grad(output.square().sum(), given)))
    assert torch.equal(results[0][0], results[1][0])
    assert_close(*results)


def test_which_operators_multiply(processor):
    given = inputs()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run(*given, p=0.0).sum().backward()
    counts = {event.key: event.count for event in profile.key_averages()}
    # as products: gradients of both weights, and of the hidden layer, which is the wider one
    assert counts.get("aten::mm", 0) == (3 if processor else 0)
    assert counts["aten::convolution_backward"] == (1 if processor else 2)


def test_without_training_nothing_is_dropped():
    given = inputs()
    torch.testing.assert_close(run(*given, training=False), run(*given, p=0.0))


def test_a_gradient_that_is_one_number_everywhere():
    given = inputs()
    torch.manual_seed(2)
    found = torch.autograd.grad(run(*given).sum(), given)
    expected, exact = in_double(given, 0.3, seed=2)
    assert_close(found, torch.autograd.grad(expected.sum(), exact))


def test_what_needs_no_gradient_has_none():
    given = inputs()
    torch.manual_seed(3)
    wanted = torch.autograd.grad(run(*given).square().sum(), given)
    for needs in itertools.product((False, True), repeat=5):
        if not any(needs):
            continue
        some = [x.detach().requires_grad_(need) for x, need in zip(given, needs, strict=True)]
        torch.manual_seed(3)
        output = run(*some)
        assert is_one(output)
        output.square().sum().backward()
        for x, need, expected in zip(some, needs, wanted, strict=True):
            assert (x.grad is not None) == need
            if need:
                torch.testing.assert_close(x.grad, expected, rtol=1e-5, atol=1e-3)


def test_a_hidden_layer_that_is_computed_again_is_not_kept():
    given = inputs()
    hidden = (*given[0].shape[:-1], HIDDEN)
    for keep_hidden in (True, False):
        shapes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, shapes=shapes: (shapes.append(x.shape), x)[1], lambda x: x
        ):
            output = run(*given, keep_hidden=keep_hidden)
        assert (hidden in shapes) == keep_hidden
        counter = Counter()
        with counter:  # the output, which nobody needs again, is not computed again
            output.sum().backward()
        assert counter.count == (0 if keep_hidden else 1)


def test_a_hidden_layer_is_computed_again_in_the_precision_that_it_had():
    given = inputs()
    output = run(*given, p=0.0, keep_hidden=False)
    cotangent = torch.randn_like(output)
    wanted = torch.autograd.grad(output, given, cotangent, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.autograd.grad(output, given, cotangent)
    assert_close(found, wanted)


class Counter(TorchDispatchMode):
    """Counts convolutions."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten.convolution.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("keep_hidden", [True, False])
def test_second_derivatives(keep_hidden):
    given = inputs()

    def penalty(output, leaves):
        first = torch.autograd.grad(output.square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(x.square().sum() for x in first), leaves)

    torch.manual_seed(4)
    found = penalty(run(*given, keep_hidden=keep_hidden), given)
    assert_close(found, penalty(*in_double(given, 0.3, seed=4)))


def test_a_batch_of_gradients():
    given = inputs()
    output = run(*given)
    cotangents = torch.randn(2, *output.shape)
    batched = torch.autograd.grad(
        output, given, cotangents, is_grads_batched=True, retain_graph=True
    )
    for number, cotangent in enumerate(cotangents):
        expected = torch.autograd.grad(output, given, cotangent, retain_graph=True)
        assert_close([x[number] for x in batched], expected)


def test_transforms_take_the_three_operators():
    tokens, *weights = (x.detach() for x in inputs())
    value, grad = torch.func.grad_and_value(lambda x: run(x, *weights, p=0.0).sum())(tokens)[::-1]
    leaf = tokens.requires_grad_()
    expected = run(leaf, *weights, p=0.0).sum()
    torch.testing.assert_close(value, expected.detach())
    assert_close([grad], torch.autograd.grad(expected, leaf))


def test_where_it_gains_nothing_it_is_the_three_operators():
    few, wide = inputs(tokens=2 * (TOKENS // 2 - 1)), inputs(dtype=torch.float64)
    assert not is_one(run(*few))
    assert not is_one(run(*wide))
    given = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = run(*given)
    assert output.dtype == torch.bfloat16
    assert not is_one(output)
    with torch.no_grad():
        assert run(*given).grad_fn is None
    torch.set_num_threads(1)
    assert not is_one(run(*given))


def test_it_compiles_without_a_graph_break():
    given = inputs()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    results = []
    for function in (run, compiled):
        output = function(*given, p=0.0)
        results.append((output, *torch.autograd.grad(output.square().sum(), given)))
    assert_close(*results)


def test_bad_input_is_refused():
    given = inputs()
    for p in (-0.1, 1.0):
        with pytest.raises(ValueError, match=f"p is {p}, expected a probability below 1"):
            run(*given, p)


@pytest.mark.parametrize("without", [(2,), (4,), (2, 4)])
@pytest.mark.parametrize("again", [False, True])
def test_without_biases(without, again):
    given = [None if i in without else x for i, x in enumerate(inputs())]
    output = run(*given, p=0.0)
    assert is_one(output)
    leaves = [x for x in given if x is not None]
    grads = torch.autograd.grad(output.square().sum(), leaves, create_graph=again)
    exact = [None if x is None else x.detach().double().requires_grad_() for x in given]
    expected = F.linear(F.linear(*exact[:3]).relu(), *exact[3:])
    wanted = torch.autograd.grad(expected.square().sum(), [x for x in exact if x is not None])
    assert_close(grads, wanted)
