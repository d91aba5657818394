"""Time contenders in turns and summarise the rounds."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

SHORTEST_SAMPLE = 0.005
"""Seconds: quicker calls are repeated within a sample until the clock and the scheduler matter
little."""
FEWEST_ROUNDS = 7
"""Below this a quartile says nothing."""


@dataclass(frozen=True)
class Budget:
    """How long a case is measured.

    Attributes:
        rounds: that many rounds; None lets time decide.
        seconds: rounds begin until this much time has passed, at least :data:`FEWEST_ROUNDS`.
    """

    rounds: int | None = None
    seconds: float = 10.0

    def allows(self, rounds: int, seconds: float) -> bool:
        """Tell whether another round follows."""
        if self.rounds is not None:
            return rounds < self.rounds
        return rounds < FEWEST_ROUNDS or seconds < self.seconds


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Summarise values; quartiles are interpolated between neighbours."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)


def ratios(ours: Sequence[float], peer: Sequence[float]) -> Spread:
    """Summarise peer / ours round by round, so that what slows a whole round cancels."""
    return spread([theirs / own for own, theirs in zip(ours, peer, strict=True)])


def interleave(
    runs: Mapping[str, Callable[[], object]],
    budget: Budget,
    *,
    lead_in: bool = False,
    synchronize: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Time contenders in turns: A B C A B C ...

    Before the first round each is called twice, once to warm up and once to see how many calls make
    a sample.

    Args:
        runs: what to call, by name.
        budget: how many rounds.
        lead_in: call each contender once at the beginning of its turn, untimed. Where turns are
            long and calls follow one another in use, this leaves out what the others' turns cost
            it: caches that are theirs and a processor that has been idle.
        synchronize: waits for the device, before and after each sample.
        clock: seconds.

    Returns:
        Seconds per call of each round, by name.
    """

    def sample(run: Callable[[], object], calls: int) -> float:
        synchronize()
        start = clock()
        for _ in range(calls):
            run()
        synchronize()
        return (clock() - start) / calls

    calls = {}
    for name, run in runs.items():
        sample(run, 1)
        calls[name] = math.ceil(SHORTEST_SAMPLE / max(sample(run, 1), 1e-6))
    times: dict[str, list[float]] = {name: [] for name in runs}
    start, rounds = clock(), 0
    while budget.allows(rounds, clock() - start):
        for name, run in runs.items():
            if lead_in:
                run()
            times[name].append(sample(run, calls[name]))
        rounds += 1
    return times
