"""Transforms and augmentations against recorded facts."""

import json
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import transforms as T
from hypothesis import given
from hypothesis import strategies as st

DATA = Path(__file__).parents[2] / "data" / "detectron2"
FACTS = json.loads((DATA / "facts.json").read_text())["transforms"]
IMAGES = dict(np.load(DATA / "images.npz"))
IMAGE = IMAGES["image"]
H, W = IMAGE.shape[:2]
BOXES = np.array(FACTS["transforms_on_boxes"]["boxes_xyxy"])
FIXED = {
    "resize_to_35x47": T.ResizeTransform(H, W, 35, 47),
    "hflip": T.HFlipTransform(W),
    "vflip": T.VFlipTransform(H),
    "crop_x3_y2_w10_h12": T.CropTransform(3, 2, 10, 12),
    "hflip_then_resize": T.TransformList([T.HFlipTransform(W), T.ResizeTransform(H, W, 35, 47)]),
    "noop": T.NoOpTransform(),
}


@pytest.mark.parametrize("name", FIXED)
def test_boxes_transform_like_recorded(name):
    np.testing.assert_allclose(
        FIXED[name].apply_box(BOXES.copy()), FACTS["transforms_on_boxes"][name], atol=1e-9
    )


@pytest.mark.parametrize("name", [key for key in IMAGES if key.startswith("resize/")])
def test_resize_gives_recorded_pixels(name):
    _, size, kind = name.split("/")
    resize = T.ResizeTransform(H, W, *map(int, size.split("x")))
    if kind == "segmentation_nearest":
        result = resize.apply_segmentation(IMAGE[:, :, 0] % 7)
        np.testing.assert_array_equal(result, IMAGES[name])
        return
    result = resize.apply_image(IMAGE.astype(kind))
    assert result.dtype == IMAGES[name].dtype
    np.testing.assert_allclose(
        result.astype(float), IMAGES[name], atol=1 if kind == "uint8" else 1e-3
    )


def test_resize_of_other_shapes():
    resize = T.ResizeTransform(H, W, 11, 16)
    expected = resize.apply_image(IMAGE)
    for index in range(3):
        plane = np.ascontiguousarray(IMAGE[:, :, index])
        np.testing.assert_array_equal(resize.apply_image(plane), expected[:, :, index])
        with_channel = resize.apply_image(plane[:, :, None])
        np.testing.assert_array_equal(with_channel[:, :, 0], expected[:, :, index])
    flipped = IMAGE[:, ::-1].astype(np.float32)  # negative strides
    assert resize.apply_image(flipped).shape == (11, 16, 3)
    assert resize.apply_image(flipped[:, :, 0]).shape == (11, 16)
    with pytest.raises(AssertionError):
        resize.apply_image(IMAGE[1:])


def test_resize_inverse_restores_coordinates():
    resize = T.ResizeTransform(H, W, 35, 47)
    np.testing.assert_allclose(resize.inverse().apply_box(resize.apply_box(BOXES.copy())), BOXES)


@pytest.mark.parametrize("name", ["crop_x3_y2_w10_h12", "hflip"])
def test_crop_and_flip_give_recorded_pixels(name):
    np.testing.assert_array_equal(FIXED[name].apply_image(IMAGE), IMAGES[name])


def test_shortest_edge_output_sizes():
    for row in FACTS["ResizeShortestEdge_output_hw"]["table"]:
        size = T.ResizeShortestEdge.get_output_shape(*row["hw"], row["short"], row["max"])
        assert list(size) == row["out"], row


@given(st.integers(8, 2000), st.integers(8, 2000), st.integers(8, 900), st.integers(900, 1400))
def test_shortest_edge_keeps_the_aspect_ratio(height, width, short, longest):
    size = T.ResizeShortestEdge.get_output_shape(height, width, short, longest)
    assert max(size) <= longest
    assert min(size) == short or max(size) == longest
    scale = min(short / min(height, width), longest / max(height, width))
    assert size[0] == pytest.approx(height * scale, abs=0.51)
    assert size[1] == pytest.approx(width * scale, abs=0.51)


def sampled_sizes(augmentation, count=300):
    return {augmentation.get_transform(IMAGE).new_h for _ in range(count)}


def test_shortest_edge_sampling():
    np.random.seed(0)
    assert sampled_sizes(T.ResizeShortestEdge([480, 512], sample_style="choice")) == {480, 512}
    assert sampled_sizes(T.ResizeShortestEdge([480, 490])) == set(range(480, 491))
    assert sampled_sizes(T.ResizeShortestEdge(20)) == {20}
    assert isinstance(T.ResizeShortestEdge(0).get_transform(IMAGE), T.NoOpTransform)
    with pytest.raises(AssertionError):
        T.ResizeShortestEdge([1, 2, 3])
    with pytest.raises(AssertionError):
        T.ResizeShortestEdge([1, 2], sample_style="any")


def test_resize_to_a_fixed_size():
    assert T.Resize((12, 34)).get_transform(IMAGE).apply_image(IMAGE).shape == (12, 34, 3)
    assert T.Resize(9).get_transform(IMAGE).apply_image(IMAGE).shape == (9, 9, 3)


def test_random_flip():
    np.random.seed(0)
    flips = sum(
        isinstance(T.RandomFlip().get_transform(IMAGE), T.HFlipTransform) for _ in range(400)
    )
    assert 160 < flips < 240
    assert isinstance(T.RandomFlip(prob=0.0).get_transform(IMAGE), T.NoOpTransform)
    vertical = T.RandomFlip(prob=1.0, horizontal=False, vertical=True).get_transform(IMAGE)
    np.testing.assert_array_equal(vertical.apply_image(IMAGE), IMAGE[::-1])
    for both in (True, False):
        with pytest.raises(ValueError, match=r"(?i)hori|at least"):
            T.RandomFlip(horizontal=both, vertical=both)


