import pytest
import torch
from detectron2.modeling import detector_postprocess
from detectron2.structures import Boxes, Instances
from recorded_cases import embedded_only


def detections():
    boxes = torch.tensor(
        [[10.0, 20.0, 30.0, 40.0], [-5.0, -5.0, 200.0, 100.0], [50.0, 10.0, 50.0, 20.0]]
    )
    scores = torch.tensor([0.9, 0.8, 0.7])
    return Instances((100, 200), pred_boxes=Boxes(boxes), scores=scores)


def test_boxes_are_scaled_clipped_and_empty_ones_dropped():
    result = detector_postprocess(detections(), 50, 400)
    assert result.image_size == (50, 400)
    assert result.pred_boxes.tensor.tolist() == [[20, 10, 60, 20], [0, 0, 400, 50]]
    assert result.scores.tolist() == pytest.approx([0.9, 0.8])


def test_boxes_may_be_proposals_but_must_be_there():
    proposals = Instances((100, 200), proposal_boxes=detections().pred_boxes)
    assert len(detector_postprocess(proposals, 100, 200).proposal_boxes) == 2
    with pytest.raises(AssertionError):
        detector_postprocess(Instances((100, 200), scores=torch.ones(2)), 100, 200)


def test_no_detections():
    empty = Instances((10, 10), pred_boxes=Boxes(torch.zeros(0, 4)))
    assert len(detector_postprocess(empty, 20, 20)) == 0


@embedded_only
def test_the_input_stays_and_masks_are_refused():
    original = detections()
    detector_postprocess(original, 50, 400)
    assert original.pred_boxes.tensor[0].tolist() == [10, 20, 30, 40]
    original.pred_masks = torch.ones(3, 1, 28, 28)
    with pytest.raises(NotImplementedError, match="pred_masks"):
        detector_postprocess(original, 50, 400)
