"""DETR with cross entropy against vectors recorded from detrex, and with focal loss."""

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from recorded_detectors import RecordedDetector, check_full_size, check_settings
from tiny_deformable import check_initialisation, check_single_results
from tiny_detectors import (
    ROOT,
    SETTINGS,
    StridedBackbone,
    build_single_scale,
    cross_entropy_criterion,
    focal_criterion,
    instances,
    pattern_image,
)

from detectors.detr import DETR, DETRDecoder
from detectors.structures import AttentionMaps
from projects.ks_detr.encoder import share_knowledge

CRITERIA = [cross_entropy_criterion, focal_criterion]
each_criterion = pytest.mark.parametrize("criterion", CRITERIA)


@pytest.fixture(scope="module", params=["detr", "detr_d256"])
def recorded(request):
    if request.param == "detr":  # larger, with weights, memory and training steps
        folder = request.getfixturevalue("reference_dir") / "detrex" / "detectors"
    else:
        folder = ROOT / "tests" / "data" / "detrex"
    return RecordedDetector(folder, request.param)


@pytest.fixture
def detector(recorded):
    settings, features = recorded.settings, recorded.features
    criterion = cross_entropy_criterion(settings)
    model = build_single_scale(
        DETR, DETRDecoder, criterion, settings, features, mask_padding_at_inference=False
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


FULL_SIZE = ["detr_r50_300ep", "detr_r101_300ep", "detr_r50_dc5_300ep"]


@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size_keys(name, reference_dir):
    check_full_size(reference_dir, name)


@pytest.mark.parametrize("name", FULL_SIZE)
def test_settings(name, reference_dir):
    check_settings(reference_dir, name)


def test_initialisation(reference_dir):
    keys = [
        "input_proj.weight",
        "transformer.encoder.layers.0.attentions.0.attn.in_proj_weight",
        "transformer.encoder.layers.0.attentions.0.attn.out_proj.bias",
        "transformer.decoder.layers.1.attentions.0.attn.in_proj_weight",
        "transformer.decoder.layers.1.attentions.1.attn.in_proj_weight",
        "transformer.decoder.layers.1.attentions.1.attn.in_proj_bias",
        "transformer.decoder.layers.1.attentions.1.attn.out_proj.weight",
        "transformer.decoder.layers.1.ffns.0.layers.0.0.weight",
        "transformer.decoder.layers.1.ffns.0.layers.1.bias",
        "query_embed.weight",
        "class_embed.weight",
        "class_embed.bias",
        "bbox_embed.layers.2.weight",
    ]
    check_initialisation(reference_dir, "detr_r50_300ep", keys)


def test_baseline_of_smca():
    path = ROOT / "projects/baselines/configs/detr_r50_50ep.py"
    config = LazyConfig.load(str(path))
    assert config.train.max_iter == 375000
    assert config.train.clip_grad == {"enabled": True, "params": {"max_norm": 0.1, "norm_type": 2}}
    assert config.lr_multiplier.scheduler.milestones == [300000, 375000]
    assert config.dataloader.train.total_batch_size == 16
    model = instantiate(config.model)
    parameters = dict(model.named_parameters())
    # the published model has a logit for each of COCO's 92 sparse ids
    trainable = 41_353_568 - 12 * 257
    assert sum(p.numel() for p in parameters.values() if p.requires_grad) == trainable
    assert sum(p.numel() for p in parameters.values()) == 41_575_968 - 12 * 257
    torch.testing.assert_close(model.class_embed.bias, torch.full((80,), -4.59512))
    config.optimizer.params.model = model
    groups = instantiate(config.optimizer).param_groups
    assert {group["weight_decay"] for group in groups} == {1e-4}
    assert {group["lr"] for group in groups} == {1e-4, 1e-5}


def tiny_detector(criterion=cross_entropy_criterion, settings=SETTINGS, **options):
    torch.manual_seed(0)
    model = build_single_scale(DETR, DETRDecoder, criterion(settings), settings, {}, **options)
    model.backbone = StridedBackbone()
    torch.nn.init.normal_(model.bbox_embed.layers[-1].weight, std=0.3)
    return model


def batch(boxes=((4, 4, 60, 30), (30, 20, 90, 60))):
    """Two images of different sizes; the boxes are on the first."""
    first, second = (64, 96), (96, 80)
    return [
        {"image": pattern_image(0, *first), "instances": instances(first, boxes, [1] * len(boxes))},
        {"image": pattern_image(1, *second), "instances": instances(second, [], [])},
    ]


@each_criterion
def test_a_batch_gives_each_image_its_single_result(criterion):
    model = tiny_detector(criterion).eval()
    check_single_results(model)
    model.mask_padding_at_inference = False
    with pytest.raises(AssertionError):
        check_single_results(model)


def test_cross_entropy_gives_every_query_its_best_class():
    model = tiny_detector().eval()
    logits = torch.tensor([[[0.0, 2, 1, 0, 0, 9], [3, 0, 0, 0, 4, 0]]])
    boxes = torch.rand(1, 2, 4)
    scores, classes, kept = model.select(logits, boxes)
    assert classes.tolist() == [[1, 4]]
    torch.testing.assert_close(scores, logits.softmax(-1)[0, [0, 1], [1, 4]][None])
    assert torch.equal(kept, boxes)


def test_focal_loss_gives_the_best_pairs_of_query_and_class():
    model = tiny_detector(focal_criterion).eval()
    model.select_box_nums_for_evaluation = 3
    logits = torch.tensor([[[0.0, 2, 1, -1, -1], [3, -1, -1, -1, -1]]])
    boxes = torch.rand(1, 2, 4)
    scores, classes, kept = model.select(logits, boxes)
    assert classes.tolist() == [[0, 1, 2]]
    torch.testing.assert_close(scores, torch.tensor([[3.0, 2.0, 1.0]]).sigmoid())
    assert torch.equal(kept, boxes[:, [1, 0, 0]])


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_attention_maps_on_request_change_nothing(mode):
    model = tiny_detector()
    getattr(model, mode)()
    with torch.no_grad():
        memory = model.encode(model.extract(model.preprocess(batch())))
        queries, maps = model.queries(memory), AttentionMaps()
        plain, mapped = model.decode(memory, queries), model.decode(memory, queries, maps)
    torch.testing.assert_close(plain.states, mapped.states)
    assert [m.shape for m in maps.self_attention] == [(2, 4, 6, 6)] * 2
    assert [m.shape for m in maps.cross_attention] == [(2, 4, 6, 36)] * 2
    for weights in maps.self_attention + maps.cross_attention:
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
        assert weights.min() >= 0
    for weights in maps.cross_attention:  # training keeps off the padding as well
        cells = weights.unflatten(-1, (6, 6))
        assert cells[0, ..., 4:, :].abs().max() == 0
        assert cells[1, ..., 5].abs().max() == 0
        assert cells[1, ..., :5].abs().min() > 0


def test_queries_kept_apart_do_not_see_each_other():
    model = tiny_detector().eval()
    with torch.no_grad():
        memory = model.encode(model.extract(model.preprocess(batch())))
        queries = model.queries(memory)
        maps, apart = AttentionMaps(), torch.zeros(6, 6, dtype=torch.bool)
        apart[:2, 2:] = apart[2:, :2] = True
        both = type(queries)(queries.content, queries.position, apart)
        alone = type(queries)(queries.content[:, :2], queries.position[:, :2])
        together = model.decode(memory, both, maps).states
        torch.testing.assert_close(together[:, :, :2], model.decode(memory, alone).states)
    assert maps.self_attention[0][..., :2, 2:].abs().max() == 0


@each_criterion
def test_branches_of_a_knowledge_sharing_encoder(criterion):
    plain, sharing = tiny_detector(criterion).train(), tiny_detector(criterion).train()
    share_knowledge(sharing.transformer.encoder)
    sharing.load_state_dict(plain.state_dict(), strict=False)
    expected, found = plain(batch()), sharing(batch())
    for name, loss in expected.items():
        torch.testing.assert_close(found[name], loss, rtol=1e-4, atol=1e-5)
    assert {"loss_class_share_v", "loss_giou_share_a"} <= found.keys()
    sum(found.values()).backward()
    assert sharing.transformer.encoder.layers[-1].attentions[0].teacher.in_proj_weight.grad.any()
    with torch.no_grad():
        torch.testing.assert_close(
            sharing.eval()(batch())[1]["instances"].scores,
            plain.eval()(batch())[1]["instances"].scores,
        )


@each_criterion
def test_one_query_and_one_class(criterion):
    model = tiny_detector(criterion, SETTINGS | {"num_queries": 1, "num_classes": 1})
    image = pattern_image(0, 32, 48)
    item = {"image": image, "instances": instances((32, 48), [[4, 5, 5, 6]], [0])}
    assert all(torch.isfinite(loss) for loss in model.train()([item]).values())
    assert len(model.eval()([{"image": image}])[0]["instances"]) == 1


def test_bad_settings_are_refused_in_one_line():
    with pytest.raises(ValueError, match="num_layers is 0, a decoder needs at least 1"):
        DETRDecoder(32, 4, num_layers=0)
    with pytest.raises(ValueError, match="num_heads 5 does not divide embed_dim 32"):
        DETRDecoder(32, 5)
