"""DN-Deformable-DETR against the vectors recorded from detrex."""

import pytest
import torch
from detectron2.config import LazyConfig
from recorded_detectors import RecordedDetector, check_full_size, check_settings
from tiny_deformable import (
    SETTINGS,
    PyramidBackbone,
    check_initialisation,
    check_single_results,
    common_parts,
    decoder,
    deformable_encoder,
)
from tiny_detectors import ROOT, instances, pattern_image

from detectors.attention import SelfAttention
from detectors.deformable_detr import MultiLevelTransformer
from detectors.dn_deformable_detr import DNDeformableDecoder, DNDeformableDETR
from detectors.structures import AttentionMaps
from detectors.transformer import Encoder, EncoderLayer
from projects.ks_detr.encoder import share_knowledge

NOISED = ("labels", "boxes_cxcywh")


def build_dn_deformable(settings, features, *, norm=True, decoder_options=None, **options):
    """A DN-Deformable-DETR of the given settings on recorded features."""
    transformer = MultiLevelTransformer(
        deformable_encoder(settings),
        decoder(settings, DNDeformableDecoder, **decoder_options or {}),
    )
    parts = common_parts(settings, features, norm) | {"transformer": transformer}
    return DNDeformableDETR(**parts | options)


@pytest.fixture(scope="module", params=["dn_deformable_detr", "dn_deformable_detr_d256"])
def recorded(request):
    folder = ROOT / "tests" / "data" / "detrex"
    if not (folder / f"{request.param}.json").exists():
        folder = request.getfixturevalue("reference_dir") / "detrex" / "detectors"
    return RecordedDetector(folder, request.param)


@pytest.fixture
def detector(recorded):
    settings = recorded.settings
    model = build_dn_deformable(
        settings,
        recorded.features,
        mask_padding_at_inference=False,
        denoising_groups=settings["denoising_groups"],
        label_noise_prob=0.0,
        box_noise_scale=0.0,
    )
    return recorded.load(model)


def test_preprocess(recorded, detector):
    recorded.check_preprocess(detector)


def test_inference(recorded, detector):
    recorded.check_inference(detector)


@pytest.mark.parametrize("case", ["A", "B", "C"])
def test_training(case, recorded, detector):
    recorded.check_training(detector, case)


@pytest.mark.parametrize("case", ["A", "B"])
def test_training_with_recorded_noise(case, recorded, detector, monkeypatch):
    noise = {kind: recorded.arrays[f"noise{case}/noised_{kind}"] for kind in NOISED}
    generator = detector.train().denoising_generator
    monkeypatch.setattr(generator, "noise_labels", lambda labels: noise["labels"])
    monkeypatch.setattr(generator, "noise_boxes", lambda boxes: noise["boxes_cxcywh"])
    inputs = recorded.inputs(case)
    targets = detector.prepare_targets(inputs)
    memory = detector.encode(detector.extract(detector.preprocess(inputs)), targets)
    mask = detector.queries(memory, targets).attention_mask
    assert torch.equal(mask, recorded.arrays[f"noise{case}/attn_mask"])
    losses = detector(inputs)
    expected = recorded.record["train"][f"noise{case}"]["losses"]
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(expected, rel=1e-4)


def test_training_steps(recorded, detector):
    recorded.check_training_steps(detector)


def test_full_size_keys(reference_dir):
    check_full_size(reference_dir, "dn_deformable_detr_r50_50ep")


def test_settings(reference_dir):
    check_settings(reference_dir, "dn_deformable_detr_r50_50ep")


def test_initialisation(reference_dir):
    keys = [
        "tgt_embed.weight",
        "refpoint_embed.weight",
        "denoising_generator.label_encoder.weight",
        "transformer.level_embeds",
        "transformer.encoder.layers.0.ffns.0.layers.0.0.weight",
        "transformer.decoder.query_scale.layers.0.weight",
        "transformer.decoder.ref_point_head.layers.0.weight",
        "transformer.decoder.bbox_embed.0.layers.2.bias",
        "transformer.decoder.bbox_embed.1.layers.2.bias",
        "class_embed.0.bias",
    ]
    check_initialisation(reference_dir, "dn_deformable_detr_r50_50ep", keys)


