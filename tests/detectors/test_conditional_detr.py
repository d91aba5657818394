"""Conditional-DETR against the vectors recorded from detrex."""

import json

import numpy as np
import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from tiny_detectors import (
    ROOT,
    SETTINGS,
    StridedBackbone,
    build_conditional,
    instances,
    pattern_image,
    recipe_weights,
)

from detectors.structures import AttentionMaps


@pytest.fixture(scope="module", params=["conditional_detr", "conditional_detr_d256"])
def recorded(request):
    folder = ROOT / "tests" / "data" / "detrex"
    if request.param == "conditional_detr":  # larger, with weights, memory and training steps
        folder = request.getfixturevalue("reference_dir") / "detrex" / "detectors"
    record = json.loads((folder / f"{request.param}.json").read_text())
    arrays = np.load(folder / f"{request.param}.npz")
    return record, {key: torch.from_numpy(arrays[key]) for key in arrays.files}


@pytest.fixture
def detector(recorded):
    record, arrays = recorded
    weights = recipe_weights(record["weights"]["parameters"], record["weights"]["seed"])
    if record["weights"]["stored"]:
        stored = {k[len("param/") :]: v for k, v in arrays.items() if k.startswith("param/")}
        assert all(torch.equal(weights[key], value) for key, value in stored.items())
    model = build_conditional(
        record["settings"], {"res5": arrays["feat/res5"]}, mask_padding_at_inference=False
    )
    model.load_state_dict(weights, strict=True)
    return model


def inputs_of(record, case=None):
    items = []
    sizes = zip(
        record["inputs"]["image_sizes_hw"], record["inputs"]["output_sizes_hw"], strict=True
    )
    for index, (size, output) in enumerate(sizes):
        item = {"image": pattern_image(index, *size)}
        if output is not None:
            item["height"], item["width"] = output
        if case is not None:
            gt = record["train"][case]["gt"][index]
            item["instances"] = instances(size, gt["boxes_xyxy_abs"], gt["classes"])
        items.append(item)
    return items


def test_preprocess(recorded, detector):
    record, _ = recorded
    if "preprocess" not in record:
        pytest.skip("not recorded for this size")
    images = detector.preprocess(inputs_of(record))
    expected = record["preprocess"]
    assert list(images.tensor.shape) == expected["batched_shape"]
    sums = images.tensor.double().sum((2, 3))
    torch.testing.assert_close(
        sums, torch.tensor(expected["sum_per_image_channel"]).double(), rtol=1e-4, atol=1e-2
    )
    for index, value in expected["pixels"].items():
        assert images.tensor[tuple(map(int, index.split(",")))].item() == pytest.approx(value)


def test_inference(recorded, detector):
    record, arrays = recorded
    detector.eval()
    inputs = inputs_of(record)
    with torch.no_grad():
        memory = detector.encode(detector.extract(detector.preprocess(inputs)))
        predictions = detector.predict(detector.decode(memory, detector.queries(memory)))
        results = detector(inputs)
    close = {"rtol": 1e-4, "atol": 1e-4}
    if "eval/memory" in arrays:
        torch.testing.assert_close(memory.tokens.transpose(0, 1), arrays["eval/memory"], **close)
    torch.testing.assert_close(predictions.logits, arrays["eval/pred_logits"], **close)
    torch.testing.assert_close(predictions.boxes, arrays["eval/pred_boxes"], rtol=0, atol=2e-5)
    for index, result in enumerate(results):
        found = result["instances"]
        assert list(found.image_size) == record["eval_result_sizes_hw"][index]
        expected = {
            key: arrays[f"eval/result{index}/{key}"] for key in ("boxes", "scores", "classes")
        }
        torch.testing.assert_close(found.pred_boxes.tensor, expected["boxes"], rtol=2e-5, atol=5e-3)
        torch.testing.assert_close(found.scores, expected["scores"], rtol=0, atol=2e-5)
        assert torch.equal(found.pred_classes, expected["classes"])


@pytest.mark.parametrize("case", ["A", "B", "C"])
def test_training(case, recorded, detector):
    record, arrays = recorded
    expected = record["train"][case]
    losses = detector.train()(inputs_of(record, case))
    assert losses.keys() == expected["losses"].keys()
    for name, value in expected["losses"].items():
        assert losses[name].item() == pytest.approx(value, rel=1e-4, abs=1e-6), name
    sum(losses.values()).backward()
    norms = expected.get("grad_norms", {})
    for name, parameter in detector.named_parameters():
        if norms.get(name) is not None:
            found = parameter.grad.norm().item()
            assert found == pytest.approx(norms[name], rel=2e-3, abs=1e-4), name
        stored = arrays.get(f"train{case}/grad/{name}")
        if stored is not None:
            torch.testing.assert_close(parameter.grad, stored, rtol=2e-3, atol=1e-3)


def test_training_steps(recorded, detector):
    """Three AdamW steps follow the recorded losses, so gradients are right everywhere."""
    record, _ = recorded
    if "adamw_3_steps_case_B" not in record:
        pytest.skip("not recorded for this size")
    expected = record["adamw_3_steps_case_B"]["total_loss_before_each_step_and_after_last"]
    norms = {
        id(p)
        for m in detector.modules()
        if isinstance(m, torch.nn.LayerNorm)
        for p in m.parameters()
    }
    groups = [
        {"params": [p for p in detector.parameters() if id(p) not in norms]},
        {"params": [p for p in detector.parameters() if id(p) in norms], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, weight_decay=1e-2)
    detector.train()
    inputs, totals = inputs_of(record, "B"), []
    for _ in range(4):
        total = sum(detector(inputs).values())
        totals.append(total.item())
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(detector.parameters(), 0.1)
        optimizer.step()
    assert totals[:3] == pytest.approx(expected[:3], rel=1e-3)
    assert totals[3] == pytest.approx(expected[3], rel=2e-2)


def test_full_size_keys(reference_dir):
    config = LazyConfig.load(str(ROOT / "projects/baselines/configs/conditional_detr_r50_50ep.py"))
    model = instantiate(config.model)
    record = reference_dir / "detrex/checkpoint_keys/conditional_detr_r50_50ep.json"
    expected = json.loads(record.read_text())
    state = model.state_dict()
    assert {key: list(value.shape) for key, value in state.items()} == {
        key: shape for key, (_, shape) in expected["keys"].items()
    }
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen == expected["frozen_parameters"]
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == expected["trainable_parameters"]


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


@pytest.mark.parametrize("boxes", [[[4, 4, 20, 20]], []])
def test_bfloat16_autocast(boxes):
    model = tiny_detector().train()
    item = {
        "image": pattern_image(0, 64, 64),
        "instances": instances((64, 64), boxes, [1] * len(boxes)),
    }
    exact = model([item])
    with torch.autocast("cpu", torch.bfloat16):
        losses = model([item])
    sum(losses.values()).backward()
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(exact[name].item(), rel=0.1, abs=1e-3), name
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
