"""Boxes, Instances and ImageList against recorded facts and plain formulas."""

import copy
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, BoxMode, ImageList, Instances, pairwise_iou
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

DATA = Path(__file__).parents[2] / "data" / "detectron2"
FACTS = json.loads((DATA / "facts.json").read_text())["structures"]
RECORDED = FACTS["boxes"]


def recorded_boxes() -> Boxes:
    return Boxes(torch.tensor(RECORDED["boxes"]))


def assert_close(actual, expected):
    torch.testing.assert_close(actual, torch.tensor(expected), rtol=1e-6, atol=1e-6)


def test_boxes_measure_like_recorded():
    boxes = recorded_boxes()
    assert len(boxes) == RECORDED["len"]
    assert_close(boxes.area(), RECORDED["area"])
    assert_close(boxes.get_centers(), RECORDED["centers"])
    assert boxes.nonempty().tolist() == RECORDED["nonempty"]
    assert boxes.nonempty(30).tolist() == RECORDED["nonempty_threshold_30"]
    assert boxes.inside_box((100, 100)).tolist() == RECORDED["inside_box_h100_w100"]
    assert boxes.inside_box((100, 100), 15).tolist() == RECORDED["inside_box_threshold_15"]
    assert Boxes([[4.0, 4.0, 0.0, 0.0]]).area().tolist() == [16.0]


