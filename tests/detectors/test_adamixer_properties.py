"""What AdaMixer promises beside its numbers: batches, padding, queries, precisions, bad input."""

import dataclasses

import pytest
import torch
from detrex.layers import box_cxcywh_to_xyxy
from tiny_adamixer import SINGLE, STRIDES, batch, build_adamixer, pyramid
from tiny_deformable import check_single_results
from tiny_detectors import instances, pattern_image
from torch import nn

from detectors.adamixer import AdaMixerDecoder, ChannelMapping
from detectors.structures import STUDENT, AttentionMaps, Branch, Queries


def test_a_batch_gives_each_image_its_single_result():
    model = build_adamixer().eval()
    check_single_results(model)
    model.mask_padding_at_inference = False
    with pytest.raises(AssertionError):
        check_single_results(model)


def test_training_can_mask_padding_too():
    model = build_adamixer(mask_padding_in_training=True).train()
    features = model.extract(model.preprocess(batch()))
    for level, mask in zip(features.levels, features.padding_masks, strict=True):
        assert mask.any() or level.shape[-1] < 4
        assert not level.detach().transpose(0, 1)[:, mask].any()
        assert level.detach().transpose(0, 1)[:, ~mask].any()
    model.mask_padding_in_training = False
    as_published = model.extract(model.preprocess(batch()))
    assert not torch.equal(as_published.levels[0], features.levels[0])
    assert as_published.padding_masks is not None


def test_images_are_padded_to_whole_cells_of_the_last_level():
    model = build_adamixer()
    images = model.preprocess([{"image": pattern_image(0, 65, 97)}])
    assert images.tensor.shape == (1, 3, 96, 128)
    assert images.image_sizes == [(65, 97)]


def test_batch_normalisation_keeps_its_statistics_while_training():
    model = build_adamixer().train()
    assert model.training
    assert not model.backbone.norm.training
    assert model.backbone.norm.weight.requires_grad
    outer = nn.Sequential(model).eval().train()
    assert not outer[0].backbone.norm.training


def test_neck_features_are_in_the_memory():
    model = build_adamixer().eval()
    features = model.extract(model.preprocess(batch()))
    memory = model.encode(features)
    assert memory.spatial_shapes == ((24, 32), (12, 16), (6, 8), (3, 4))
    assert memory.image_sizes.tolist() == [[96, 128], [64, 80]]
    first = memory.tokens[:, : 24 * 32].transpose(1, 2).unflatten(-1, (24, 32))
    assert torch.equal(first, features.levels[0])
    assert memory.padding_mask.shape == memory.tokens.shape[:2]


def test_other_queries_and_groups_apart():
    model = build_adamixer().eval()
    with torch.no_grad():
        memory = model.encode(model.extract(model.preprocess(batch())))
        own = model.queries(memory)
        other = Queries(torch.randn(2, 9, 32), own.position[:, :1].expand(-1, 9, -1) + 0.5)
        apart = torch.ones(15, 15, dtype=torch.bool)
        apart[:6, :6] = apart[6:, 6:] = False
        joined = Queries(
            torch.cat([own.content, other.content], 1),
            torch.cat([own.position, other.position], 1),
            apart,
        )
        together = model.predict(model.decode(memory, joined))
        for queries, part in ((own, slice(0, 6)), (other, slice(6, 15))):
            alone = model.predict(model.decode(memory, queries))
            torch.testing.assert_close(together.logits[:, :, part], alone.logits, **SINGLE)
            torch.testing.assert_close(together.boxes[:, :, part], alone.boxes, **SINGLE)


def test_attention_maps_on_request_change_nothing():
    model = build_adamixer().eval()
    with torch.no_grad():
        memory = model.encode(model.extract(model.preprocess(batch())))
        queries, maps = model.queries(memory), AttentionMaps()
        plain, mapped = model.decode(memory, queries), model.decode(memory, queries, maps)
    torch.testing.assert_close(plain.states, mapped.states)
    assert [m.shape for m in maps.self_attention] == [(2, 4, 6, 6)] * 2
    for weights in maps.self_attention:
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 6))
    for locations, weights in maps.sampling:
        assert locations.shape == (2, 6, 2, 4, 6, 2)
        torch.testing.assert_close(weights.sum(3), torch.ones(2, 6, 2, 6))


def test_branches_are_decoded_at_once():
    model = build_adamixer().eval()
    with torch.no_grad():
        memory = model.encode(model.extract(model.preprocess(batch())))
        tokens = torch.cat([memory.tokens, memory.tokens + 1])
        branches = (STUDENT, Branch("share_v"))
        both = dataclasses.replace(memory, tokens=tokens, branches=branches)
        predictions = model.predict(model.decode(both, model.queries(both)))
        for index, own in enumerate(tokens.chunk(2)):
            single = dataclasses.replace(memory, tokens=own)
            alone = model.predict(model.decode(single, model.queries(single)))
            torch.testing.assert_close(predictions.of_branch(index).boxes, alone.boxes, **SINGLE)


