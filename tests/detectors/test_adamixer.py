"""AdaMixer against the vectors recorded from the authors' code."""

import re

import numpy as np
import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detrex.layers import box_cxcywh_to_xyxy
from tiny_adamixer import SINGLE, STRIDES, build_adamixer, pyramid
from tiny_detectors import ROOT, instances

from detectors import adamixer_layer as layer
from detectors.adamixer import ChannelMapping
from detectors.structures import FeatureMaps

NAMES = [
    (r"sampling_n_mixing\.sampling_offset_generator\.0\.", "sampling_offsets."),
    (
        r"sampling_n_mixing\.adaptive_mixing\.parameter_generator\.0\.",
        "mixing.parameter_generator.",
    ),
    (r"sampling_n_mixing\.adaptive_mixing\.", "mixing."),
    (r"sampling_n_mixing\.norm\.", "mixing_norm."),
    (r"iof_tau", "attention.iof_tau"),
]
"""From the authors' names of a stage's parameters to ours."""
HEADS = {"cls_fcs.": "class_embed.{}.", "reg_fcs.": "bbox_embed.{}."}
HEADS |= {"fc_cls.": "class_embed.{}.3.", "fc_reg.": "bbox_embed.{}.3."}
CLOSE = {"rtol": 1e-7, "atol": 1e-8}


def our_name(name, stage):
    """The name in our state dict of a parameter of one of the authors' stages."""
    for start, ours in HEADS.items():
        if name.startswith(start):
            return ours.format(stage) + name.removeprefix(start)
    for pattern, ours in NAMES:
        name = re.sub(pattern, ours, name)
    return f"transformer.decoder.layers.{stage}.{name}"


def load(folder, name):
    """The recorded arrays in float64."""
    arrays = np.load(folder / "adamixer" / f"{name}.npz")
    tensors = {key: torch.from_numpy(arrays[key]) for key in arrays.files}
    return {k: v.double() if v.is_floating_point() else v for k, v in tensors.items()}


def leaves(record, names):
    """Copies of recorded inputs that gather gradients."""
    return [record[name].clone().requires_grad_() for name in names]


# --- recorded vectors ---------------------------------------------------------------------------


def test_geometry(reference_dir):
    record = load(reference_dir, "sampling")
    position = record["xyzr"]
    boxes = box_cxcywh_to_xyxy(layer.to_boxes(position))
    torch.testing.assert_close(boxes, record["decode_box"], **CLOSE)
    torch.testing.assert_close(layer.embed_positions(position, 32), record["pos_embed"], **CLOSE)
    torch.testing.assert_close(layer.covered_share(position), record["iof"], **CLOSE)
    refined = layer.refine(position, record["delta"])
    torch.testing.assert_close(refined, record["refined_xyzr"], **CLOSE)
    boxes = box_cxcywh_to_xyxy(layer.to_boxes(refined))
    torch.testing.assert_close(boxes, record["refined_boxes"], **CLOSE)


def test_sampling(reference_dir):
    record = load(reference_dir, "sampling")
    points = record["sample_points_xyz"].requires_grad_()
    features = leaves(record, [f"feat{level}" for level in range(4)])
    volume, maps = pyramid(features), []
    by_group = points[:, :, 0].unflatten(2, (2, 6))
    samples = volume.sample(by_group, maps)
    torch.testing.assert_close(samples, record["out"], **CLOSE)
    weights = volume.level_weights(points)
    torch.testing.assert_close(weights, record["level_weights"], **CLOSE)
    grads = torch.autograd.grad((samples * record["cot"]).sum(), [points, *features])
    expected = [record["grad_points"], *(record[f"grad_feat{level}"] for level in range(4))]
    for found, wanted in zip(grads, expected, strict=True):
        torch.testing.assert_close(found, wanted, **CLOSE)
    [(locations, shares)] = maps
    assert locations.shape == (2, 6, 2, 4, 6, 2)
    torch.testing.assert_close(shares.transpose(3, 4).flatten(2, 3), weights[:, :, 0])
    for level, stride in enumerate(STRIDES):
        size = locations.new_tensor(
            [volume.spatial_shapes[level][1], volume.spatial_shapes[level][0]]
        )
        torch.testing.assert_close(locations[:, :, :, level] * size * stride, by_group[..., :2])


