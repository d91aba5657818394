"""Foreground masks against the recorded ones and against drawing and resizing pixels."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from detectors.structures import FeatureMaps
from projects.ks_detr.foreground import foreground_mask


def feature_maps(shapes, sizes, padded):
    levels = tuple(torch.zeros(len(sizes), 1, *shape) for shape in shapes)
    return FeatureMaps(levels, None, levels, sizes, padded)


def targets_of(boxes):
    return [{"boxes_xyxy": torch.as_tensor(b, dtype=torch.float32).reshape(-1, 4)} for b in boxes]


def drawn(boxes, shapes, padded, sizes=None, box_padding=0, interpolation="bilinear"):
    """The released procedure: draw pixels, resize with aligned corners, keep what is not zero."""
    masks = []
    sizes = [padded] * len(boxes) if sizes is None else sizes
    aligned = True if interpolation == "bilinear" else None
    for image_boxes, (height, width) in zip(boxes, sizes, strict=True):
        pixels = torch.zeros(1, 1, *padded)
        for x1, y1, x2, y2 in np.asarray(image_boxes, dtype=np.float32).reshape(-1, 4).astype(int):
            if box_padding:
                x1, x2 = max(x1 - box_padding, 0), min(x2 + box_padding, width)
                y1, y2 = max(y1 - box_padding, 0), min(y2 + box_padding, height)
            pixels[..., y1:y2, x1:x2] = 1
        resized = [
            F.interpolate(pixels, size=s, mode=interpolation, align_corners=aligned) for s in shapes
        ]
        masks.append(torch.cat([r.flatten() for r in resized]) != 0)
    return torch.stack(masks)


@pytest.mark.parametrize(
    "case",
    [
        "gtmask_single",
        "gtmask_multi",
        "gtmask_pad16_single",
        "gtmask_pad5_multi",
        "gtmask_exact_grid",
        "gtmask_one_row",
    ],
)
def test_recorded_masks(case, reference_dir):
    arrays = np.load(reference_dir / "ks_detr" / "attention.npz")
    record = json.loads((reference_dir / "ks_detr" / "attention.json").read_text())["cases"][case]
    data = {k.split("/", 1)[1]: arrays[k] for k in arrays.files if k.startswith(f"{case}/")}
    boxes = [b[~np.isnan(b).any(1)] for b in data["in/boxes_xyxy"]]
    shapes = [tuple(map(int, shape)) for shape in data["in/feat_sizes_hw"].reshape(-1, 2)]
    sizes = [tuple(map(int, size)) for size in data["in/image_sizes_hw"]]
    padded = tuple(map(int, data["in/padded_hw"]))
    mask = foreground_mask(
        feature_maps(shapes, sizes, padded), targets_of(boxes), record["pad_fg_pixel"]
    )
    assert mask.sum(1).tolist() == record["fg_tokens_per_image"]
    np.testing.assert_array_equal(mask.T.numpy(), data["out/token_mask"] != 0)


@st.composite
def spans(draw, length):
    """Start and end within an axis: any, one pixel, empty, at the border, or all of it."""
    kind = draw(st.sampled_from(["any", "pixel", "empty", "border", "all"]))
    first, second = sorted(draw(st.tuples(*[st.floats(0, length, width=32)] * 2)))
    pixel = float(draw(st.integers(0, length - 1)))
    return {
        "any": (first, second),
        "pixel": (pixel, pixel + 1),
        "empty": (first, first),
        "border": (length - 1.0, float(length)),
        "all": (0.0, float(length)),
    }[kind]


@st.composite
def scenes(draw):
    """Boxes of a padded batch, the shapes of its levels, its size and the images' sizes."""
    padded = draw(st.integers(1, 70)), draw(st.integers(1, 70))
    shapes = draw(
        st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=2)
    )
    images, sizes = [], []
    for _ in range(draw(st.integers(1, 3))):
        height, width = (draw(st.integers(1, length)) for length in padded)
        boxes = []
        for _ in range(draw(st.integers(0, 4))):
            (x1, x2), (y1, y2) = draw(spans(width)), draw(spans(height))
            boxes.append([x1, y1, x2, y2])
        images.append(boxes)
        sizes.append((height, width))
    return images, shapes, padded, sizes


@settings(max_examples=300, deadline=None)
@given(scenes(), st.sampled_from([0, 1, 5, 16]), st.sampled_from(["bilinear", "nearest"]))
def test_equals_drawing_pixels(scene, box_padding, interpolation):
    boxes, shapes, padded, sizes = scene
    features = feature_maps(shapes, sizes, padded)
    found = foreground_mask(features, targets_of(boxes), box_padding, interpolation)
    assert torch.equal(found, drawn(boxes, shapes, padded, sizes, box_padding, interpolation))


def test_interpolations_differ_between_sampling_positions():
    """Three samples of ten pixels: the corners and the middle, or the first pixel of each third."""
    features = feature_maps([(1, 3)], [(1, 10)], (1, 10))
    boxes = targets_of([[[9, 0, 10, 1]]])
    assert foreground_mask(features, boxes).tolist() == [[False, False, True]]
    assert not foreground_mask(features, boxes, interpolation="nearest").any()


def test_images_without_boxes():
    mask = foreground_mask(feature_maps([(3, 4)], [(32, 32)] * 2, (32, 32)), targets_of([[], []]))
    assert mask.shape == (2, 12)
    assert not mask.any()
