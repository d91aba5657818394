"""Foreground masks against the recorded ones and against drawing and resizing pixels."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded_entries import Recording, matches

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


CASES = [
    "gtmask_single",
    "gtmask_multi",
    "gtmask_pad16_single",
    "gtmask_pad5_multi",
    "gtmask_significance",
    "gtmask_exact_grid",
    "gtmask_one_row",
]


class RecordedMask:
    """A recorded scene of boxes; ``entries`` is what is recorded of its masks."""

    def __init__(self, recording, case):
        self.entries, self.facts = recording.entries(case), recording.cases[case]
        inputs = self.entries.group("in")
        self.boxes = [boxes[~boxes.isnan().any(1)] for boxes in inputs.pop("boxes_xyxy")]
        assert [len(boxes) for boxes in self.boxes] == inputs.pop("num_boxes").tolist()
        self.shapes = [tuple(x) for x in inputs.pop("feat_sizes_hw").view(-1, 2).tolist()]
        self.sizes = [tuple(x) for x in inputs.pop("image_sizes_hw").tolist()]
        self.padded = tuple(inputs.pop("padded_hw").tolist())
        assert not inputs

    def marked(self, boxes, shapes):
        """Tokens (B, S) of maps of the given shapes in which boxes of every image are marked."""
        features = feature_maps(shapes, self.sizes, self.padded)
        return foreground_mask(features, targets_of(boxes), self.facts["pad_fg_pixel"])

    def pixels(self):
        """The release's mask (B, H, W): maps of the padded size read every pixel itself."""
        if self.facts["criterion"] != "significance_value":
            return self.marked(self.boxes, [self.padded]).unflatten(1, self.padded).double()
        # small boxes count more, and the largest weight where some overlap; tokens ignore weights
        masks = torch.zeros(len(self.boxes), *self.padded, dtype=torch.float64)
        for index in range(max(len(boxes) for boxes in self.boxes)):
            single = [boxes[index : index + 1] for boxes in self.boxes]
            mask = self.marked(single, [self.padded]).unflatten(1, self.padded).double()
            area = mask.sum((1, 2))
            # as recorded: 1 up to 32^2 pixels, and a straight line through 64^2 and 128^2
            weight = np.interp(area, [32**2, 64**2, 128**2], [1.0, 0.9, 0.8])
            masks = torch.maximum(masks, mask * torch.from_numpy(weight)[:, None, None])
        return masks


@pytest.fixture(scope="module")
def recording(reference_dir):
    return Recording(reference_dir / "ks_detr" / "attention")


@pytest.mark.parametrize("case", CASES)
def test_recorded_masks(case, recording):
    scene = RecordedMask(recording, case)
    assert (len(scene.shapes) > 1) == scene.facts["multi_scale"]
    mask = scene.marked(scene.boxes, scene.shapes)
    assert mask.sum(1).tolist() == scene.facts["fg_tokens_per_image"]
    assert torch.equal(mask.T, scene.entries.take("out/token_mask") != 0)
    pixels = scene.pixels()
    matches(pixels.sum((1, 2)), scene.entries.take("out/pixel_sum"))
    recorded = scene.entries.take_if_recorded("out/pixel_mask")
    assert (recorded is None) == scene.facts["multi_scale"]
    if recorded is not None:
        assert torch.equal(pixels != 0, recorded != 0)
        matches(pixels, recorded)
    scene.entries.finish()


def test_no_recorded_mask_is_left_out(recording):
    assert recording.of_kind("gt mask") == set(CASES)


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
