"""Decoder layers that the backward pass computes again: the same numbers, fewer of them kept."""

import every_detector
import pytest
import tiny_deformable
import torch
from every_detector import BUILDERS, batch
from tiny_detectors import SETTINGS
from torch import nn

from detectors.detr import DETRDecoder
from detectors.late_maps import LateMap, LateMaps
from detectors.lean import ReLUDropout
from detectors.structures import AttentionMaps
from detectors.transformer import Encoder
from projects.ks_detr.encoder import share_knowledge


def build(name, dropout=0.2):
    """A detector in training that drops attention weights and activations."""
    model = every_detector.build(name)
    for module in model.transformer.decoder.modules():
        if isinstance(module, nn.Dropout | ReLUDropout):
            module.p = dropout
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = dropout
    return model.double()


def weights_of(maps):
    """Every collected map as a tensor."""
    lists = (maps.self_attention, maps.cross_attention, maps.gaussian)
    found = [entry() if isinstance(entry, LateMap) else entry for part in lists for entry in part]
    return found + [tensor for entry in maps.sampling for tensor in entry]


def step(model, maps=None):
    """Losses, maps and gradients of a step that also learns from the maps, and the next draw."""
    torch.manual_seed(7)
    inputs = batch()
    targets = model.prepare_targets(inputs)
    memory = model.encode(model.extract(model.preprocess(inputs)), targets)
    output = model.decode(memory, model.queries(memory, targets), maps)
    losses = model.losses(model.predict(output), targets)
    weights = [] if maps is None else weights_of(maps)
    total = sum(losses.values()) + sum(weight.square().sum() for weight in weights)
    model.zero_grad()
    total.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {
        "states": output.states, "losses": losses, "maps": weights, "grads": grads,
        "next": torch.rand(3),
    }  # fmt: skip


def both(model, make_maps):
    """The step with layers kept, and computed again."""
    results = []
    for model.transformer.decoder.checkpoint_layers in (False, True):
        results.append(step(model, make_maps()))
    return results


def check_equal(results):
    plain, again = results
    grads = plain["grads"]
    layers = [name for name in grads if name.startswith("transformer.decoder.layers.0.")]
    assert sum(grads[name].abs().sum() for name in layers) > 0
    torch.testing.assert_close(again, plain, rtol=1e-12, atol=1e-12)


MAPS = {
    "no_maps": lambda: None,
    "kept_maps": AttentionMaps,
    "late_maps": lambda: AttentionMaps(LateMaps(), LateMaps()),
}


@pytest.mark.parametrize("maps", MAPS)
@pytest.mark.parametrize("name", BUILDERS)
def test_results_and_gradients_are_the_same(name, maps):
    check_equal(both(build(name), MAPS[maps]))


@pytest.mark.parametrize("name", ["conditional", "deformable"])
def test_branches_are_decoded_as_without(name):
    model = build(name)
    share_knowledge(model.transformer.encoder)
    check_equal(both(model.double().train(), MAPS["late_maps"]))


def widely(model):
    """The model, that computes what is wide again."""
    model.transformer.decoder.checkpoint_layers = "wide"
    return model


@pytest.mark.parametrize("name", BUILDERS)
def test_what_is_wide_alone_gives_the_same(name):
    check_equal((step(build(name)), step(widely(build(name)))))


@pytest.mark.parametrize("name", ["detr", "conditional", "dab", "deformable", "smca"])
def test_what_is_wide_is_not_kept(name):
    plain, wide = (kept_bytes(model) for model in (build(name), widely(build(name))))
    assert wide < 0.9 * plain


def test_what_is_wide_is_named_by_the_option():
    def marked(decoder):
        return {
            name
            for name, module in decoder.named_modules()
            if getattr(module, "checkpoint_hidden", False)
            or getattr(module, "checkpoint_value", False)
        }

    wide = {f"layers.{layer}.{part}" for layer in range(3) for part in ("attentions.1", "ffns.0")}
    for option in (False, True, "wide"):
        decoder = tiny_deformable.decoder(tiny_deformable.SETTINGS, checkpoint_layers=option)
        assert marked(decoder) == (wide if option == "wide" else set())
    for decoder.checkpoint_layers in (True, "wide", False):
        expected = wide if decoder.checkpoint_layers == "wide" else set()
        assert marked(decoder) == expected


def test_another_option_is_refused():
    with pytest.raises(
        ValueError, match="checkpoint_layers is 'ffn', expected True, False or 'wide'"
    ):
        DETRDecoder(8, 2, checkpoint_layers="ffn")
    encoder = tiny_deformable.deformable_encoder(tiny_deformable.SETTINGS)
    with pytest.raises(ValueError, match="checkpoint_layers is 'wide', expected True or False"):
        Encoder(encoder.layers[0], 1, checkpoint_layers="wide")


@pytest.mark.parametrize("maps", ["kept_maps", "late_maps"])
def test_computing_again_collects_nothing_more(maps):
    model = build("conditional")
    model.transformer.decoder.checkpoint_layers = True
    collected = MAPS[maps]()
    step(model, collected)
    kind = LateMap if maps == "late_maps" else torch.Tensor
    for part in (collected.self_attention, collected.cross_attention):
        assert len(part) == SETTINGS["num_decoder_layers"]
        assert all(isinstance(entry, kind) for entry in part)


@pytest.mark.parametrize("name", BUILDERS)
def test_dropout_makes_a_difference(name):
    """Else the tests above would say nothing of the random numbers that layers draw."""
    states = [step(build(name, dropout))["states"] for dropout in (0.0, 0.2)]
    assert (states[0] - states[1]).abs().max() > 0.01


@pytest.mark.parametrize("name", BUILDERS)
def test_layers_run_again_in_training_alone(name):
    model = build(name)
    calls = []
    for layer in model.transformer.decoder.layers:
        layer.register_forward_pre_hook(lambda *_: calls.append(1))
    layers = len(model.transformer.decoder.layers)
    for checkpoint_layers, expected in ((False, layers), (True, 2 * layers)):
        model.transformer.decoder.checkpoint_layers = checkpoint_layers
        calls.clear()
        step(model)
        assert len(calls) == expected
    calls.clear()
    output = model.eval()(batch())
    assert len(output) == 2
    assert len(calls) == layers


def kept_bytes(model):
    """Bytes of the distinct tensors that the decoder keeps for the backward pass."""
    memory = model.encode(model.extract(model.preprocess(batch())))
    queries = model.queries(memory)
    kept = {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model.decode(memory, queries)
    ours = {id(p) for p in model.parameters()}
    return sum(t.untyped_storage().nbytes() for t in kept.values() if id(t) not in ours)


@pytest.mark.parametrize("name", ["detr", "conditional", "dab", "deformable", "smca", "adamixer"])
def test_less_is_kept(name):
    model, found = build(name), []
    for model.transformer.decoder.checkpoint_layers in (False, True):
        found.append(kept_bytes(model))
    assert found[1] < found[0] / 2
