"""Conditional-DETR against the vectors recorded from detrex."""

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from recorded_detectors import RecordedDetector, check_full_size, check_settings
from tiny_detectors import (
    ROOT,
    SETTINGS,
    StridedBackbone,
    build_conditional,
    instances,
    pattern_image,
)

from detectors.structures import AttentionMaps


@pytest.fixture(scope="module", params=["conditional_detr", "conditional_detr_d256"])
def recorded(request):
    if request.param == "conditional_detr":  # larger, with weights, memory and training steps
        folder = request.getfixturevalue("reference_dir") / "detrex" / "detectors"
    else:
        folder = ROOT / "tests" / "data" / "detrex"
    return RecordedDetector(folder, request.param)


@pytest.fixture
def detector(recorded):
    return recorded.load(
        build_conditional(recorded.settings, recorded.features, mask_padding_at_inference=False)
    )


def test_preprocess(recorded, detector):
    recorded.check_preprocess(detector)


def test_inference(recorded, detector):
    recorded.check_inference(detector)


@pytest.mark.parametrize("case", ["A", "B", "C"])
def test_training(case, recorded, detector):
    recorded.check_training(detector, case)


def test_training_steps(recorded, detector):
    recorded.check_training_steps(detector)


FULL_SIZE = [
    "conditional_detr_r50_50ep",
    "conditional_detr_r101_50ep",
    "conditional_detr_r50_dc5_50ep",
    "conditional_detr_r101_dc5_50ep",
]


@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size_keys(name, reference_dir):
    check_full_size(reference_dir, name)


@pytest.mark.parametrize("name", FULL_SIZE)
def test_settings(name, reference_dir):
    check_settings(reference_dir, name)


@pytest.mark.parametrize(
    ("name", "depth", "encoder_layers", "decoder_layers"),
    [("r101_12ep", 101, 6, 6), ("r50_12ep", 50, 6, 6), ("r50_enc6_dec3_12ep", 50, 6, 3),
     ("r50_enc3_dec6_12ep", 50, 3, 6), ("r50_enc3_dec3_12ep", 50, 3, 3)],
)  # fmt: skip
def test_teacher_and_students_of_twelve_epochs(name, depth, encoder_layers, decoder_layers):
    path = ROOT / f"projects/baselines/configs/conditional_detr_{name}.py"
    config = LazyConfig.load(str(path))
    assert config.train.init_checkpoint.endswith(f"R-{depth}.pkl")
    assert config.train.output_dir == f"./output/conditional_detr_{name}"
    assert config.train.max_iter == 90000
    assert config.lr_multiplier.scheduler.milestones == [82500, 90000]
    assert config.model.backbone.stages.depth == depth
    transformer = instantiate(config.model.transformer)
    assert len(transformer.encoder.layers) == encoder_layers
    assert len(transformer.decoder.layers) == decoder_layers


def tiny_detector(**options):
    torch.manual_seed(0)
    model = build_conditional(SETTINGS, {}, **options)
    model.backbone = StridedBackbone()
    torch.nn.init.normal_(model.bbox_embed.layers[-1].weight, std=0.1)
    return model


def test_a_batch_gives_each_image_its_single_result():
    model = tiny_detector().eval()
    sizes = [(64, 96), (96, 64), (32, 32)]
    inputs = [{"image": pattern_image(i, *size)} for i, size in enumerate(sizes)]
    with torch.no_grad():
        together = model(inputs)
        alone = [model([item])[0] for item in inputs]
        unmasked = tiny_detector(mask_padding_at_inference=False).eval()(inputs)
    for batched, single in zip(together, alone, strict=True):
        for field in ("scores", "pred_classes"):
            torch.testing.assert_close(
                batched["instances"].get(field), single["instances"].get(field), rtol=0, atol=1e-4
            )
        torch.testing.assert_close(
            batched["instances"].pred_boxes.tensor,
            single["instances"].pred_boxes.tensor,
            rtol=1e-4,
            atol=1e-2,
        )
    assert not torch.allclose(unmasked[2]["instances"].scores, alone[2]["instances"].scores)


def test_attention_maps_on_request_change_nothing():
    model = tiny_detector().eval()
    inputs = [{"image": pattern_image(0, 64, 96)}, {"image": pattern_image(1, 48, 96)}]
    with torch.no_grad():
        memory = model.encode(model.extract(model.preprocess(inputs)))
        queries = model.queries(memory)
        maps = AttentionMaps()
        plain, mapped = model.decode(memory, queries), model.decode(memory, queries, maps)
    torch.testing.assert_close(plain.states, mapped.states)
    assert [m.shape for m in maps.self_attention] == [(2, 4, 6, 6)] * 2
    assert [m.shape for m in maps.cross_attention] == [(2, 4, 6, 24)] * 2
    for weights in maps.self_attention + maps.cross_attention:
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    assert maps.cross_attention[0][1, :, :, 18:].abs().max() == 0  # the shorter image's padding


def test_bad_input_is_refused_in_one_line():
    model = tiny_detector()
    image = pattern_image(0, 32, 32)
    with pytest.raises(ValueError, match=r"shape \(1, 32, 32\), expected \(3, H, W\)"):
        model.eval()([{"image": image[:1]}])
    wrong = {"image": image, "instances": instances((32, 32), [[0, 0, 8, 8]], [5])}
    with pytest.raises(ValueError, match=r"gt_classes 5\.\.5, the detector has num_classes 5"):
        model.train()([wrong])
    with pytest.raises(ValueError, match="no 'instances'"):
        model.train()([{"image": image}])


def test_one_query_one_class_and_a_one_pixel_box():
    settings = SETTINGS | {"num_queries": 1, "num_classes": 1}
    model = build_conditional(settings, {})
    model.backbone = StridedBackbone()
    image = pattern_image(0, 32, 48)
    item = {"image": image, "instances": instances((32, 48), [[4, 5, 5, 6]], [0])}
    losses = model.train()([item])
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert len(model.eval()([{"image": image}])[0]["instances"]) == 1
