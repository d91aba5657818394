"""Deformable-DETR, plain, refining boxes and in two stages, against vectors from detrex."""

import pytest
import torch
from detectron2.config import LazyConfig
from detrex.layers import ShapeSpec
from detrex.modeling.neck import ChannelMapper
from recorded_detectors import RecordedDetector, check_full_size, check_settings
from tiny_deformable import (
    SETTINGS,
    PyramidBackbone,
    build_deformable,
    check_initialisation,
    check_single_results,
    decoder,
    deformable_encoder,
)
from tiny_detectors import ROOT, instances, pattern_image

from detectors.attention import SelfAttention
from detectors.deformable_attention import DeformableSelfAttention
from detectors.deformable_detr import DeformableTransformer
from detectors.structures import AttentionMaps, Queries
from detectors.transformer import Encoder, EncoderLayer
from projects.ks_detr.encoder import share_knowledge

VARIANTS = {
    "deformable_detr": {},
    "deformable_detr_box_refine": {"refine": True},
    "deformable_detr_two_stage": {"refine": True, "two_stage": True},
}
NAMES = [name + size for name in VARIANTS for size in ("", "_d256")]


@pytest.fixture(scope="module", params=NAMES)
def recorded(request):
    folder = ROOT / "tests" / "data" / "detrex"
    if not (folder / f"{request.param}.json").exists():
        folder = request.getfixturevalue("reference_dir") / "detrex" / "detectors"
    return RecordedDetector(folder, request.param)


@pytest.fixture
def detector(recorded):
    variant = VARIANTS[recorded.record["detector"].removesuffix("_d256")]
    model = build_deformable(
        recorded.settings, recorded.features, mask_padding_at_inference=False, **variant
    )
    return recorded.load(model)


def test_preprocess(recorded, detector):
    recorded.check_preprocess(detector)


def test_inference(recorded, detector):
    recorded.check_inference(detector)


@pytest.mark.parametrize("case", ["A", "B", "C"])
def test_training(case, recorded, detector):
    recorded.check_training(detector, case)


def test_training_steps(recorded, detector):
    recorded.check_training_steps(detector)


def test_proposals(recorded, detector):
    if "eval/enc_class" not in recorded.arrays:
        pytest.skip("has one stage")
    detector.eval()
    with torch.no_grad():
        memory = detector.encode(detector.extract(detector.preprocess(recorded.inputs())))
        queries = detector.queries(memory)
    proposals = queries.proposals
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(proposals.logits[0], recorded.arrays["eval/enc_class"], **close)
    boxes = recorded.arrays["eval/enc_coord_unact"].sigmoid()
    torch.testing.assert_close(proposals.boxes[0], boxes, rtol=0, atol=2e-5)
    start = recorded.arrays["eval/init_reference"]
    torch.testing.assert_close(queries.references, start, rtol=0, atol=2e-5)


FULL_SIZE = [
    "deformable_detr_r50_50ep",
    "deformable_detr_r50_with_box_refinement_50ep",
    "deformable_detr_r50_two_stage_50ep",
]


@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size_keys(name, reference_dir):
    check_full_size(reference_dir, name)


@pytest.mark.parametrize("name", FULL_SIZE)
def test_settings(name, reference_dir):
    check_settings(reference_dir, name)


