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


def drawn(boxes, shapes, padded):
    """The released procedure: draw pixels, resize with aligned corners, keep what is not zero."""
    masks = []
    for image_boxes in boxes:
        pixels = torch.zeros(1, 1, *padded)
        for x1, y1, x2, y2 in np.asarray(image_boxes, dtype=np.float32).reshape(-1, 4).astype(int):
            pixels[..., y1:y2, x1:x2] = 1
        resized = [
            F.interpolate(pixels, size=s, mode="bilinear", align_corners=True) for s in shapes
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
def scenes(draw):
    height, width = draw(st.integers(1, 70)), draw(st.integers(1, 70))
    shapes = draw(
        st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=2)
    )
    images = []
    for _ in range(draw(st.integers(1, 3))):
        boxes = []
        for _ in range(draw(st.integers(0, 4))):
            x = sorted(draw(st.tuples(*[st.floats(0, width, width=32)] * 2)))
            y = sorted(draw(st.tuples(*[st.floats(0, height, width=32)] * 2)))
            boxes.append([x[0], y[0], x[1], y[1]])
        images.append(boxes)
    return images, shapes, (height, width)


@settings(max_examples=200, deadline=None)
@given(scenes())
def test_equals_drawing_pixels(scene):
    boxes, shapes, padded = scene
    features = feature_maps(shapes, [padded] * len(boxes), padded)
    assert torch.equal(foreground_mask(features, targets_of(boxes)), drawn(boxes, shapes, padded))


def test_images_without_boxes():
    mask = foreground_mask(feature_maps([(3, 4)], [(32, 32)] * 2, (32, 32)), targets_of([[], []]))
    assert mask.shape == (2, 12)
    assert not mask.any()
