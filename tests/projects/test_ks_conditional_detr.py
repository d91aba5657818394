"""KS-Conditional-DETR whole, against losses and gradients of the released implementation."""

import json
import zlib

import numpy as np
import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from fvcore.nn import FlopCountAnalysis
from tiny_detectors import (
    ROOT,
    SETTINGS,
    StridedBackbone,
    StubBackbone,
    build_conditional,
    instances,
    pattern_image,
)

from detectors.structures import AttentionMaps
from projects.ks_detr.checkpoint import from_released, plain_state_dict
from projects.ks_detr.encoder import share_knowledge

CASES = {
    "conditional": {},
    "conditional_mark": {"teacher_features": "mark"},
    "conditional_all_levels": {"teacher_aux_loss": True},
}
MODEL = {
    "embed_dim": 256,
    "num_heads": 8,
    "feedforward_dim": 64,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
    "num_classes": 7,
    "num_queries": 12,
    "c5": 16,
    "select_box_nums_for_evaluation": 12,
}


def formula_weights(shapes, seed):
    """The weights of the recorded models, from their keys alone."""
    weights = {}
    for key, shape in shapes.items():
        rng = np.random.RandomState((zlib.crc32(key.encode()) + seed) % 2**32)
        noise = rng.standard_normal(shape)
        if len(shape) >= 2:
            value = noise / np.sqrt(np.prod(shape[1:]))
        else:
            value = 1 + 0.1 * noise if key.endswith("weight") else 0.1 * noise
        weights[key] = torch.from_numpy(np.asarray(value, dtype=np.float32))
    return weights


@pytest.fixture(scope="module", params=CASES)
def recorded(request):
    folder = ROOT / "tests" / "data" / "ks_detr"
    record = json.loads((folder / "models.json").read_text())
    arrays = np.load(folder / "models.npz")
    prefixes = ("inputs/", request.param + "/")
    data = {k: torch.from_numpy(arrays[k]) for k in arrays.files if k.startswith(prefixes)}
    case = record["cases"][request.param]
    model = build_conditional(MODEL, {"res5": data["inputs/train_features/res5"]})
    share_knowledge(model.transformer.encoder, **CASES[request.param])
    model.double()
    model.load_state_dict(
        from_released(formula_weights(case["state_dict_shapes"], record["about"]["seed"]))
    )
    return request.param, record["about"], case, data, model


def training_inputs(about):
    return [
        {
            "image": pattern_image(i, *image["image_size_hw"]),
            "instances": instances(image["image_size_hw"], image["boxes_xyxy"], image["classes"]),
        }
        for i, image in enumerate(about["train_images"])
    ]


def expected_losses(case, losses):
    """Recorded losses under our names: they number all output levels in one row."""
    last = case["number_of_output_levels"] - 1
    layers, renamed = MODEL["num_decoder_layers"], {}
    rows = [("", layer, layer == layers - 1) for layer in range(layers)]
    for branch in ("_share_v", "_share_a"):
        first = 0 if last == 3 * layers - 1 else layers - 1
        rows += [(branch, layer, layer == layers - 1) for layer in range(first, layers)]
    for level, (branch, layer, is_last) in enumerate(rows):
        for kind in ("class", "bbox", "giou"):
            recorded_name = f"loss_{kind}" + ("" if level == last else f"_{level}")
            ours = f"loss_{kind}{branch}" + ("" if is_last else f"_{layer}")
            renamed[ours] = losses[recorded_name]
    return renamed


def test_losses_and_gradients(recorded):
    _, about, case, data, model = recorded
    model.backbone = StubBackbone({"res5": data["inputs/train_features/res5"]})
    model.train().zero_grad()
    losses = model(training_inputs(about))
    expected = expected_losses(case, case["losses"])
    assert losses.keys() == expected.keys()
    for loss, value in expected.items():
        assert losses[loss].item() == pytest.approx(value, rel=1e-5), loss
    total = sum(losses.values())
    assert total.item() == pytest.approx(case["total"], rel=1e-5)
    total.backward()
    gradients = {key: p.grad for key, p in model.named_parameters()}
    for key, norm in case["gradient_norms"].items():
        if key.startswith("ksgt"):
            teacher = "transformer.encoder.layers.1.attentions.0.teacher.features.linear."
            found = gradients[teacher + key.rpartition(".")[2]]
        elif "encoder.layers.1" in key and "in_proj" in key:
            found = torch.cat([gradients[key], gradients[key.replace("attn.in", "teacher.in")]])
        else:
            found = gradients[key]
        assert found.norm().item() == pytest.approx(norm, rel=1e-4, abs=1e-6), key


def test_student_inference(recorded):
    name, about, _, data, model = recorded
    model.backbone = StubBackbone({"res5": data["inputs/eval_features/res5"]})
    model.eval()
    height, width = about["eval_image_hw"]
    with torch.no_grad():
        result = model([{"image": pattern_image(0, height, width)}])[0]["instances"]
    expected = {k: data[f"{name}/eval/student/result_{k}"] for k in ("boxes", "scores", "classes")}
    torch.testing.assert_close(
        result.pred_boxes.tensor.float(), expected["boxes"].float(), rtol=1e-5, atol=1e-3
    )
    torch.testing.assert_close(
        result.scores.float(), expected["scores"].float(), rtol=1e-5, atol=1e-6
    )
    assert torch.equal(result.pred_classes, expected["classes"].long())


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


def test_full_size_config_has_the_released_parameter_count(reference_dir):
    config = LazyConfig.load(str(ROOT / "projects/ks_detr/configs/ks_conditional_detr_r50_50ep.py"))
    model = instantiate(config.model)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == 43_669_334
    record = reference_dir / "ks_detr/checkpoint_keys/ks_conditional_detr_r50_triple.json"
    shapes = json.loads(record.read_text())["state_dict"]
    released = {key: torch.empty(shape, device="meta") for key, (shape, _) in shapes.items()}
    ours = {key: value.shape for key, value in model.state_dict().items()}
    assert {key: value.shape for key, value in from_released(released).items()} == ours


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