@pytest.mark.parametrize("name", FULL_SIZE)
def test_initialisation(name, reference_dir):
    boxes = "bbox_embed." if name == FULL_SIZE[0] else "transformer.decoder.bbox_embed."
    classes = "transformer.decoder.class_embed." if "two_stage" in name else "class_embed."
    keys = [
        "neck.convs.0.conv.weight",
        "neck.extra_convs.0.conv.bias",
        "transformer.level_embeds",
        "transformer.encoder.layers.0.attentions.0.sampling_offsets.bias",
        "transformer.encoder.layers.0.attentions.0.value_proj.weight",
        "transformer.decoder.layers.1.attentions.0.attn.in_proj_weight",
        "transformer.decoder.layers.1.attentions.1.attention_weights.weight",
        "transformer.decoder.layers.1.ffns.0.layers.0.0.weight",
        f"{classes}0.weight",
        f"{classes}0.bias",
        f"{boxes}0.layers.0.weight",
        f"{boxes}0.layers.2.bias",
    ]
    if name != FULL_SIZE[0]:
        keys += [f"{classes}5.weight", f"{boxes}5.layers.2.weight", f"{boxes}5.layers.2.bias"]
    if "two_stage" in name:
        keys += ["transformer.enc_output.weight", "transformer.pos_trans.weight"]
    else:
        keys += ["query_embedding.weight", "transformer.reference_points.weight"]
    check_initialisation(reference_dir, name, keys)


@pytest.mark.parametrize(
    ("name", "depth", "steps"),
    [("r50_12ep", 50, 90000), ("r101_12ep", 101, 90000), ("r101_24ep", 101, 180000),
     ("r101_50ep", 101, 375000)],
)  # fmt: skip
def test_other_schedules_and_backbones(name, depth, steps):
    path = ROOT / f"projects/baselines/configs/deformable_detr_{name}.py"
    config = LazyConfig.load(str(path))
    assert config.model.backbone.stages.depth == depth
    assert config.train.init_checkpoint.endswith(f"R-{depth}.pkl")
    assert config.train.output_dir == f"./output/deformable_detr_{name}"
    assert config.train.max_iter == steps
    assert config.lr_multiplier.scheduler.milestones[-1] == pytest.approx(steps, rel=0.01)


def tiny_detector(settings=SETTINGS, **options):
    torch.manual_seed(0)
    model = build_deformable(settings, {}, **options)
    model.backbone = PyramidBackbone()
    for head in model.bbox_embed:
        torch.nn.init.normal_(head.layers[-1].weight, std=0.1)
    return model


def batch(boxes=((4, 4, 60, 60), (30, 20, 120, 90)), sizes=((64, 128), (96, 160))):
    """The boxes are on the first image."""
    return [
        {
            "image": pattern_image(0, *sizes[0]),
            "instances": instances(sizes[0], boxes, [1, 3][: len(boxes)]),
        },
        {"image": pattern_image(1, *sizes[1]), "instances": instances(sizes[1], [], [])},
    ]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_batch_gives_each_image_its_single_result(variant):
    # group normalisation in the neck mixes padding into its statistics, as it does in detrex
    model = tiny_detector(norm=False, **VARIANTS[variant]).eval()
    check_single_results(model)
    model.mask_padding_at_inference = False
    with pytest.raises(AssertionError):
        check_single_results(model)


@pytest.mark.parametrize("refine", [False, True])
def test_attention_maps_on_request_change_nothing(refine):
    model = tiny_detector(refine=refine).eval()
    with torch.no_grad():
        memory = model.encode(model.extract(model.preprocess(batch())))
        queries, maps = model.queries(memory), AttentionMaps()
        plain, mapped = model.decode(memory, queries), model.decode(memory, queries, maps)
    torch.testing.assert_close(plain.states, mapped.states)
    assert [m.shape for m in maps.self_attention] == [(2, 4, 6, 6)] * 3
    for locations, weights in maps.sampling:
        assert locations.shape == (2, 6, 4, 4, 4, 2)
        torch.testing.assert_close(weights.sum((-2, -1)), torch.ones(2, 6, 4))
    assert len(maps.sampling) == 3