def test_stage(reference_dir):
    record = load(reference_dir, "stage")
    model = build_adamixer(num_layers=1).double()
    weights = {k[2:]: v for k, v in record.items() if k.startswith("w/")}
    renamed = {our_name(name, 0): value for name, value in weights.items()}
    parameters = dict(model.named_parameters())
    missing = model.load_state_dict(renamed, strict=False)
    assert missing.unexpected_keys == []
    assert {key.split(".")[0] for key in missing.missing_keys} == {
        "neck",
        "query_embed",
        "backbone",
    }
    features = leaves(record, [f"in/feat{level}" for level in range(4)])
    position, content = leaves(record, ["in/xyzr", "in/content"])
    mixer = model.transformer.decoder.layers[0]
    volume = pyramid(features)
    with_places = content + layer.embed_positions(position.detach(), 32)
    attended = mixer.attention(with_places, layer.covered_share(position.detach()))
    torch.testing.assert_close(attended, record["mid/after_attention_residual"], **CLOSE)
    attended = mixer.attention_norm(attended)
    points = mixer.sampling_points(attended, position)
    torch.testing.assert_close(volume.sample(points), record["mid/sampled"], **CLOSE)
    mixed = mixer.mixing(attended, volume.sample(points))
    torch.testing.assert_close(mixed, record["mid/after_mixing_residual"], **CLOSE)
    state = mixer(content, position, volume)
    delta = model.bbox_embed[0](state)
    refined = layer.refine(position, delta)
    found = {
        "query_content_out": state,
        "cls_score": model.class_embed[0](state),
        "xyzr_delta": delta,
        "xyzr_out": refined,
        "boxes": box_cxcywh_to_xyxy(layer.to_boxes(refined)),
    }
    for name, value in found.items():
        torch.testing.assert_close(value, record[f"out/{name}"], **CLOSE)
    sum((value * record[f"cot/{name}"]).sum() for name, value in found.items()).backward()
    for name, value in {"xyzr": position, "content": content}.items():
        torch.testing.assert_close(value.grad, record[f"grad/{name}"], rtol=1e-6, atol=1e-6)
    for level, value in enumerate(features):
        torch.testing.assert_close(value.grad, record[f"grad/feat{level}"], rtol=1e-6, atol=1e-6)
    for name in weights:
        grad = parameters[our_name(name, 0)].grad
        torch.testing.assert_close(grad, record[f"gradw/{name}"], rtol=1e-5, atol=1e-5)


def test_neck(reference_dir):
    record = load(reference_dir, "decoder")
    neck = ChannelMapping(["res4", "res5"], [8, 10], 64).double()
    with torch.no_grad():
        for name, parameter in neck.named_parameters():
            parameter.copy_(record[f"neck/w/{official_neck_name(name, 2)}"])
    inputs = leaves(record, ["neck/in2", "neck/in3"])
    maps = neck(dict(zip(["res4", "res5"], inputs, strict=True)))
    outputs = [neck.normalize(level) for level in maps]
    total = sum((out * record[f"neck/cot{i + 2}"]).sum() for i, out in enumerate(outputs))
    total.backward()
    for index, (output, given) in enumerate(zip(outputs, inputs, strict=True)):
        torch.testing.assert_close(output, record[f"neck/out{index + 2}"], **CLOSE)
        torch.testing.assert_close(given.grad, record[f"neck/grad_in{index + 2}"], **CLOSE)
    for name, parameter in neck.lateral_convs.named_parameters(prefix="lateral_convs"):
        wanted = record[f"neck/gradw/{official_neck_name(name, 2)}"]
        torch.testing.assert_close(parameter.grad, wanted, **CLOSE)


def official_neck_name(name, first):
    """The authors' name of one of our neck's parameters, whose first level is their ``first``."""
    convs = re.sub(r"(lateral_convs)\.(\d)", lambda m: f"{m[1]}.{int(m[2]) + first}.conv", name)
    return convs.replace("norm.", "gn_out.")


def recorded_detector(record):
    """The recorded decoder of two stages, with the features that it sees."""
    model = build_adamixer().double()
    weights = {"query_embed.weight": record["query/content_embedding"]}
    for key, value in record.items():
        if match := re.fullmatch(r"dec/stage(\d)/w/(.+)", key):
            weights[our_name(match[2], int(match[1]))] = value
    missing = model.load_state_dict(weights, strict=False)
    assert {key.split(".")[0] for key in missing.missing_keys} == {"neck", "backbone"}
    levels = leaves(record, [f"dec/in/feat{level}" for level in range(4)])
    sizes = [tuple(size) for size in record["query/img_hw"].tolist()]
    positions = tuple(level[:, :0] for level in levels)
    return model, FeatureMaps(tuple(levels), None, positions, sizes, (64, 96))


