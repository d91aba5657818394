"""DAB-DETR against the vectors recorded from detrex."""

import pytest
import torch
from detectron2.config import LazyConfig
from recorded_detectors import RecordedDetector, check_full_size, check_settings
from tiny_dab import batch, build_recorded, tiny_detector
from tiny_deformable import check_initialisation, check_single_results
from tiny_detectors import ROOT, SETTINGS, instances, pattern_image

from detectors.structures import AttentionMaps
from projects.ks_detr.encoder import share_knowledge

RECORDINGS = ["dab_detr", "dab_detr_d256", "dab_detr_patterns", "dab_detr_patterns_d256"]


@pytest.fixture(scope="module", params=RECORDINGS)
def recorded(request):
    folder = ROOT / "tests" / "data" / "detrex"
    if not (folder / f"{request.param}.json").exists():
        folder = request.getfixturevalue("reference_dir") / "detrex" / "detectors"
    return RecordedDetector(folder, request.param)


@pytest.fixture
def detector(recorded):
    return build_recorded(recorded)


def test_preprocess(recorded, detector):
    recorded.check_preprocess(detector)


def test_inference(recorded, detector):
    recorded.check_inference(detector)


@pytest.mark.parametrize("case", ["A", "B", "C"])
def test_training(case, recorded, detector):
    recorded.check_training(detector, case)


def test_training_steps(recorded, detector):
    recorded.check_training_steps(detector)


@pytest.mark.parametrize("backbone", ["r50", "r101", "r50_dc5", "r101_dc5", "swin_t_in1k"])
def test_full_size_keys_and_settings(backbone, reference_dir):
    check_full_size(reference_dir, f"dab_detr_{backbone}_50ep")
    check_settings(reference_dir, f"dab_detr_{backbone}_50ep")


def test_initialisation(reference_dir):
    keys = [
        "input_proj.weight",
        "transformer.encoder.query_scale.layers.0.weight",
        "transformer.encoder.layers.0.attentions.0.attn.in_proj_weight",
        "transformer.encoder.layers.0.ffns.0.activation.weight",
        "transformer.decoder.query_scale.layers.0.weight",
        "transformer.decoder.ref_point_head.layers.0.weight",
        "transformer.decoder.ref_anchor_head.layers.0.weight",
        "transformer.decoder.layers.0.attentions.1.query_pos_sine_proj.weight",
        "transformer.decoder.bbox_embed.layers.0.weight",
        "transformer.decoder.bbox_embed.layers.2.weight",
        "anchor_box_embed.weight",
        "class_embed.weight",
        "class_embed.bias",
    ]
    check_initialisation(reference_dir, "dab_detr_r50_50ep", keys)


def test_dilated_r50_has_its_own_temperature():
    for backbone, temperature in (("r50_dc5", 10), ("r101_dc5", 20), ("r50", 20)):
        path = ROOT / f"projects/baselines/configs/dab_detr_{backbone}_50ep.py"
        model = LazyConfig.load(str(path)).model
        assert model.position_embedding.temperature == temperature, backbone


def test_centers_start_uniform_and_are_trained():
    uniform = tiny_detector(settings=SETTINGS | {"num_queries": 4000})
    centers = uniform.anchor_box_embed.weight[:, :2].sigmoid()
    assert centers.mean().item() == pytest.approx(0.5, abs=0.02)
    assert centers.std().item() == pytest.approx(12**-0.5, abs=0.02)
    model = tiny_detector(uniform_anchor_centers=False).train()
    sum(model(batch()).values()).backward()
    assert (model.anchor_box_embed.weight.grad.abs().sum(0) > 0).all()


def test_a_batch_gives_each_image_its_single_result():
    check_single_results(tiny_detector().eval())


def test_padding_is_seen_in_training_unless_told_otherwise():
    def boxes(items, **options):
        model = tiny_detector(decoder_options=options).train()
        memory = model.encode(model.extract(model.preprocess(items)))
        return model.predict(model.decode(memory, model.queries(memory))).boxes[:, 0]

    alone, together = boxes(batch()[:1]), boxes(batch())
    assert not torch.allclose(alone, together, atol=1e-4)
    masked = boxes(batch(), mask_padding_in_training=True)
    torch.testing.assert_close(masked, alone, rtol=0, atol=1e-5)


