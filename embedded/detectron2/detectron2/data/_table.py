"""Text tables of (name, value) pairs, several pairs in a row."""

from collections.abc import Sequence
from typing import Any

from tabulate import tabulate

_PAIRS_IN_A_ROW = 3


def pair_table(pairs: Sequence[tuple[str, Any]], headers: tuple[str, str]) -> str:
    """Lay out ``pairs`` row by row, at most three pairs side by side."""
    width = min(_PAIRS_IN_A_ROW, len(pairs))
    rows = [
        [cell for pair in pairs[start : start + width] for cell in pair]
        for start in range(0, len(pairs), width)
    ]
    return tabulate(rows, headers=headers * width, tablefmt="pipe", floatfmt=".3f", numalign="left")
