"""From the detector's pixels to the original image's."""

from detectron2.structures import Instances

__all__ = ["detector_postprocess"]


def detector_postprocess(
    results: Instances, output_height: int, output_width: int, mask_threshold: float = 0.5
) -> Instances:
    """Scale predicted boxes from ``results.image_size`` to the output size and clip them.

    Boxes without area are dropped with all their fields. ``results`` is left as it was.

    Raises:
        NotImplementedError: ``results`` holds masks or keypoints; only boxes can be scaled.
    """
    for field in ("pred_masks", "pred_keypoints"):
        if results.has(field):
            raise NotImplementedError(f"detector_postprocess: found {field}, expected only boxes")
    name = "pred_boxes" if results.has("pred_boxes") else "proposal_boxes"
    assert results.has(name), "detector_postprocess: no pred_boxes and no proposal_boxes found"

    input_height, input_width = results.image_size
    boxes = results.get(name).clone()
    boxes.scale(output_width / input_width, output_height / input_height)

    scaled = Instances((output_height, output_width), **results.get_fields())
    boxes.clip(scaled.image_size)
    scaled.set(name, boxes)
    return scaled[boxes.nonempty()]
