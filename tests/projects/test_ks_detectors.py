"""Knowledge sharing in every detector: precision, empty batches, few queries, recomputation."""

import pytest
import torch
from tiny_dab import tiny_detector as tiny_dab
from tiny_deformable import (
    SETTINGS as DEFORMABLE,
)
from tiny_deformable import (
    PyramidBackbone,
    build_deformable,
    common_parts,
    decoder,
    deformable_encoder,
)
from tiny_detectors import SETTINGS, StridedBackbone, build_conditional, instances, pattern_image

from detectors.dab_detr import DABDETR
from detectors.deformable_detr import MultiLevelTransformer
from detectors.dn_deformable_detr import DNDeformableDecoder, DNDeformableDETR
from detectors.dn_detr import DNDETR
from projects.ks_detr.checkpoint import plain_state_dict
from projects.ks_detr.encoder import share_knowledge


def conditional(settings):
    model = build_conditional(settings, {})
    model.backbone = StridedBackbone()
    return model


def multi_level(build):
    def build_with_backbone(settings):
        model = build(DEFORMABLE | settings)
        model.backbone = PyramidBackbone()
        return model

    return build_with_backbone


def dn_deformable(settings):
    transformer = MultiLevelTransformer(
        deformable_encoder(settings), decoder(settings, DNDeformableDecoder)
    )
    return DNDeformableDETR(**common_parts(settings, {}) | {"transformer": transformer})


DETECTORS = {
    "conditional": conditional,
    "dab": lambda settings: tiny_dab(DABDETR, settings),
    "dn": lambda settings: tiny_dab(DNDETR, settings),
    "deformable": multi_level(lambda settings: build_deformable(settings, {})),
    "two_stage": multi_level(
        lambda settings: build_deformable(settings, {}, refine=True, two_stage=True)
    ),
    "dn_deformable": multi_level(dn_deformable),
}


def build(name, settings=SETTINGS, **options):
    torch.manual_seed(0)
    model = DETECTORS[name](settings)
    share_knowledge(model.transformer.encoder, **options)
    model.transformer.decoder.checkpoint_layers = "wide"  # as in most of the configs
    return model.train()


def batch(boxes=((8, 8, 60, 60), (30, 20, 110, 90)), classes=(1, 3)):
    """Two images of different sizes; the boxes are on the first."""
    large, small = (96, 128), (64, 96)
    truth = instances(large, boxes, classes[: len(boxes)]), instances(small, [], [])
    return [
        {"image": pattern_image(index, *size), "instances": truth[index]}
        for index, size in enumerate((large, small))
    ]


def total(model, inputs):
    torch.manual_seed(7)  # the same noised targets every time
    return sum(model(inputs).values())


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("name", DETECTORS)
def test_every_parameter_has_a_gradient_without_boxes(name, layers):
    """Distributed training waits for all parameters, also where no image has an object."""
    model = build(name, layers=layers)
    total(model, batch(())).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("boxes", [((8, 8, 60, 60), (30, 20, 110, 90)), ()])
@pytest.mark.parametrize("name", DETECTORS)
def test_low_precision(name, boxes, dtype):
    model, inputs = build(name), batch(boxes)
    exact = total(model, inputs)
    with torch.autocast("cpu", dtype):
        loss = total(model, inputs)
    loss.backward()
    assert loss.item() == pytest.approx(exact.item(), rel=0.1, abs=1e-3)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("name", DETECTORS)
def test_one_query_and_one_class(name):
    model = build(name, SETTINGS | {"num_queries": 1, "num_classes": 1})
    loss = total(model, batch(((8, 8, 60, 60),), (0,)))
    loss.backward()
    assert torch.isfinite(loss)