def test_samples_are_those_of_bilinear_maps_weighted_by_level():
    torch.manual_seed(0)
    levels = [torch.randn(2, 8, 32 // stride * 2, 32 // stride * 3) for stride in STRIDES]
    points = torch.rand(2, 5, 2, 3, 3) * torch.tensor([110.0, 80.0, 6.0]) - 8
    points[..., 2] += 8
    expected = 0
    weights = torch.exp(-((points[..., 2:] - torch.arange(2.0, 6.0)) ** 2) / 2)
    weights = weights / weights.sum(-1, keepdim=True)
    for level, (features, stride) in enumerate(zip(levels, STRIDES, strict=True)):
        size = torch.tensor([features.shape[-1], features.shape[-2]]) * stride
        grid = (points[..., :2] / size * 2 - 1).transpose(1, 2).flatten(0, 1)
        maps = features.unflatten(1, (2, 4)).flatten(0, 1)
        samples = nn.functional.grid_sample(maps, grid, align_corners=False)
        samples = samples.unflatten(0, (2, 2)).permute(0, 3, 1, 4, 2)  # (B, N, G, P, C / G)
        expected = expected + samples * weights[..., level, None]
    torch.testing.assert_close(pyramid(levels).sample(points), expected, **SINGLE)


def test_losses_are_those_of_corners_in_pixels():
    model = build_adamixer(num_layers=1).train()
    items = batch()
    targets = model.prepare_targets(items)
    size = torch.tensor([128.0, 96.0])
    found = torch.tensor([[0.5, 0.5, 1, 1], [0.25, 0.5, 0.4, 0.7]]).expand(1, 2, 2, 4)
    logits = torch.zeros(1, 2, 2, 5)
    matches = model.criterion.match(logits, found, targets)
    losses = model.criterion.group_losses(logits, found, targets, matches, num_boxes=-1)
    pairs = list(zip(matches.queries[0].tolist(), matches.targets[0].tolist(), strict=True))
    assert pairs == [(0, 1), (1, 0)]
    distance = overlap = 0
    for query, target in pairs:
        box = box_cxcywh_to_xyxy(found[0, 0, query]) * size.repeat(2)
        gt = targets[0]["boxes_xyxy"][target]
        distance += ((box - gt).abs() / size.repeat(2)).sum()
        low, high = torch.maximum(box[:2], gt[:2]), torch.minimum(box[2:], gt[2:])
        shared = (high - low).clamp(min=0).prod()
        union = (box[2:] - box[:2]).prod() + (gt[2:] - gt[:2]).prod() - shared
        hull = (torch.maximum(box[2:], gt[2:]) - torch.minimum(box[:2], gt[:2])).prod()
        overlap += shared / union - (hull - union) / hull
    torch.testing.assert_close(losses["loss_bbox"], distance[None] / 2)
    torch.testing.assert_close(losses["loss_giou"], 1 - overlap[None] / 2)


def test_fewer_queries_than_boxes_count_as_matched():
    model = build_adamixer(num_queries=1).train()
    box = [10.0, 10.0, 70.0, 60.0]
    items = [
        {"image": pattern_image(0, 64, 96), "instances": instances((64, 96), [box] * n, [2] * n)}
        for n in (1, 3)
    ]
    once, thrice = (model([item]) for item in items)
    for name, loss in once.items():
        assert thrice[name].item() == pytest.approx(loss.item(), rel=1e-5), name


def test_without_boxes_only_classes_are_learned():
    model = build_adamixer().train()
    losses = model(batch(()))
    assert all(loss.item() == 0 for name, loss in losses.items() if "class" not in name)
    assert losses["loss_class"] > 0


def test_one_query_and_one_class():
    model = build_adamixer(num_queries=1, num_classes=1)
    image = pattern_image(0, 64, 96)
    item = {"image": image, "instances": instances((64, 96), [[4, 5, 5, 6]], [0])}
    assert all(torch.isfinite(loss) for loss in model.train()([item]).values())
    assert len(model.eval()([{"image": image}])[0]["instances"]) == 1


def test_contradictions_are_refused_in_one_line():
    with pytest.raises(ValueError, match="in_features names 2 maps, in_channels has 1"):
        ChannelMapping(["res2", "res3"], [4], 32, num_groups=8)
    with pytest.raises(ValueError, match="num_layers is 0"):
        AdaMixerDecoder(num_layers=0)
    with pytest.raises(ValueError, match="num_groups 3 does not divide embed_dim 32"):
        AdaMixerDecoder(32, num_groups=3)
    with pytest.raises(ValueError, match="num_heads 5 does not divide embed_dim 32"):
        AdaMixerDecoder(32, num_heads=5)
    model = build_adamixer()
    model.transformer.decoder.strides = (8, 16, 32)
    with pytest.raises(ValueError, match="neck gives 4 levels, the decoder has 3 strides"):
        model(batch())
