"""The feed-forward network beside detrex's, and its dropout against the formula."""

import copy

import pytest
import torch
import torch.nn.functional as F
from detrex.layers import FFN
from torch import nn

import ops
from detectors.feed_forward import checkpoint_feedforward, feed_forward
from ops.dropout import draw_seed, kept


def pair(p):
    """The network and detrex's with the same weights."""
    torch.manual_seed(0)
    network = feed_forward(8, 12, p, None).double()
    peer = FFN(8, 12, ffn_drop=p, activation=nn.ReLU()).double()
    peer.load_state_dict(network.state_dict())
    return network, peer


def with_gradients(function, module, tokens, identity):
    inputs = [tokens, *module.parameters()] + ([] if identity is None else [identity])
    output = function(tokens, identity)
    return output, *torch.autograd.grad(output.square().sum(), inputs)


def random_inputs(has_identity):
    tokens, identity = (torch.randn(2, 5, 8, dtype=torch.float64) for _ in range(2))
    return tokens.requires_grad_(), identity.requires_grad_() if has_identity else None


@pytest.mark.parametrize("has_identity", [False, True])
@pytest.mark.parametrize(("p", "training"), [(0.0, True), (0.3, False)])
def test_without_dropout_it_is_detrex_s(p, training, has_identity):
    network, peer = (module.train(training) for module in pair(p))
    inputs = random_inputs(has_identity)
    found, expected = (with_gradients(x, x, *inputs) for x in (network, peer))
    torch.testing.assert_close(found, expected)
    with torch.no_grad():
        assert torch.equal(network(*inputs), found[0])


@pytest.mark.parametrize("has_identity", [False, True])
def test_dropout_is_on_the_hidden_layer_and_on_the_output(has_identity):
    network, _ = pair(0.3)
    inputs = random_inputs(has_identity)
    torch.manual_seed(5)
    masks = [kept(shape, 0.3, draw_seed()).double() / 0.7 for shape in ((2, 5, 12), (2, 5, 8))]

    def formula(tokens, identity):
        first, second = network.layers[0][0], network.layers[1]
        hidden = F.linear(tokens, first.weight, first.bias).clamp(min=0) * masks[0]
        output = F.linear(hidden, second.weight, second.bias) * masks[1]
        return output + (tokens if identity is None else identity)

    expected = with_gradients(formula, network, *inputs)
    torch.manual_seed(5)
    found = with_gradients(network, network, *inputs)
    torch.testing.assert_close(found, expected)
    assert not torch.equal(found[0], network.eval()(*inputs))


def test_an_activation_of_one_s_own_is_copied_and_dropped_from_once():
    activation = nn.GELU()
    network = feed_forward(8, 12, 0.5, activation).double()
    assert network.activation is not activation
    tokens, _ = random_inputs(False)
    torch.manual_seed(1)
    hidden = network.layers[0](tokens)
    zeros = (hidden == 0).double().mean().item()
    assert 0.3 < zeros < 0.7
    whole = F.gelu(network.layers[0][0](tokens))
    torch.testing.assert_close(hidden[hidden != 0], 2 * whole[hidden != 0])


def test_it_can_be_copied_and_compiled():
    network, _ = pair(0.3)
    tokens, _ = random_inputs(False)
    compiled = torch.compile(copy.deepcopy(network), backend="aot_eager", fullgraph=True)
    results = []
    for module in (network, compiled):
        torch.manual_seed(2)
        results.append(with_gradients(module, module, tokens, None))
    torch.testing.assert_close(*results)


def saved_bytes(function):
    """Bytes of the distinct tensors that a function keeps for its backward pass."""
    kept_by_address = {}

    def note(tensor):
        kept_by_address[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        function()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept_by_address.values())


def test_a_hidden_layer_that_is_computed_again_is_the_same():
    network, _ = pair(0.3)
    results = []
    for network.checkpoint_hidden in (False, True):
        torch.manual_seed(3)
        inputs = random_inputs(True)
        results.append([*with_gradients(network, network, *inputs), torch.rand(3)])
    torch.testing.assert_close(*results, rtol=1e-14, atol=1e-14)


def test_a_hidden_layer_that_is_computed_again_is_not_kept():
    network = feed_forward(8, 512, 0.3, None)
    tokens = torch.randn(4, 6, 8, requires_grad=True)
    kept_before = saved_bytes(lambda: network(tokens))
    checkpoint_feedforward(nn.Sequential(network))
    kept_now = saved_bytes(lambda: network(tokens))
    assert kept_before - kept_now >= 4 * 6 * 512 * 4


