"""What is said about the runs of a study: over seeds, and seed by seed against a baseline."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from tools.study_results import RunRow

__all__ = ["Summary", "gains", "paired", "summarise"]


@dataclass(frozen=True)
class Summary:
    """Some numbers in short.

    Attributes:
        count: how many.
        mean: nan without any.
        deviation: the sample's standard deviation; nan for fewer than two.
        positive: how many are above 0.
    """

    count: int
    mean: float
    deviation: float
    positive: int

    @property
    def error(self) -> float:
        """Standard error of the mean; nan for fewer than two."""
        return self.deviation / math.sqrt(self.count) if self.count else math.nan


def summarise(values: Sequence[float]) -> Summary:
    """Return the summary of ``values``."""
    return Summary(
        count=len(values),
        mean=statistics.fmean(values) if values else math.nan,
        deviation=statistics.stdev(values) if len(values) > 1 else math.nan,
        positive=sum(value > 0 for value in values),
    )


def paired(rows: Sequence[RunRow], cell: str, baseline: str | None) -> list[tuple[RunRow, RunRow]]:
    """Return a cell's rows with its baseline's of the same seed, where both are there."""
    others = {row.seed: row for row in rows if row.cell == baseline}
    own = sorted((row for row in rows if row.cell == cell), key=lambda row: row.seed)
    return [(row, others[row.seed]) for row in own if row.seed in others]


def gains(rows: Sequence[RunRow], cell: str, baseline: str | None) -> list[float]:
    """Return by how much a cell's AP exceeds its baseline's, for each seed that both have."""
    return [own.AP - other.AP for own, other in paired(rows, cell, baseline)]
