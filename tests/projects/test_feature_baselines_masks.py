"""Where FGD and FGFI look, against slow second implementations; attention, non-local cells."""

from fractions import Fraction
from math import ceil, floor

import pytest
import torch
from feature_context import context_of
from hypothesis import example, given, settings
from hypothesis import strategies as st

from projects.detr_distill.fgd import box_masks
from projects.detr_distill.fgfi import FGFI
from projects.detr_distill.fkd import FKD, NonLocal
from projects.detr_distill.mgd import MGD
from projects.detr_distill.regions import activation_attention, boxes_in_cells


@st.composite
def batches(draw):
    """Unpadded sizes (h, w) of images, and boxes of each in whole pixels, some on the border."""
    sizes, boxes = [], []
    for _ in range(draw(st.integers(1, 3))):
        height, width = (draw(st.integers(8, 96)) for _ in range(2))
        corners = st.tuples(*(st.integers(0, side) for side in (width, height, width, height)))
        found = [
            [min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)]
            for x1, y1, x2, y2 in draw(st.lists(corners, max_size=4))
            if x1 != x2 and y1 != y2
        ]
        sizes.append((height, width))
        boxes.append(found)
    return sizes, boxes


EDGES = (
    [(40, 64), (64, 50)],
    [[[0, 0, 1, 1], [63, 39, 64, 40], [0, 0, 64, 40], [8, 8, 16, 16]], []],
)
"""One-pixel boxes in two corners, a box of the whole image, one on edges of cells; no box."""


def padded_size(sizes):
    return max(height for height, _ in sizes), max(width for _, width in sizes)


def as_tensors(boxes, dtype=torch.float32):
    return [torch.tensor(each, dtype=dtype).reshape(-1, 4) for each in boxes]


# --- FGD ----------------------------------------------------------------------------------------


def slow_box_masks(boxes, size, shape):
    """Both masks of one image, cell by cell, in exact arithmetic."""
    foreground = [[Fraction(0)] * shape[1] for _ in range(shape[0])]
    for x1, y1, x2, y2 in boxes:
        left, right = (
            floor(Fraction(x1 * shape[1], size[1])),
            ceil(Fraction(x2 * shape[1], size[1])),
        )
        top, bottom = (
            floor(Fraction(y1 * shape[0], size[0])),
            ceil(Fraction(y2 * shape[0], size[0])),
        )
        weight = Fraction(1, (right - left + 1) * (bottom - top + 1))
        for y in range(shape[0]):
            for x in range(shape[1]):
                if left <= x <= right and top <= y <= bottom:
                    foreground[y][x] = max(foreground[y][x], weight)
    free = sum(value == 0 for row in foreground for value in row)
    background = [[float(value == 0) / max(free, 1) for value in row] for row in foreground]
    return [[float(value) for value in row] for row in foreground], background


@pytest.mark.parametrize("padded", [True, False])
@settings(max_examples=60, deadline=None)
@given(batches(), st.tuples(st.integers(1, 9), st.integers(1, 9)))
@example(EDGES, (5, 8))
@example(([(8, 8)], [[]]), (1, 1))
@example(([(8, 8)], [[[0, 0, 8, 8]]]), (1, 1))
def test_fgd_masks(padded, batch, shape):
    sizes, boxes = batch
    context = context_of(as_tensors(boxes), padded_size(sizes), sizes)
    masks = box_masks(*boxes_in_cells(context, shape, padded), shape)
    for image, size in enumerate(sizes):
        expected = slow_box_masks(boxes[image], padded_size(sizes) if padded else size, shape)
        for mask, wanted in zip(masks, expected, strict=True):
            torch.testing.assert_close(mask[image], torch.tensor(wanted))


# --- FGFI ---------------------------------------------------------------------------------------


def overlap_of(one, other):
    width, height = (
        max(0.0, min(one[axis + 2], other[axis + 2]) - max(one[axis], other[axis]))
        for axis in (0, 1)
    )
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return width * height / (sum(areas) - width * height)


def slow_masks(boxes, size, shapes, scale, ratios):
    """Cells of every level that are near a box of one image, and those too close to call.

    The anchors are drawn in pixels, each level's as large as its stride asks for along an axis.
    """
    near, close = set(), set()
    for box in boxes:
        best = {}
        for level, (rows, columns) in enumerate(shapes):
            across, down = size[1] / columns, size[0] / rows
            for y in range(rows):
                for x in range(columns):
                    center = (x + 0.5) * across, (y + 0.5) * down
                    half = [
                        (across * scale * ratio**-0.5 / 2, down * scale * ratio**0.5 / 2)
                        for ratio in ratios
                    ]
                    best[level, y, x] = max(
                        overlap_of(
                            box,
                            (center[0] - w, center[1] - h, center[0] + w, center[1] + h),
                        )
                        for w, h in half
                    )
        least = max(best.values()) / 2
        near |= {cell for cell, overlap in best.items() if overlap > least}
        close |= {cell for cell, overlap in best.items() if abs(overlap - least) < 1e-9}
    return near, close