@pytest.mark.parametrize("name", DETECTORS)
def test_recomputed_layers_give_the_same_gradients(name):
    gradients = []
    for keep_hidden, in_encoder, in_decoder in (
        (True, False, False), (False, False, "wide"), (False, True, "wide"), (True, True, True),
    ):  # fmt: skip
        model = build(name, layers=2, keep_hidden=keep_hidden)
        model.transformer.encoder.checkpoint_layers = in_encoder
        model.transformer.decoder.checkpoint_layers = in_decoder
        total(model, batch()).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for found in gradients[1:]:
        torch.testing.assert_close(found, gradients[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", DETECTORS)
def test_a_built_detector_stays_as_it_is(name):
    torch.manual_seed(0)
    model = DETECTORS[name](SETTINGS).eval()
    inputs = [{"image": item["image"]} for item in batch()]
    with torch.no_grad():
        before = model(inputs)
        share_knowledge(model.transformer.encoder)
        after = model(inputs)
    assert not any(module.training for module in model.modules())
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a["instances"].pred_boxes.tensor, b["instances"].pred_boxes.tensor)
        assert torch.equal(a["instances"].scores, b["instances"].scores)


@pytest.mark.parametrize("name", ["conditional", "dab"])
def test_branches_do_not_depend_on_padding_in_training(name):
    model = build(name).double()
    model.transformer.decoder.mask_padding_in_training = True
    found = []
    for inputs in (batch(), batch()[1:]):
        targets = model.prepare_targets(inputs)
        memory = model.encode(model.extract(model.preprocess(inputs)), targets)
        predictions = model.predict(model.decode(memory, model.queries(memory, targets)))
        found.append((predictions.logits[:, -1], predictions.boxes[:, -1]))
    assert len(found[0][0]) == SETTINGS["num_decoder_layers"] + 2  # student and two teachers
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("name", DETECTORS)
def test_student_learns_and_detects_as_the_plain_detector(name, layers):
    sharing = build(name, layers=layers)
    torch.manual_seed(0)
    plain = DETECTORS[name](SETTINGS).train()
    plain.load_state_dict(plain_state_dict(sharing.state_dict()))
    torch.manual_seed(7)
    expected = plain(batch())
    torch.manual_seed(7)
    found = sharing(batch())
    for loss, value in expected.items():
        assert found[loss].item() == pytest.approx(value.item(), rel=1e-4, abs=1e-5), loss
    inputs = [{"image": item["image"]} for item in batch()]
    with torch.no_grad():
        ours, theirs = sharing.eval()(inputs), plain.eval()(inputs)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a["instances"].pred_boxes.tensor, b["instances"].pred_boxes.tensor)
        assert torch.equal(a["instances"].scores, b["instances"].scores)


@pytest.mark.parametrize("name", DETECTORS)
def test_branches_are_weighted(name):
    weights = {"share_v": 0.5, "share_a": 2.0}
    losses = []
    for options in ({}, {"branch_loss_weights": weights}):
        model = build(name, **options)
        torch.manual_seed(7)
        losses.append(model(batch()))
    for loss, value in losses[0].items():
        branch = next((name for name in weights if name in loss), None)
        expected = value.item() * weights.get(branch, 1.0)
        assert losses[1][loss].item() == pytest.approx(expected, rel=1e-5), loss


@pytest.mark.parametrize("name", DETECTORS)
def test_teachers_reach_the_student_through_what_they_share(name):
    """With the student's own losses left out, its shared projections still learn."""
    model = build(name)
    losses = model(batch())
    sum(value for loss, value in losses.items() if "share_" in loss).backward()
    attention = model.transformer.encoder.layers[-1].attentions[0]
    if hasattr(attention, "attn"):
        shared = list(attention.attn.in_proj_weight.grad.chunk(3))
    else:
        shared = [attention.value_proj.weight.grad, attention.attention_weights.weight.grad]
    assert all(part.any() for part in shared)


@pytest.mark.parametrize("name", ["dn", "two_stage"])
def test_encode_and_decode_compile_without_a_graph_break(name):
    model, inputs = build(name), batch()
    features = model.extract(model.preprocess(inputs))
    targets = model.prepare_targets(inputs)

    def run(features, targets):
        memory = model.encode(features, targets)
        return model.predict(model.decode(memory, model.queries(memory)))

    compiled = torch.compile(run, backend="eager", fullgraph=True)(features, targets)
    torch.testing.assert_close(compiled.boxes, run(features, targets).boxes)


class Raw(torch.nn.Module):
    """Logits and boxes of an image: from a tensor to tensors, as exporters want it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, image):
        memory = self.model.encode(self.model.extract(self.model.preprocess([{"image": image}])))
        predictions = self.model.predict(self.model.decode(memory, self.model.queries(memory)))
        return predictions.logits[-1], predictions.boxes[-1]


@pytest.mark.parametrize("name", DETECTORS)
def test_an_exported_detector_is_the_plain_one(name):
    sharing = build(name).eval()
    plain = DETECTORS[name](SETTINGS).eval()
    plain.load_state_dict(plain_state_dict(sharing.state_dict()))
    first, second = (image.float() for image in (batch()[0]["image"], pattern_image(3, 96, 128)))
    with torch.no_grad():
        exported = torch.export.export(Raw(sharing), (first,)).module()
        for ours, theirs in zip(exported(second), Raw(plain)(second), strict=True):
            assert torch.equal(ours, theirs)