def recorded_targets(record, sizes):
    """Ground truth as the detector prepares it."""
    items = [
        {"instances": instances(size, record[f"dec/gt_boxes{i}"].tolist(),
                                record[f"dec/gt_labels{i}"].tolist())}
        for i, size in enumerate(sizes)
    ]  # fmt: skip
    for i, item in enumerate(items):
        item["instances"].gt_boxes.tensor = record[f"dec/gt_boxes{i}"]
    return items


def test_two_stages_with_losses(reference_dir):
    record = load(reference_dir, "decoder")
    model, features = recorded_detector(record)
    targets = model.prepare_targets(recorded_targets(record, features.image_sizes))
    memory = model.encode(features)
    queries = model.queries(memory)
    torch.testing.assert_close(queries.content, record["query/content0"], **CLOSE)
    torch.testing.assert_close(queries.position, record["query/xyzr0"], **CLOSE)
    output = model.decode(memory, queries)
    predictions = model.predict(output)
    scale = record["query/imgs_whwh"]
    for stage in range(2):
        logits = record[f"dec/stage{stage}/cls_score"]
        torch.testing.assert_close(predictions.logits[stage], logits, **CLOSE)
        boxes = box_cxcywh_to_xyxy(predictions.boxes[stage]) * scale
        torch.testing.assert_close(boxes, record[f"dec/stage{stage}/boxes"], **CLOSE)
    torch.testing.assert_close(output.references[1], record["dec/stage0/xyzr"], **CLOSE)
    check_matches(model, predictions, targets, record)
    losses = model.losses(predictions, targets)
    kinds = {"class": "cls", "bbox": "bbox", "giou": "iou"}
    for ours, theirs in kinds.items():
        for stage, suffix in enumerate(["_0", ""]):
            expected = record[f"dec/loss/stage{stage}_loss_{theirs}"].item()
            assert losses[f"loss_{ours}{suffix}"].item() == pytest.approx(expected, rel=1e-6)
    total = sum(losses.values())
    assert total.item() == pytest.approx(record["dec/total"].item(), rel=1e-6)
    total.backward()
    for level, value in enumerate(features.levels):
        torch.testing.assert_close(value.grad, record[f"dec/grad/feat{level}"], **SINGLE)
    parameters = dict(model.named_parameters())
    for key, value in record.items():
        if match := re.fullmatch(r"dec/stage(\d)/gradw/(.+)", key):
            grad = parameters[our_name(match[2], int(match[1]))].grad
            torch.testing.assert_close(grad, value, **SINGLE)


def check_matches(model, predictions, targets, record):
    """Every query is matched to the recorded target, or to none."""
    matches = model.criterion.match(predictions.logits, predictions.boxes, targets)
    starts = [0, len(targets[0]["labels"])]
    for stage in range(2):
        found = torch.zeros(2, 6, dtype=torch.int64)
        first = torch.tensor(starts)[matches.images]
        found[matches.images, matches.queries[stage]] = matches.targets[stage] - first + 1
        expected = torch.stack([record[f"dec/stage{stage}/gt_inds{image}"] for image in range(2)])
        assert torch.equal(found, expected)


# --- full size ----------------------------------------------------------------------------------


def config(name):
    return LazyConfig.load(str(ROOT / f"projects/baselines/configs/{name}.py"))


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.fixture(scope="module")
def full_size():
    torch.manual_seed(0)
    return instantiate(config("adamixer_r50_1x_100query").model)


def test_parameter_counts(full_size):
    mixer = full_size.transformer.decoder.layers[0]
    heads = full_size.class_embed[0], full_size.bbox_embed[0]
    assert count(full_size.neck) == 984_576
    assert count(full_size.query_embed) == 25_600  # the original has 400 more that nothing uses
    assert count(mixer.attention) == 263_168 + 8
    assert count(mixer.sampling_offsets) == 98_688
    assert count(mixer.mixing.parameter_generator) == 8_421_376
    assert count(mixer.mixing.out_proj) == 8_388_864
    assert count(mixer.ffn) == 1_050_880
    assert [count(head) for head in heads] == [66_304 + 20_560, 66_304 + 1_028]
    assert count(mixer) + sum(map(count, heads)) == 18_378_716
    stages = full_size.transformer, full_size.class_embed, full_size.bbox_embed
    assert sum(map(count, stages)) == 110_272_296
    # frozen batch normalisation, that of the stem and of res2, has buffers
    assert count(full_size.backbone) == 23_508_032 - 2_944
    assert count(full_size) == 134_790_904 - 400 - 2_944
    trainable = sum(p.numel() for p in full_size.parameters() if p.requires_grad)
    assert trainable == 134_790_904 - 400 - 225_344


