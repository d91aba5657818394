"""What a distillation objective may look at in one step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from detectors.criterion import average_num_boxes
from detectors.detector import Detector
from detectors.grid import computed_once
from detectors.structures import (
    AttentionMaps,
    FeatureMaps,
    Matches,
    Memory,
    Predictions,
    Targets,
)

from .matching import Detections, Pairs, SoftCost, map_stages, match


@dataclass(frozen=True)
class View:
    """What a detector, or a group of queries in it, made of the batch.

    Attributes:
        detector: whose view it is.
        features: the maps before the encoder.
        memory: the student branch's tokens (B, S, C).
        states: (L, B, N, C).
        predictions: of the L decoder layers.
        attention: attention maps, if an objective asked for them.
    """

    detector: Detector
    features: FeatureMaps
    memory: Memory
    states: Tensor
    predictions: Predictions
    attention: AttentionMaps | None = None

    @property
    def logits(self) -> Tensor:
        """(L, B, N, K)."""
        return self.predictions.logits

    @property
    def boxes(self) -> Tensor:
        """(L, B, N, 4) cxcywh in [0, 1]."""
        return self.predictions.boxes


@dataclass(frozen=True)
class DistillationContext:
    """Teacher, student and what relates them; the costly parts are made when first asked for.

    Attributes:
        student: with gradients.
        teacher: without.
        targets: ground truth of the B images.
        student_matches: the student's with the ground truth, one group for each of its layers.
        teacher_matches: the teacher's, under the student's criterion.
        make_group: decodes the student's memory with the teacher's queries.
    """

    student: View
    teacher: View
    targets: Targets
    student_matches: Matches
    teacher_matches: Matches
    make_group: Callable[[], View]

    @computed_once
    def group(self) -> View:
        """The teacher's queries in the student's decoder: N is the teacher's (DETRDistill, 3.4)."""
        return self.make_group()

    @computed_once
    def group_matches(self) -> Matches:
        """The group's own with the ground truth."""
        criterion = self.student.detector.criterion
        return criterion.match(self.group.logits, self.group.boxes, self.targets)

    @computed_once
    def num_boxes(self) -> float:
        """Boxes per process, at least 1."""
        return average_num_boxes(self.targets, self.student.logits.device)

    @computed_once
    def pairs(self) -> Pairs:
        """Every student stage's queries with those of the teacher's stage that it learns from."""
        stages, student, teacher = self.stages(), self.student, self.teacher
        taught = Detections(teacher.logits[stages], teacher.boxes[stages])
        return match(SoftCost()(Detections(student.logits, student.boxes), taught))

    def stages(self, last: bool = False) -> list[int]:
        """The teacher's stage for each of the student's.

        Args:
            last: the teacher's last stage for all.
        """
        student, teacher = len(self.student.logits), len(self.teacher.logits)
        return [teacher - 1] * student if last else map_stages(student, teacher)
