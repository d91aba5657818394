"""What feature objectives see of a batch, without detectors."""

import torch

from detectors.structures import FeatureMaps
from projects.detr_distill.context import DistillationContext, View


def context_of(boxes, padded_size, image_sizes=None, student=(), teacher=()):
    """A context of B images with these boxes (G, 4) in pixels and these maps, if any."""
    nothing = (torch.zeros(len(boxes), 1, 1, 1, dtype=boxes[0].dtype),)
    sizes = image_sizes or [padded_size] * len(boxes)
    views = (
        View(None, FeatureMaps(maps or nothing, None, (), sizes, padded_size), None, None, None)
        for maps in (tuple(student), tuple(teacher))
    )
    targets = [{"boxes_xyxy": each} for each in boxes]
    return DistillationContext(*views, targets, None, None, None)
