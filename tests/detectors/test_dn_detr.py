"""DN-DETR against the vectors recorded from detrex."""

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from recorded_detectors import RecordedDetector, check_full_size, check_settings
from tiny_dab import batch, build_recorded, tiny_detector
from tiny_deformable import check_initialisation, check_single_results
from tiny_detectors import ROOT, SETTINGS, instances, pattern_image

from detectors.dn_detr import DNDETR
from detectors.structures import AttentionMaps
from projects.ks_detr.encoder import share_knowledge


@pytest.fixture(scope="module", params=["dn_detr", "dn_detr_d256"])
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


@pytest.mark.parametrize("backbone", ["r50", "r50_dc5"])
def test_full_size_keys(backbone, reference_dir):
    check_full_size(reference_dir, f"dn_detr_{backbone}_50ep")


def test_settings(reference_dir):
    check_settings(reference_dir, "dn_detr_r50_50ep")
    folder = ROOT / "projects/baselines/configs"
    plain, dilated = (
        LazyConfig.load(str(folder / f"dn_detr_{name}_50ep.py")) for name in ("r50", "r50_dc5")
    )
    for config in (plain, dilated):  # detrex writes the dilated one's output to DAB-DETR's folder
        del config.model.backbone, config.train.init_checkpoint, config.train.output_dir
    assert plain.model == dilated.model
    assert plain.train == dilated.train


def test_r101_has_a_deeper_backbone_and_the_same_rest():
    folder = ROOT / "projects/baselines/configs"
    r50, r101 = (
        LazyConfig.load(str(folder / f"dn_detr_{name}_50ep.py")) for name in ("r50", "r101")
    )
    assert r101.train.init_checkpoint.endswith("/R-101.pkl")
    r50, r101 = (
        {k: v.shape for k, v in instantiate(c.model).state_dict().items()} for c in (r50, r101)
    )
    assert r50.keys() < r101.keys()
    assert all(key.startswith("backbone.res4.") for key in r101.keys() - r50.keys())
    assert all(r101[key] == shape for key, shape in r50.items())


def test_initialisation(reference_dir):
    keys = [
        "denoising_generator.label_encoder.weight",
        "transformer.encoder.query_scale.layers.0.weight",
        "transformer.decoder.ref_point_head.layers.0.weight",
        "transformer.decoder.layers.0.ffns.0.activation.weight",
        "transformer.decoder.bbox_embed.layers.2.weight",
        "anchor_box_embed.weight",
        "class_embed.bias",
    ]
    check_initialisation(reference_dir, "dn_detr_r50_50ep", keys)


def test_a_batch_gives_each_image_its_single_result():
    check_single_results(tiny_detector(DNDETR).eval())


@pytest.mark.parametrize("mask_answers", [True, False])
def test_noised_targets_do_not_touch_the_other_queries(mask_answers, monkeypatch):
    model = tiny_detector(DNDETR).train()
    if not mask_answers:
        monkeypatch.setattr(model.denoising_generator, "attention_mask", lambda *_: None)
    targets = model.prepare_targets(batch())
    memory = model.encode(model.extract(model.preprocess(batch())))
    with_targets = model.predict(model.decode(memory, model.queries(memory, targets)))
    without = model.predict(model.decode(memory, model.queries(memory)))
    assert torch.allclose(with_targets.logits, without.logits, atol=1e-5) == mask_answers
    assert with_targets.denoised.boxes.shape == (2, 2, 10, 4)


def test_targets_without_noise_are_found_where_they_are():
    """A detector that moves no box reconstructs the boxes that it is given."""
    model = tiny_detector(DNDETR, label_noise_prob=0.0, box_noise_scale=0.0).train()
    torch.nn.init.zeros_(model.bbox_embed.layers[-1].weight)
    losses = model(batch())
    for name in ("loss_bbox_dn", "loss_giou_dn", "loss_bbox_dn_0", "loss_giou_dn_0"):
        assert losses[name].item() == pytest.approx(0, abs=1e-4), name
    assert losses["loss_bbox"] > 0.1


@pytest.mark.parametrize("boxes", [((4, 4, 60, 30),), ()])
def test_every_parameter_takes_part_in_every_batch(boxes):
    model = tiny_detector(DNDETR).train()
    losses = model(batch(boxes))
    sum(losses.values()).backward()
    assert all((losses[name] == 0) == (not boxes) for name in losses if "_dn" in name)
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_attention_maps_on_request_change_nothing():
    model = tiny_detector(DNDETR).train()
    with torch.no_grad():
        targets = model.prepare_targets(batch())
        memory = model.encode(model.extract(model.preprocess(batch())))
        queries, maps = model.queries(memory, targets), AttentionMaps()
        plain, mapped = model.decode(memory, queries), model.decode(memory, queries, maps)
    torch.testing.assert_close(plain.states, mapped.states)
    assert [m.shape for m in maps.self_attention] == [(2, 4, 16, 16)] * 2
    assert maps.self_attention[0][:, :, 10:, :10].abs().max() == 0


def test_knowledge_sharing_encoder():
    plain = tiny_detector(DNDETR)
    model = tiny_detector(DNDETR)
    share_knowledge(model.transformer.encoder)
    model.load_state_dict(plain.state_dict(), strict=False)
    found = []
    for detector in (plain, model):
        torch.manual_seed(0)
        found.append(detector.train()(batch()))
    expected, losses = found
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value)
    assert {"loss_class_dn_share_v", "loss_giou_dn_share_a"} <= losses.keys()
    sum(losses.values()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("with_indicator", [True, False])
def test_one_query_and_one_class(with_indicator):
    settings = SETTINGS | {"num_queries": 1, "num_classes": 1}
    model = tiny_detector(DNDETR, settings, with_indicator=with_indicator)
    image = pattern_image(0, 32, 48)
    item = {"image": image, "instances": instances((32, 48), [[4, 5, 5, 6]], [0])}
    losses = model.train()([item])
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert len(model.eval()([{"image": image}])[0]["instances"]) == 1


def test_patterns_are_refused():
    with pytest.raises(ValueError, match="queries start from labels: expected num_patterns 0"):
        tiny_detector(DNDETR, SETTINGS | {"num_patterns": 2})