def test_short_schedule():
    path = ROOT / "projects/baselines/configs/dn_deformable_detr_r50_12ep.py"
    config = LazyConfig.load(str(path))
    assert config.train.max_iter == 90000
    assert list(config.lr_multiplier.scheduler.milestones) == [82500, 90000]


def tiny_detector(settings=SETTINGS, **options):
    torch.manual_seed(0)
    model = build_dn_deformable(settings, {}, **options)
    model.backbone = PyramidBackbone()
    for head in model.bbox_embed:
        torch.nn.init.normal_(head.layers[-1].weight, std=0.1)
    return model


def batch(boxes=((4, 4, 60, 60), (30, 20, 120, 90))):
    """The boxes are on the first image."""
    first, second = (64, 128), (96, 160)
    return [
        {"image": pattern_image(0, *first), "instances": instances(first, boxes, [1] * len(boxes))},
        {"image": pattern_image(1, *second), "instances": instances(second, [], [])},
    ]


def test_a_batch_gives_each_image_its_single_result():
    # group normalisation in the neck mixes padding into its statistics, as it does in detrex
    check_single_results(tiny_detector(norm=False).eval())


def test_padding_moves_embedded_boxes_unless_told_otherwise():
    item, larger = ({"image": pattern_image(0, *size)} for size in ((64, 128), (128, 192)))

    def boxes(items, **options):
        model = tiny_detector(norm=False, decoder_options=options).train()
        memory = model.encode(model.extract(model.preprocess(items)))
        return model.predict(model.decode(memory, model.queries(memory))).boxes[:, 0]

    alone, together = boxes([item]), boxes([item, larger])
    assert not torch.allclose(alone, together, atol=1e-4)
    option = {"embed_unpadded_in_training": True}
    torch.testing.assert_close(boxes([item, larger], **option), alone, rtol=0, atol=1e-5)


def test_noised_targets_do_not_touch_the_other_queries():
    model = tiny_detector().train()
    targets = model.prepare_targets(batch())
    memory = model.encode(model.extract(model.preprocess(batch())))
    with_targets = model.predict(model.decode(memory, model.queries(memory, targets)))
    without = model.predict(model.decode(memory, model.queries(memory)))
    torch.testing.assert_close(with_targets.logits, without.logits)
    assert with_targets.denoised.boxes.shape == (3, 2, 10, 4)


def test_attention_maps_on_request_change_nothing():
    model = tiny_detector().eval()
    with torch.no_grad():
        memory = model.encode(model.extract(model.preprocess(batch())))
        queries, maps = model.queries(memory), AttentionMaps()
        plain, mapped = model.decode(memory, queries), model.decode(memory, queries, maps)
    torch.testing.assert_close(plain.states, mapped.states)
    assert [m.shape for m in maps.self_attention] == [(2, 4, 6, 6)] * 3
    assert [m.shape for m, _ in maps.sampling] == [(2, 6, 4, 4, 4, 2)] * 3


def test_branches_of_a_dense_knowledge_sharing_encoder():
    model = tiny_detector()
    layer = EncoderLayer(SelfAttention(32, 4), 48, ffn_dropout=0.0)
    model.transformer.encoder = share_knowledge(Encoder(layer, 2))
    losses = model.train()(batch())
    assert {"loss_class_dn_share_v", "loss_giou_dn_share_a"} <= losses.keys()
    sum(losses.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("with_indicator", [True, False])
@pytest.mark.parametrize("boxes", [((4, 5, 5, 6),), ()])
def test_one_query_and_one_class(with_indicator, boxes):
    settings = SETTINGS | {"num_queries": 1, "num_classes": 1}
    model = tiny_detector(settings, with_indicator=with_indicator)
    image = pattern_image(0, 64, 96)
    item = {"image": image, "instances": instances((64, 96), boxes, [0] * len(boxes))}
    losses = model.train()([item])
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert (losses["loss_giou_dn"] == 0) == (not boxes)
    assert len(model.eval()([{"image": image}])[0]["instances"]) == 1
