"""The released way that SMCA is timed beside."""

import pytest
import torch
from tiny_detectors import SETTINGS, pattern_image
from tiny_smca import build_single_scale_smca

from projects.smca.attention import Gaussians
from tools.benchmark_smca_peer import PEERS, as_released, gaussian_map


@pytest.fixture
def detectors():
    """Ours and one with the same weights that computes in the released way, in float64."""
    pair = []
    for released in (False, True):
        torch.manual_seed(0)
        model = build_single_scale_smca().double()
        for layer in model.transformer.decoder.layers:
            torch.nn.init.normal_(layer.modulation.scales.weight, std=0.1)
        if released:
            model.transformer = as_released(model.transformer)
        pair.append(model)
    return pair


def test_it_gives_the_same(detectors):
    inputs = [{"image": pattern_image(i, *size)} for i, size in enumerate([(96, 128), (64, 160)])]
    found = []
    for model in detectors:
        memory = model.encode(model.extract(model.preprocess(inputs)))
        output = model.decode(memory, model.queries(memory))
        boxes = model.predict(output).boxes
        (output.states.pow(3).sum() + boxes.sum()).backward()
        found.append([output.states, boxes, *(p.grad for p in model.transformer.parameters())])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_all_attention_is_replaced(detectors):
    ours, released = (model.transformer for model in detectors)
    layers = SETTINGS["num_encoder_layers"] + 2 * SETTINGS["num_decoder_layers"]
    assert sum(type(module) in PEERS for module in ours.modules()) == layers
    assert sum(type(module) in PEERS.values() for module in released.modules()) == layers
    assert not any(type(module) in PEERS for module in released.modules())


def test_the_map_is_the_log_prior():
    gaussians = Gaussians(torch.rand(2, 1, 3, 4, 2) * 5, torch.rand(2, 1, 3, 4, 2))
    expected = gaussians.log_prior(0, (5, 6)).flatten(0, 1).permute(1, 2, 0)
    torch.testing.assert_close(gaussian_map(gaussians, (5, 6), 3), expected)