@pytest.mark.parametrize("size", ["500x700", "300x900", "600x400", "350x200"])
def test_random_crop_absolute_range(size):
    np.random.seed(0)
    height, width = map(int, size.split("x"))
    image = np.zeros((height, width), np.uint8)
    crop = T.RandomCrop("absolute_range", (384, 600))
    crops = [crop.get_transform(image) for _ in range(2500)]
    recorded = FACTS["RandomCrop_absolute_range_384_600"]["sizes_seen"][size]
    assert [min(c.h for c in crops), max(c.h for c in crops)] == recorded["crop_h_min_max"]
    assert [min(c.w for c in crops), max(c.w for c in crops)] == recorded["crop_w_min_max"]
    assert all(c.x0 >= 0 and c.x0 + c.w <= width for c in crops)
    assert all(c.y0 >= 0 and c.y0 + c.h <= height for c in crops)


def test_random_crop_of_other_types():
    facts = FACTS["RandomCrop_absolute_range_384_600"]
    image_size = (100, 200)
    relative = T.RandomCrop("relative", (0.5, 0.3)).get_crop_size(image_size)
    assert list(relative) == facts["relative (0.5, 0.3) on 100x200"]
    absolute = T.RandomCrop("absolute", (30, 500)).get_crop_size(image_size)
    assert list(absolute) == facts["absolute (30, 500) on 100x200"]
    np.random.seed(0)
    augmentation = T.RandomCrop("relative_range", (0.5, 0.25))
    sizes = np.array([augmentation.get_crop_size(image_size) for _ in range(500)])
    assert sizes.min(axis=0).tolist() == pytest.approx([50, 50], abs=3)
    assert sizes.max(axis=0).tolist() == pytest.approx([100, 200], abs=3)
    with pytest.raises(AssertionError):
        T.RandomCrop("round", (1, 1))
    with pytest.raises(AssertionError):
        T.RandomCrop("absolute_range", (3, 2)).get_crop_size(image_size)


def test_same_seed_same_crop():
    crop = T.RandomCrop("absolute_range", (5, 20))
    places = []
    for _ in range(2):
        np.random.seed(7)
        chosen = crop.get_transform(IMAGE)
        places.append((chosen.x0, chosen.y0, chosen.w, chosen.h))
    assert places[0] == places[1]


def test_random_apply():
    np.random.seed(0)
    flip = T.HFlipTransform(W)
    applied = 0
    for _ in range(300):
        data = T.AugInput(IMAGE)
        T.RandomApply(flip, prob=0.3)(data)
        applied += not np.array_equal(data.image, IMAGE)
    assert 60 < applied < 120
    assert T.RandomApply(T.RandomFlip(1.0), 1.0).get_transform(IMAGE).width == W
    with pytest.raises(AssertionError):
        T.RandomApply(flip, 1.5)


def test_augmentation_list_transforms_everything_together():
    facts = FACTS["AugmentationList_AugInput"]
    labels = IMAGE[:, :, 0].copy()
    data = T.AugInput(IMAGE, boxes=BOXES.copy(), sem_seg=labels)
    augmentations = [T.RandomFlip(prob=1.0), T.ResizeShortestEdge(20, 26)]
    transforms = T.AugmentationList(augmentations)(data)
    assert isinstance(transforms, T.TransformList)
    assert list(data.image.shape) == facts["image_shape"]
    np.testing.assert_allclose(data.boxes, facts["boxes"], atol=1e-9)
    assert set(np.unique(data.sem_seg)) <= set(np.unique(labels))
    np.testing.assert_array_equal(transforms.apply_image(IMAGE), data.image)
    np.testing.assert_array_equal(transforms.apply_box(BOXES.copy()), data.boxes)


def test_apply_augmentations_takes_images_and_inputs():
    image, transforms = T.apply_transform_gens([T.VFlipTransform(H)], IMAGE)
    np.testing.assert_array_equal(image, IMAGE[::-1])
    assert isinstance(transforms, T.TransformList)
    data = T.AugInput(IMAGE)
    assert T.apply_augmentations([T.VFlipTransform(H)], data)[0] is data
    np.testing.assert_array_equal(data.image, IMAGE[::-1])


class CropToFirstBox(T.Augmentation):
    def get_transform(self, image, boxes):
        x0, y0, x1, y1 = boxes[0].astype(int)
        return T.CropTransform(x0, y0, x1 - x0, y1 - y0)


class TakesAnything(T.Augmentation):
    def get_transform(self, image, *others):
        return T.NoOpTransform()


def test_augmentation_gets_the_arguments_it_names():
    data = T.AugInput(IMAGE, boxes=np.array([[2.0, 3.0, 9.0, 13.0]]))
    CropToFirstBox()(data)
    assert data.image.shape == (10, 7, 3)
    assert data.boxes.tolist() == [[0, 0, 7, 10]]

    class OnlyImage:
        image = IMAGE

    with pytest.raises(AttributeError):
        CropToFirstBox()(OnlyImage())
    with pytest.raises(TypeError):
        TakesAnything()(data)


def test_augmentations_describe_themselves():
    assert repr(T.RandomFlip(prob=0.25)) == "RandomFlip(prob=0.25)"
    assert "RandomFlip()" in repr(T.AugmentationList([T.RandomFlip(), T.NoOpTransform()]))