def test_a_reference_depends_on_the_box_head_of_one_layer():
    model = tiny_detector(settings=SETTINGS | {"num_decoder_layers": 3}).train()
    memory = model.encode(model.extract(model.preprocess(batch())))
    references = model.decode(memory, model.queries(memory)).references
    bias = model.bbox_embed.layers[-1].bias
    for layer in (1, 2):
        (found,) = torch.autograd.grad(references[layer].sum(), bias, retain_graph=True)
        slope = references[layer] * (1 - references[layer])
        torch.testing.assert_close(found, slope.sum((0, 1)).detach())


def test_attention_maps_on_request_change_nothing():
    model = tiny_detector().eval()
    with torch.no_grad():
        memory = model.encode(model.extract(model.preprocess(batch())))
        queries, maps = model.queries(memory), AttentionMaps()
        plain, mapped = model.decode(memory, queries), model.decode(memory, queries, maps)
    torch.testing.assert_close(plain.states, mapped.states)
    torch.testing.assert_close(plain.references, mapped.references)
    assert [m.shape for m in maps.self_attention] == [(2, 4, 6, 6)] * 2
    assert [m.shape for m in maps.cross_attention] == [(2, 4, 6, 36)] * 2


def test_modulation_follows_the_shape_of_a_box():
    """A wide and a tall box at one place attend along their longer side."""
    model = tiny_detector(settings=SETTINGS | {"num_queries": 2}).eval()
    decoder = model.transformer.decoder
    sine = torch.ones(1, 2, 32)
    boxes = torch.tensor([[[0.5, 0.5, 0.8, 0.2], [0.5, 0.5, 0.2, 0.8]]])
    y, x = decoder._spatial_query(sine, torch.zeros(1, 2, 32), boxes, True).chunk(2, dim=-1)
    torch.testing.assert_close(y[0, 0] / x[0, 0] * (x[0, 1] / y[0, 1]), torch.full((16,), 16.0))
    unmodulated = tiny_detector(decoder_options={"modulate_hw_attn": False})
    assert not any("ref_anchor_head" in key for key in unmodulated.state_dict())
    torch.testing.assert_close(
        unmodulated.transformer.decoder._spatial_query(sine, sine, boxes, True), sine
    )


@pytest.mark.parametrize("patterns", [0, 2])
def test_knowledge_sharing_encoder(patterns):
    plain = tiny_detector(settings=SETTINGS | {"num_patterns": patterns})
    model = tiny_detector(settings=SETTINGS | {"num_patterns": patterns})
    share_knowledge(model.transformer.encoder)
    model.load_state_dict(plain.state_dict(), strict=False)
    expected, losses = plain.train()(batch()), model.train()(batch())
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value)
    assert {"loss_class_share_v", "loss_giou_share_a"} <= losses.keys()
    sum(losses.values()).backward()
    unused = [name for name, p in model.named_parameters() if p.grad is None]
    assert unused == []
    with torch.no_grad():
        found, wanted = model.eval()(batch()), plain.eval()(batch())
    torch.testing.assert_close(found[0]["instances"].scores, wanted[0]["instances"].scores)


def test_checkpointed_layers_have_the_same_gradients():
    gradients = []
    for checkpointed in (False, True):
        model = tiny_detector().train()
        model.transformer.encoder.checkpoint_layers = checkpointed
        sum(model(batch()).values()).backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again)


def test_one_query_one_class_and_a_one_pixel_box():
    model = tiny_detector(settings=SETTINGS | {"num_queries": 1, "num_classes": 1})
    image = pattern_image(0, 32, 48)
    item = {"image": image, "instances": instances((32, 48), [[4, 5, 5, 6]], [0])}
    losses = model.train()([item])
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert len(model.eval()([{"image": image}])[0]["instances"]) == 1