def test_clip_and_scale_work_in_place():
    boxes = recorded_boxes()
    assert boxes.clip((70, 90)) is None
    assert_close(boxes.tensor, RECORDED["clip_h70_w90"])
    boxes = recorded_boxes()
    assert boxes.scale(2, 0.5) is None
    assert_close(boxes.tensor, RECORDED["scale_x2_y05"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_clip_refuses_non_finite_boxes(value):
    with pytest.raises(AssertionError):
        Boxes([[0.0, 0.0, value, 1.0]]).clip((4, 4))


def test_boxes_accept_what_can_be_boxes():
    assert Boxes([]).tensor.shape == (0, 4)
    assert Boxes(torch.zeros(2, 4, dtype=torch.float64)).tensor.dtype == torch.float32
    assert Boxes(np.zeros((2, 4))).tensor.dtype == torch.float32
    for shape in [(4,), (2, 5), (1, 2, 4)]:
        with pytest.raises(AssertionError):
            Boxes(torch.zeros(shape))


def test_boxes_indexing_keeps_boxes():
    boxes = recorded_boxes()
    assert boxes[2].tensor.shape == (1, 4)
    assert torch.equal(boxes[-1].tensor[0], boxes.tensor[-1])
    assert len(boxes[1:3]) == 2
    assert len(boxes[boxes.nonempty()]) == 5
    assert torch.equal(boxes[torch.tensor([5, 0, 0])].tensor, boxes.tensor[[5, 0, 0]])
    assert [box.shape for box in boxes] == [(4,)] * 6


def test_boxes_cat_and_clone_do_not_share_storage():
    boxes = recorded_boxes()
    joined, cloned = Boxes.cat([boxes]), boxes.clone()
    boxes.scale(0, 0)
    assert joined.tensor.abs().sum() > 0
    assert cloned.tensor.abs().sum() > 0
    assert Boxes.cat([]).tensor.shape == (0, 4)
    assert len(Boxes.cat([joined, cloned])) == 12


def test_pairwise_iou_like_recorded():
    iou = pairwise_iou(recorded_boxes(), Boxes(torch.tensor(RECORDED["others"])))
    assert_close(iou, RECORDED["pairwise_iou"])
    assert pairwise_iou(Boxes([]), recorded_boxes()).shape == (0, 6)
    empty = Boxes([[3.0, 3.0, 3.0, 3.0]])
    assert pairwise_iou(empty, empty).tolist() == [[0.0]]


coordinates = st.integers(0, 12)
integer_boxes = st.tuples(coordinates, coordinates, coordinates, coordinates).map(
    lambda b: [min(b[0], b[2]), min(b[1], b[3]), max(b[0], b[2]), max(b[1], b[3])]
)


@given(integer_boxes, integer_boxes)
def test_pairwise_iou_counts_common_pixels(first, second):
    def pixels(box):
        x0, y0, x1, y1 = box
        return {(x, y) for x in range(x0, x1) for y in range(y0, y1)}

    common, union = pixels(first) & pixels(second), pixels(first) | pixels(second)
    expected = len(common) / len(union) if common else 0.0
    assert pairwise_iou(Boxes([first]), Boxes([second])).item() == pytest.approx(expected)


@given(arrays(np.float64, (3, 4), elements=st.floats(-1000, 1000)))
def test_box_mode_round_trip(boxes):
    before = boxes.copy()
    xywh = BoxMode.convert(boxes, BoxMode.XYXY_ABS, BoxMode.XYWH_ABS)
    np.testing.assert_array_equal(xywh[:, 2:], boxes[:, 2:] - boxes[:, :2])
    back = BoxMode.convert(xywh, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)
    np.testing.assert_allclose(back, boxes, atol=1e-9)
    np.testing.assert_array_equal(boxes, before)


def test_box_mode_keeps_container_and_dtype():
    facts = FACTS["box_mode_convert"]
    box = [1.0, 2.0, 10.0, 20.0]
    for name in ("XYWH_ABS->XYXY_ABS", "XYXY_ABS->XYWH_ABS", "XYXY_ABS->XYXY_ABS"):
        modes = [BoxMode[mode] for mode in name.split("->")]
        assert BoxMode.convert(box, *modes) == facts[name]["list"]
        assert BoxMode.convert(tuple(box), *modes) == tuple(facts[name]["list"])
    modes = (BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)
    assert BoxMode.convert(np.array([[1, 2, 3, 4]]), *modes).dtype == np.int64
    assert BoxMode.convert(torch.tensor([[1, 2, 3, 4]]), *modes).tolist() == [[1, 2, 4, 6]]


def test_box_mode_rotated():
    rotated = BoxMode.convert([10.0, 10.0, 4.0, 2.0, 90.0], BoxMode.XYWHA_ABS, BoxMode.XYXY_ABS)
    assert rotated == FACTS["box_mode_convert"]["XYWHA->XYXY of [10,10,4,2,90]"]
    upright = BoxMode.convert([1.0, 2.0, 4.0, 6.0], BoxMode.XYWH_ABS, BoxMode.XYWHA_ABS)
    assert upright == [3.0, 5.0, 4.0, 6.0, 0.0]


def test_box_mode_refusals():
    with pytest.raises(AssertionError):
        BoxMode.convert([1.0, 2.0, 3.0], BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)
    with pytest.raises(AssertionError):
        BoxMode.convert([0.1, 0.1, 0.2, 0.2], BoxMode.XYXY_REL, BoxMode.XYXY_ABS)
    with pytest.raises(NotImplementedError):
        BoxMode.convert([0.1, 0.1, 0.2, 0.2], BoxMode.XYXY_ABS, BoxMode.XYWHA_ABS)
    assert [mode.value for mode in BoxMode] == [0, 1, 2, 3, 4]


@pytest.fixture
def instances() -> Instances:
    return Instances(
        (40, 60), gt_boxes=Boxes(torch.arange(12.0).view(3, 4)), gt_classes=torch.tensor([5, 6, 7])
    )


def test_instances_fields(instances):
    assert instances.image_size == (40, 60)
    assert len(instances) == 3
    assert instances.has("gt_boxes")
    assert not instances.has("scores")
    instances.scores = torch.rand(3)
    assert list(instances.get_fields()) == ["gt_boxes", "gt_classes", "scores"]
    instances.remove("scores")
    assert not instances.has("scores")
    with pytest.raises(AssertionError):
        instances.scores = torch.rand(2)
    with pytest.raises(AttributeError):
        _ = instances.scores
    with pytest.raises(KeyError):
        instances.get("scores")
    with pytest.raises((AssertionError, TypeError)):
        instances.image_size = (1, 1)
    assert str(instances).startswith(FACTS["instances_facts"]["str starts with"])


def test_instances_indexing(instances):
    assert instances[1].gt_classes.tolist() == [6]
    assert instances[-1].gt_classes.tolist() == [7]
    assert instances[1:].gt_classes.tolist() == [6, 7]
    assert instances[instances.gt_classes != 6].gt_boxes.tensor.shape == (2, 4)
    assert instances[torch.tensor([2, 0])].gt_classes.tolist() == [7, 5]
    assert len(instances[instances.gt_classes > 100]) == 0
    for index in (3, -4):
        with pytest.raises(IndexError):
            instances[index]


def test_instances_without_fields_or_iteration(instances):
    with pytest.raises(NotImplementedError):
        len(Instances((1, 1)))
    with pytest.raises(NotImplementedError):
        iter(instances)


def test_instances_cat(instances):
    instances.names = ["a", "b", "c"]
    joined = Instances.cat([instances, instances[:1]])
    assert joined.gt_classes.tolist() == [5, 6, 7, 5]
    assert joined.names == ["a", "b", "c", "a"]
    assert isinstance(joined.gt_boxes, Boxes)
    other_size = Instances((1, 1), gt_classes=torch.tensor([1]))
    for wrong in ([], [instances, other_size], [instances, "x"]):
        with pytest.raises(AssertionError):
            Instances.cat(wrong)
    strange = Instances((1, 1), field=(1, 2))
    with pytest.raises(ValueError, match="tuple"):
        Instances.cat([strange, strange])


def test_instances_copies(instances):
    moved = instances.to("cpu")
    assert moved is not instances
    moved.gt_classes = moved.gt_classes + 1
    assert instances.gt_classes.tolist() == [5, 6, 7]
    for clone in (copy.deepcopy(instances), pickle.loads(pickle.dumps(instances))):
        assert clone.image_size == (40, 60)
        assert torch.equal(clone.gt_boxes.tensor, instances.gt_boxes.tensor)


IMAGES = [torch.ones(3, 5, 7), 2 * torch.ones(3, 6, 4)]
BATCHES = {
    "default": {},
    "size_divisibility_4": {"size_divisibility": 4},
    "size_divisibility_32": {"size_divisibility": 32},
    "size_divisibility_1": {"size_divisibility": 1},
    "pad_value_-1": {"size_divisibility": 4, "pad_value": -1.0},
    "square_9_div_2": {"padding_constraints": {"square_size": 9, "size_divisibility": 2}},
    "square_0_div_4": {"padding_constraints": {"square_size": 0, "size_divisibility": 4}},
}


@pytest.mark.parametrize("case", BATCHES)
def test_image_list_pads_like_recorded(case):
    batch, recorded = ImageList.from_tensors(IMAGES, **BATCHES[case]), FACTS["image_list"][case]
    assert list(batch.tensor.shape) == recorded["shape"]
    assert batch.tensor.sum().item() == recorded["sum"]
    assert batch.image_sizes == [tuple(size) for size in recorded["image_sizes"]]
    for index, image in enumerate(IMAGES):
        assert torch.equal(batch[index], image)


def test_image_list_pads_bottom_and_right():
    batch = ImageList.from_tensors([torch.ones(1, 2, 3), torch.ones(1, 4, 1)], 1, pad_value=7.0)
    assert (batch.tensor[0, 0, 2:] == 7).all()
    assert (batch.tensor[1, 0, :, 1:] == 7).all()
    assert ImageList.from_tensors([torch.ones(2, 3), torch.ones(4, 1)]).tensor.shape == (2, 4, 3)
    single = ImageList.from_tensors(IMAGES[:1], 8)
    assert single.tensor.shape == (1, 3, 8, 8)
    assert len(batch.to(torch.float64)) == 2
    assert batch.to(torch.float64).tensor.dtype == torch.float64


def test_image_list_refusals():
    with pytest.raises(AssertionError):
        ImageList.from_tensors([])
    with pytest.raises(AssertionError):
        ImageList.from_tensors([torch.ones(3, 2, 2), torch.ones(1, 2, 2)])
    with pytest.raises(TypeError):
        ImageList.from_tensors(image for image in IMAGES)
    with pytest.raises(RuntimeError):
        ImageList.from_tensors(IMAGES, padding_constraints={"square_size": 4})


def test_image_list_passes_gradients_on():
    images = [torch.ones(1, 2, 3, requires_grad=True), torch.ones(1, 4, 1, requires_grad=True)]
    ImageList.from_tensors(images).tensor.square().sum().backward()
    for image in images:
        assert torch.equal(image.grad, torch.full_like(image, 2))