def test_initialisation(full_size):
    mixer = full_size.transformer.decoder.layers[2]
    heads = full_size.class_embed[2], full_size.bbox_embed[2]
    assert (heads[0][-1].bias == -np.float32(np.log(99))).all()
    assert not heads[1][-1].weight.any()
    assert not heads[1][-1].bias.any()
    assert not mixer.sampling_offsets.weight.any()
    offsets = mixer.sampling_offsets.bias.view(4, 32, 3)
    assert (offsets[..., 2] == -1).all()
    assert offsets[..., :2].abs().max() < 0.5
    assert offsets[..., :2].std().item() == pytest.approx(12**-0.5, rel=0.15)
    assert not mixer.mixing.parameter_generator.weight.any()
    for bias in (mixer.mixing.parameter_generator.bias, mixer.attention.attn.out_proj.bias):
        assert bias.abs().max() < 256**-0.5
        assert bias.std().item() == pytest.approx((3 * 256) ** -0.5, rel=0.15)
    for weight in (mixer.mixing.out_proj.weight, mixer.attention.attn.in_proj_weight):
        assert weight.std().item() == pytest.approx((2 / sum(weight.shape)) ** 0.5, rel=0.02)
    taus = torch.stack([mixer.attention.iof_tau for mixer in full_size.transformer.decoder.layers])
    assert 0 < taus.min() < 1 < 3 < taus.max() < 4
    assert full_size.query_embed.weight.std().item() == pytest.approx(1, rel=0.05)
    assert not any(conv.bias.any() for conv in full_size.neck.lateral_convs)


def test_square_numbers_of_points_start_on_a_grid(reference_dir):
    mixer = build_adamixer(in_points=9).transformer.decoder.layers[0]
    expected = load(reference_dir, "sampling")["offset_bias_init_square9_groups2"]
    torch.testing.assert_close(
        mixer.sampling_offsets.bias.view(2, 9, 3).double(), expected, **SINGLE
    )


@pytest.mark.parametrize(
    ("name", "depth", "num_queries", "epochs", "drops", "sizes", "crop"),
    [("r50_1x_100query", 50, 100, 12, [8, 11], [800], False),
     ("r101_1x_100query", 101, 100, 12, [8, 11], [800], False),
     ("r50_3x_100query", 50, 100, 36, [27, 33], range(480, 801, 32), False),
     ("r101_3x_100query", 101, 100, 36, [27, 33], range(480, 801, 32), False),
     ("r50_3x_300query", 50, 300, 36, [24, 33], range(480, 801, 32), True),
     ("r101_3x_300query", 101, 300, 36, [24, 33], range(480, 801, 32), True)],
)  # fmt: skip
def test_training_settings(name, depth, num_queries, epochs, drops, sizes, crop):
    found = config(f"adamixer_{name}")
    train, optimizer, model = found.train, found.optimizer, found.model
    assert train.output_dir == f"./output/adamixer_{name}"
    assert train.init_checkpoint.endswith(f"R-{depth}.pkl")
    assert train.max_iter == epochs * 7500
    assert train.clip_grad.enabled
    assert train.clip_grad.params == {"max_norm": 1.0, "norm_type": 2}
    assert optimizer.lr == 2.5e-5
    assert optimizer.weight_decay == 1e-4
    assert optimizer.params.get("lr_factor_func") is None
    assert optimizer.params.weight_decay_norm is None
    schedule = instantiate(found.lr_multiplier)
    steps = [0, 500, *(drop * 7500 + shift for drop in drops for shift in (-1, 1))]
    factors = [schedule(step / train.max_iter) for step in steps]
    assert factors == pytest.approx([0.001, 1, 1, 0.1, 0.1, 0.01])
    assert model.backbone.stages.depth == depth
    assert model.backbone.freeze_at == 2
    assert model.num_queries == model.select_box_nums_for_evaluation == num_queries
    mapper = found.dataloader.train.mapper
    assert list(mapper.augmentation[-1].short_edge_length) == list(sizes)
    assert (mapper.augmentation_with_crop is not None) == crop
    assert found.dataloader.train.total_batch_size == 16
