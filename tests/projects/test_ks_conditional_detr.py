"""KS-Conditional-DETR beside its plain detector: evaluation, cost, gradients, precision."""

import pytest
import torch
from fvcore.nn import FlopCountAnalysis
from tiny_detectors import (
    SETTINGS,
    StridedBackbone,
    build_conditional,
    instances,
    pattern_image,
)

from detectors.structures import AttentionMaps
from projects.ks_detr.checkpoint import plain_state_dict
from projects.ks_detr.encoder import share_knowledge


def tiny_pair():
    torch.manual_seed(0)
    student, plain = build_conditional(SETTINGS, {}), build_conditional(SETTINGS, {})
    share_knowledge(student.transformer.encoder)
    for model in (student, plain):
        model.backbone = StridedBackbone()
    plain.load_state_dict(plain_state_dict(student.state_dict()), strict=True)
    return student, plain


def test_evaluation_is_the_plain_detector_bit_for_bit():
    student, plain = tiny_pair()
    inputs = [{"image": pattern_image(i, 64, 96 - 16 * i)} for i in range(2)]
    with torch.no_grad():
        ours, theirs = student.eval()(inputs), plain.eval()(inputs)
    for a, b in zip(ours, theirs, strict=True):
        a, b = a["instances"], b["instances"]
        assert torch.equal(a.pred_boxes.tensor, b.pred_boxes.tensor)
        assert torch.equal(a.scores, b.scores)
        assert torch.equal(a.pred_classes, b.pred_classes)


class PredictionTensors(torch.nn.Module):
    """A detector as a function of one image that returns tensors, as FLOP counting wants it."""

    def __init__(self, detector):
        super().__init__()
        self.detector = detector

    def forward(self, image):
        result = self.detector([{"image": image}])[0]["instances"]
        return result.pred_boxes.tensor, result.scores


def test_evaluation_costs_what_the_plain_detector_costs():
    flops = []
    for model in tiny_pair():
        count = FlopCountAnalysis(PredictionTensors(model.eval()), pattern_image(0, 64, 96))
        count.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        flops.append(count.total())
    assert flops[0] == flops[1] > 0


def test_every_parameter_gets_a_gradient_without_ground_truth():
    """DDP waits for all parameters, also when no image of the batch has an object."""
    student, _ = tiny_pair()
    item = {"image": pattern_image(0, 64, 64), "instances": instances((64, 64), [], [])}
    sum(student.train()([item, item]).values()).backward()
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None, name


def test_losses_are_weighted_like_the_students():
    student, _ = tiny_pair()
    item = {
        "image": pattern_image(0, 64, 64),
        "instances": instances((64, 64), [[8, 8, 40, 40]], [2]),
    }
    losses = student.train()([item])
    student.criterion.weight_dict = {"loss_class": 0.0, "loss_bbox": 5.0, "loss_giou": 2.0}
    reweighted = student([item])
    for name, loss in losses.items():
        expected = 0.0 if name.startswith("loss_class") else loss.item()
        assert reweighted[name].item() == pytest.approx(expected), name


def test_teacher_attention_is_not_in_the_memory_of_evaluation():
    student, _ = tiny_pair()
    student.eval()
    inputs = [{"image": pattern_image(0, 64, 96)}]
    memory = student.encode(student.extract(student.preprocess(inputs)))
    assert [branch.name for branch in memory.branches] == ["student"]
    assert memory.tokens.shape[0] == 1
    maps = AttentionMaps()
    student.decode(memory, student.queries(memory), maps)
    assert len(maps.cross_attention) == SETTINGS["num_decoder_layers"]


@pytest.mark.parametrize("boxes", [[[4, 4, 40, 40]], []])
def test_bfloat16_autocast(boxes):
    student, _ = tiny_pair()
    truth = instances((64, 64), boxes, [1] * len(boxes))
    item = {"image": pattern_image(0, 64, 64), "instances": truth}
    exact = student.train()([item])
    with torch.autocast("cpu", torch.bfloat16):
        losses = student([item])
    sum(losses.values()).backward()
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(exact[name].item(), rel=0.1, abs=1e-3), name
    assert all(torch.isfinite(p.grad).all() for p in student.parameters())


def test_encode_and_decode_compile_without_a_graph_break():
    student, _ = tiny_pair()
    truth = instances((64, 96), [[4, 4, 40, 40]], [1])
    inputs = [{"image": pattern_image(i, 64, 96), "instances": truth} for i in range(2)]
    student.train()
    features, targets = student.extract(student.preprocess(inputs)), student.prepare_targets(inputs)
    memory = student.encode(features, targets)
    output = student.decode(memory, student.queries(memory))
    encode = torch.compile(student.encode, backend="eager", fullgraph=True)
    decode = torch.compile(student.decode, backend="eager", fullgraph=True)
    torch.testing.assert_close(encode(features, targets).tokens, memory.tokens)
    torch.testing.assert_close(decode(memory, student.queries(memory)).states, output.states)