@pytest.mark.parametrize("variant", VARIANTS)
def test_checkpointed_layers_give_the_same_gradients(variant):
    gradients = []
    for checkpoint_layers in (False, True):
        model = tiny_detector(**VARIANTS[variant])
        model.transformer.encoder.checkpoint_layers = checkpoint_layers
        sum(model.train()(batch()).values()).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert gradients[0]["neck.convs.0.conv.weight"].abs().sum() > 0
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("variant", VARIANTS)
def test_branches_of_a_dense_knowledge_sharing_encoder(variant):
    def dense(layers):
        torch.manual_seed(1)
        return Encoder(EncoderLayer(SelfAttention(32, 4), 48, ffn_dropout=0.0), layers)

    plain = tiny_detector(**VARIANTS[variant], encoder=dense(2)).train()
    sharing = tiny_detector(**VARIANTS[variant], encoder=share_knowledge(dense(2))).train()
    sharing.load_state_dict(plain.state_dict(), strict=False)
    expected, found = plain(batch()), sharing(batch())
    for name, loss in expected.items():
        torch.testing.assert_close(found[name], loss, rtol=1e-4, atol=1e-5)
    assert {"loss_class_share_v", "loss_giou_share_a"} <= found.keys()
    if "two_stage" in variant:
        assert "loss_bbox_enc" in found
        assert "loss_bbox_enc_share_a" not in found  # only the student proposes
    sum(found.values()).backward()
    assert sharing.transformer.encoder.layers[-1].attentions[0].teacher.in_proj_weight.grad.any()


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_query_and_one_class(variant):
    settings = SETTINGS | {"num_queries": 1, "num_classes": 1}
    model = tiny_detector(settings, **VARIANTS[variant])
    image = pattern_image(0, 64, 96)
    item = {"image": image, "instances": instances((64, 96), [[4, 5, 5, 6]], [0])}
    assert all(torch.isfinite(loss) for loss in model.train()([item]).values())
    assert len(model.eval()([{"image": image}])[0]["instances"]) == 1


class CoarsestLevel(PyramidBackbone):
    def forward(self, images):
        return {"res5": super().forward(images)["res5"]}


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_level(variant):
    width, heads = SETTINGS["embed_dim"], SETTINGS["num_heads"]
    attention = DeformableSelfAttention(width, heads, num_levels=1, dropout=0.0)
    layer = EncoderLayer(attention, SETTINGS["feedforward_dim"], ffn_dropout=0.0)
    encoder, options = Encoder(layer, SETTINGS["num_encoder_layers"]), VARIANTS[variant]
    transformer = DeformableTransformer(
        encoder,
        decoder(SETTINGS, num_levels=1),
        num_levels=1,
        as_two_stage=options.get("two_stage", False),
    )
    channels = {"res5": ShapeSpec(channels=SETTINGS["c5"])}
    neck = ChannelMapper(channels, ["res5"], width, kernel_size=1, num_outs=1)
    model = tiny_detector(**options, transformer=transformer, neck=neck)
    model.backbone = CoarsestLevel()
    losses = model.train()(batch())
    assert all(torch.isfinite(loss) for loss in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters())
    check_single_results(model.eval())


def test_more_queries_than_tokens():
    settings = SETTINGS | {"num_queries": 50}
    model = tiny_detector(settings, **VARIANTS["deformable_detr_two_stage"]).eval()
    assert len(model([{"image": pattern_image(0, 16, 16)}])[0]["instances"]) == 10


def test_contradictions_are_refused_in_one_line():
    with pytest.raises(ValueError, match="as_two_stage needs with_box_refine"):
        tiny_detector(two_stage=True)
    parts = {"transformer": DeformableTransformer(deformable_encoder(SETTINGS), decoder(SETTINGS))}
    with pytest.raises(ValueError, match="True in the detector, False in its transformer"):
        tiny_detector(refine=True, two_stage=True, **parts)
    parts = {
        "transformer": DeformableTransformer(deformable_encoder(SETTINGS), decoder(SETTINGS), 3)
    }
    with pytest.raises(ValueError, match="the neck gives 4 levels, embeddings are of 3"):
        tiny_detector(**parts).train()(batch())
    model = tiny_detector().eval()
    memory = model.encode(model.extract(model.preprocess(batch())))
    nothing = torch.zeros(2, 6, 32)
    with pytest.raises(ValueError, match=r"queries\.references is None"):
        model.decode(memory, Queries(nothing, nothing))
