"""Recorded inputs of distillation losses as the contexts that objectives read."""

import re

import numpy as np
import torch
from detrex.modeling import HungarianMatcher

from detectors.criterion import SetCriterion
from detectors.structures import STUDENT, FeatureMaps, Memory, Predictions, groups_of
from projects.detr_distill.context import DistillationContext, View


class RecordedLosses:
    """One folder of arrays in ``losses.npz``."""

    def __init__(self, reference_dir, folder):
        self.file = np.load(reference_dir / "distill/losses.npz")
        self.folder = folder

    def __getitem__(self, key):
        return torch.from_numpy(np.asarray(self.file[f"{self.folder}/{key}"]))

    def __contains__(self, key):
        return f"{self.folder}/{key}" in self.file.files

    def leaf(self, key):
        return self[key].clone().requires_grad_(True)


class OnlyCriterion:
    """What objectives use of a detector."""

    def __init__(self, num_classes):
        self.num_classes = num_classes
        self.criterion = SetCriterion(
            num_classes=num_classes,
            matcher=HungarianMatcher(cost_class=2.0, cost_bbox=5.0, cost_giou=2.0),
            weight_dict={"loss_class": 2.0, "loss_bbox": 5.0, "loss_giou": 2.0},
            loss_class_type="focal_loss",
            alpha=0.25,
            gamma=2.0,
        )

    def loss_weight(self, name):
        return self.criterion.weight_dict[re.sub(r"_\d+$", "", name)]


def view(logits, boxes, states=None, levels=(), padded_size=(1, 1), attention=None):
    """A view of given predictions (L, B, N, ...)."""
    predictions = Predictions(logits, boxes, groups_of((STUDENT,), len(logits)))
    batch = logits.shape[1]
    features = FeatureMaps(tuple(levels), None, (), [padded_size] * batch, padded_size)
    nothing = torch.zeros(batch, 0, 1)
    memory = Memory(nothing, None, nothing, ())
    detector = OnlyCriterion(logits.shape[-1])
    return View(detector, features, memory, states, predictions, attention)


def context(student, teacher, targets, group=None):
    """What relates two views."""
    match = student.detector.criterion.match
    return DistillationContext(
        student,
        teacher,
        targets,
        match(student.logits.detach(), student.boxes.detach(), targets),
        match(teacher.logits, teacher.boxes, targets),
        lambda: group,
    )
