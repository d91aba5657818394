"""The feed-forward network beside detrex's, and its dropout against the formula."""

import copy

import pytest
import torch
import torch.nn.functional as F
from detrex.layers import FFN
from torch import nn

from detectors.transformer import feed_forward
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
