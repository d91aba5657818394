"""What all distillation objectives are."""

from __future__ import annotations

from torch import Tensor, nn

from .context import DistillationContext, View


class Objective(nn.Module):
    """One distillation loss.

    An objective may own adapters, which are trained with the student and belong to the run, not to
    the student's checkpoint. It is shown what both detectors make of an image once, before
    training, to check that it can compare them and to make its adapters.
    """

    needs_attention: bool = False
    """Whether the views are to hold attention maps."""
    needs_group: bool = False
    """Whether it uses the teacher's queries in the student's decoder."""

    def prepare(self, student: View, teacher: View) -> None:
        """Make adapters.

        Raises:
            UserError: if the objective cannot compare the two.
        """

    def forward(self, context: DistillationContext) -> dict[str, Tensor]:
        """Weighted losses by name."""
        raise NotImplementedError