def test_many_tokens_go_through_in_parts(monkeypatch):
    network, _ = pair(0.0)
    inputs = random_inputs(True)
    expected = with_gradients(network, network, *inputs)
    monkeypatch.setattr("detectors.feed_forward.TOKENS_AT_ONCE", 3)
    checkpoint_feedforward(network)
    rows = []
    network.layers[0].register_forward_hook(lambda _, __, output: rows.append(len(output)))
    found = with_gradients(network, network, *inputs)
    assert rows[:4] == [3, 3, 3, 1]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("training", "expected"), [(True, (2, 1)), (False, (1, 1))])
def test_only_what_leads_to_the_hidden_layer_runs_again(training, expected):
    network = feed_forward(8, 12, 0.3, None).train(training)
    checkpoint_feedforward(network)
    finished = []
    for place in (0, 1):
        network.layers[place].register_forward_hook(lambda *_, place=place: finished.append(place))
    network(torch.randn(4, 8, requires_grad=True)).sum().backward()
    assert (finished.count(0), finished.count(1)) == expected


@pytest.mark.parametrize("shape", [(8,), (0, 8), (2, 3, 5, 8)])
def test_tokens_of_any_shape_are_computed_again(shape):
    network, _ = pair(0.0)
    tokens = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    expected = with_gradients(network, network, tokens, None)
    checkpoint_feedforward(network)
    torch.testing.assert_close(with_gradients(network, network, tokens, None), expected)


def test_a_compiled_network_does_not_count_parts(monkeypatch):
    monkeypatch.setattr("detectors.feed_forward.TOKENS_AT_ONCE", 4)
    network, _ = pair(0.0)
    checkpoint_feedforward(network)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(network, backend=backend, fullgraph=True, dynamic=True)
    for count in (5, 9, 14, 23, 31):
        tokens = torch.randn(count, 8, dtype=torch.float64)
        torch.testing.assert_close(compiled(tokens), network(tokens))
    assert len(graphs) == 1


# --- as one operator -----------------------------------------------------------------------------


@pytest.fixture
def many_tokens(threads):
    """A network and as many tokens as its layers are oneDNN's for."""
    torch.set_num_threads(2)
    torch.manual_seed(0)
    return feed_forward(64, 512, 0.1, None), torch.randn(2, 4096, 64, requires_grad=True)


@pytest.fixture
def calls(monkeypatch):
    """Whether hidden layers were to be kept, for each call of the one operator."""
    function, seen = ops.relu_feed_forward, []

    def noted(*inputs):
        seen.append(inputs[-1])
        return function(*inputs)

    monkeypatch.setattr(ops, "relu_feed_forward", noted)
    return seen


@pytest.mark.parametrize("training", [False, True])
def test_many_tokens_go_through_one_operator(many_tokens, calls, training):
    network, tokens = many_tokens
    network.train(training)
    checkpointed, watched = copy.deepcopy(network), copy.deepcopy(network)
    checkpointed.checkpoint_hidden = training
    watched.layers[0].register_forward_hook(lambda *_: None)
    results = []
    for module in (network, checkpointed, watched):
        torch.manual_seed(1)
        results.append(with_gradients(module, module, tokens, None))
    for one, *others in zip(*results, strict=True):
        assert all((one - other).norm() <= 1e-5 * other.norm() for other in others)
    assert calls == [True, not training]
    with torch.no_grad():
        network(tokens)
    network(tokens[:, :64])
    assert len(calls) == 2


def test_layers_that_somebody_looks_at_run(many_tokens, calls):
    network, tokens = many_tokens
    seen = []
    first, activation, second = *network.layers[0][:2], network.layers[1]
    for add in (
        lambda: first.register_forward_hook(lambda *_: seen.append("first")),
        lambda: activation.register_forward_pre_hook(lambda *_: seen.append("activation")),
        lambda: second.register_full_backward_hook(lambda *_: seen.append("second")),
        lambda: network.layers[0].register_full_backward_pre_hook(lambda *_: seen.append("hidden")),
        lambda: nn.modules.module.register_module_forward_hook(lambda *_: seen.append("all")),
    ):
        handle = add()
        network(tokens).sum().backward()
        handle.remove()
        assert not calls
    assert set(seen) == {"first", "activation", "second", "hidden", "all"}
    network(tokens)
    assert len(calls) == 1


def test_layers_that_were_changed_run(many_tokens, calls):
    network, tokens = many_tokens
    changed = [copy.deepcopy(network) for _ in range(4)]
    changed[0].layers[0][0] = nn.Linear(64, 512)
    changed[1].layers[0][2] = nn.Dropout(0.5)
    nn.utils.parametrizations.weight_norm(changed[2].layers[1])
    changed[3].layers[0].forward = lambda x: changed[3].layers[0][0](x)
    changed.append(feed_forward(64, 512, 0.1, nn.GELU()))
    for other in changed:
        other(tokens).sum().backward()
        assert not calls