@settings(max_examples=40, deadline=None)
@given(batches(), st.sampled_from([1.0, 2.0, 8.0]))
@example(EDGES, 1.0)
@example(EDGES, 8.0)
@example(([(8, 8), (9, 8)], [[], []]), 2.0)
def test_fgfi_masks(batch, scale):
    sizes, boxes = batch
    padded = padded_size(sizes)
    shapes = [(ceil(padded[0] / stride), ceil(padded[1] / stride)) for stride in (8, 16, 32)]
    objective = FGFI(scales=(scale,))
    context = context_of(as_tensors(boxes, torch.float64), padded)
    masks = objective.masks(context, shapes)
    for image, there in enumerate(boxes):
        near, close = slow_masks(there, padded, shapes, scale, objective.ratios)
        found = {
            (level, y, x)
            for level, mask in enumerate(masks)
            for y, x in mask[image].nonzero().tolist()
        }
        assert found - close == near - close


def test_fgfi_marks_the_level_that_fits():
    shapes = [(64, 64), (32, 32), (16, 16), (8, 8)]  # of strides 4 to 32, anchors of 32 to 256
    objective = FGFI()
    for level, side in enumerate((32.0, 64.0, 128.0, 256.0)):
        box = torch.tensor([[0.0, 0.0, side, side]])
        masks = objective.masks(context_of([box], (256, 256)), shapes)
        counts = [int(mask.sum()) for mask in masks]
        assert counts[level] > 0
        assert sum(counts) - counts[level] == 0


# --- attention, hidden and non-local cells ------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 6), st.sampled_from([0.1, 0.5, 0.8]))
def test_attention_weighs_like_its_formula(images, channels, side, temperature):
    features = torch.randn(images, channels, side, side + 1, dtype=torch.float64)
    cells, of_channels = activation_attention(features, temperature)
    for image in range(images):
        exponents = (features[image].abs().sum(0) / channels / temperature).exp()
        expected = exponents / exponents.sum() * side * (side + 1)
        torch.testing.assert_close(cells[image], expected)
        exponents = (features[image].abs().sum((1, 2)) / side / (side + 1) / temperature).exp()
        torch.testing.assert_close(of_channels[image], exponents / exponents.sum() * channels)


def test_mgd_hides_its_share_in_all_channels():
    objective = MGD()
    objective.make_adapters([4], [4])
    seen = []
    objective.generators[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    features = torch.rand(2, 4, 100, 100) + 0.1
    objective.level_loss(0, features, features, None)
    kept = seen[0] != 0
    assert torch.equal(kept, kept[:, :1].expand_as(kept))
    assert torch.equal(seen[0][kept], features[kept])
    assert kept.float().mean() == pytest.approx(0.35, abs=0.02)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 12), st.integers(2, 12), st.sampled_from([2, 4, 8]))
def test_non_local_block_is_the_sum_over_pooled_cells(height, width, pool):
    block = NonLocal(6, 3, pool).double()
    torch.nn.init.normal_(block.norm.weight)
    features = torch.randn(2, 6, height, width, dtype=torch.float64)
    query, key, value = (layer(features) for layer in (block.query, block.key, block.value))
    tall, wide = min(pool, height), min(pool, width)
    mixed = torch.zeros_like(query)
    count = (height // tall) * (width // wide)
    for y in range(height // tall):
        for x in range(width // wide):
            window = (..., slice(y * tall, (y + 1) * tall), slice(x * wide, (x + 1) * wide))
            similarity = (query * key[window].amax((2, 3), keepdim=True)).sum(1, keepdim=True)
            mixed += similarity / count * value[window].amax((2, 3), keepdim=True)
    output = block.output(mixed)
    variance, mean = torch.var_mean(output, (0, 2, 3), correction=0, keepdim=True)
    scale = block.norm.weight[:, None, None] / (variance + 1e-5).sqrt()
    torch.testing.assert_close(block(features), features + (output - mean) * scale)


def test_fkd_starts_with_identities_and_looks_at_adapted_channels_where_they_differ():
    objective = FKD()
    objective.make_adapters([3, 3], [5, 5])
    assert [block.pool for block in objective.student_blocks] == [8, 4]
    student, teacher = torch.randn(2, 3, 9, 9), torch.randn(2, 5, 9, 9)
    assert torch.equal(objective.student_blocks[0](student), student)
    assert objective.level_loss(0, student, teacher, None).isfinite().all()
    adapted = objective.adapters[0](student)
    alike = FKD()
    alike.make_adapters([5], [5])
    assert torch.equal(
        objective._mask(student, adapted, teacher), alike._mask(adapted, adapted, teacher)
    )
