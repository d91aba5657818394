"""The teacher's queries as the student's decoder takes them."""

from __future__ import annotations

from torch import nn

from detectors.detector import Detector
from detectors.structures import LearnedQueries
from engine.errors import UserError


class QueryAdapter(nn.Module):
    """Leaves queries as they are, or maps them linearly if the student's width is another.

    Args:
        student: whose decoder takes the queries.
        teacher: whose queries they are.

    Raises:
        UserError: one of the two learns no queries, or theirs are of different kinds.
    """

    def __init__(self, student: Detector, teacher: Detector):
        super().__init__()
        own, given = (_learned(name, d) for name, d in (("student", student), ("teacher", teacher)))
        self.content = _adapter("contents", given.content.shape[-1], own.content.shape[-1])
        self.position = _adapter("positions", given.position.shape[-1], own.position.shape[-1])

    def forward(self, learned: LearnedQueries) -> LearnedQueries:
        """Queries of the teacher's width to those of the student's."""
        return LearnedQueries(self.content(learned.content), self.position(learned.position))


def _learned(name: str, detector: Detector) -> LearnedQueries:
    try:
        return detector.learned_queries()
    except (NotImplementedError, ValueError) as error:
        raise UserError(f"the {name}'s queries cannot be shared: {error}") from error


def _adapter(kind: str, given: int, wanted: int) -> nn.Module:
    if given == wanted:
        return nn.Identity()
    if min(given, wanted) <= 4:  # anchors, or AdaMixer's, which start from the whole image
        raise UserError(
            f"the teacher's queries have {kind} of {given} numbers, the student's of {wanted}: "
            "embeddings, anchors and none cannot stand for each other"
        )
    return nn.Linear(given, wanted, bias=False)  # empty contents stay empty
