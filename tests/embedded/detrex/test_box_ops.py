import pytest
import torch
from detrex.layers import (
    box_cxcywh_to_xyxy,
    box_iou,
    box_xyxy_to_cxcywh,
    generalized_box_iou,
    masks_to_boxes,
)
from hypothesis import given
from hypothesis import strategies as st
from recorded_cases import close

GRID = 16
corner = st.integers(0, GRID - 1)


@st.composite
def grid_boxes(draw):
    x1, y1 = draw(corner), draw(corner)
    return [x1, y1, draw(st.integers(x1 + 1, GRID)), draw(st.integers(y1 + 1, GRID))]


def test_boxes_match_the_recorded_values(layer_cases):
    given_, expected = (layer_cases.arrays("box_ops", kind) for kind in ("in", "out"))
    boxes1, boxes2 = given_["boxes1"], given_["boxes2"]
    close(box_xyxy_to_cxcywh(boxes1), expected["cxcywh1"])
    close(box_cxcywh_to_xyxy(expected["cxcywh1"]), expected["back_to_xyxy"])
    iou, union = box_iou(boxes1, boxes2)
    close(iou, expected["iou"])
    close(union, expected["union"])
    close(generalized_box_iou(boxes1, boxes2), expected["giou"])
    close(generalized_box_iou(boxes1[:2], boxes1[:2]), expected["giou_same_degenerate"])
    tiny = given_["tiny_boxes"]
    close(generalized_box_iou(tiny, tiny), expected["giou_tiny"])
    close(masks_to_boxes(given_["masks"]), expected["mask_boxes"])


@given(grid_boxes(), grid_boxes())
def test_iou_counts_cells(box1, box2):
    """On whole coordinates, areas are numbers of grid cells."""

    def cells(box):
        return {(x, y) for x in range(box[0], box[2]) for y in range(box[1], box[3])}

    def hull(a, b):
        return [min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])]

    a, b = torch.tensor([box1]).float(), torch.tensor([box2]).float()
    common, either = cells(box1) & cells(box2), cells(box1) | cells(box2)
    around = len(cells(hull(box1, box2)))
    iou, union = box_iou(a, b)
    assert union.item() == len(either)
    assert iou.item() == pytest.approx(len(common) / len(either), abs=1e-5)
    giou = len(common) / len(either) - (around - len(either)) / around
    assert generalized_box_iou(a, b).item() == pytest.approx(giou, abs=1e-5)


@given(st.lists(grid_boxes(), max_size=4))
def test_conversions_are_inverse_and_masks_give_their_boxes(boxes):
    corners = torch.tensor(boxes).float().view(-1, 4)
    assert torch.equal(box_cxcywh_to_xyxy(box_xyxy_to_cxcywh(corners)), corners)
    masks = torch.zeros(len(boxes), GRID, GRID, dtype=torch.bool)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes, strict=True):
        mask[y1:y2, x1:x2] = True
    assert torch.equal(masks_to_boxes(masks), corners - torch.tensor([0.0, 0, 1, 1]))


def test_swapped_corners_are_refused():
    good, bad = torch.tensor([[0.0, 0, 1, 1]]), torch.tensor([[1.0, 0, 0, 1]])
    for pair in [(good, bad), (bad, good)]:
        with pytest.raises(AssertionError):
            generalized_box_iou(*pair)


def test_no_boxes():
    none, some = torch.zeros(0, 4), torch.rand(3, 2).repeat(1, 2)
    assert generalized_box_iou(none, some).shape == (0, 3)
    assert box_iou(some, none)[0].shape == (3, 0)
    assert masks_to_boxes(torch.zeros(0, 5, 5)).shape == (0, 4)
