"""What a layout is: how it is recognised and which of its names becomes which of ours."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class ConversionError(ValueError):
    """Weights that cannot be converted; the message is one line."""


class Rule(NamedTuple):
    """What becomes of the keys that a pattern matches as a whole.

    Attributes:
        pattern: regular expression.
        replacement: our key, with the groups of the pattern; None where nothing is kept.
        part: the place of the tensor among those that are joined, row after row, to one of ours.
    """

    pattern: str
    replacement: str | None
    part: int | None = None


class Target(NamedTuple):
    """Where a tensor goes: our key, or None, and its part of it."""

    key: str | None
    part: int | None = None


@dataclass(frozen=True)
class Layout:
    """The names that one project gives to the weights of one detector.

    Attributes:
        name: for the command line.
        origin: who writes such files.
        has: patterns of keys that mark the layout; each must match one.
        rules: the first that matches a key applies. ResNets are given torchvision's names below
            ``backbone.body``, whatever the model calls them.
        lacks: patterns that no key of the layout matches.
        tied: which of our weights is meant for those that a file leaves out because they are one
            there.
        unpack: is given all weights before the rules, for what rules cannot say: that rows of a
            tensor become one of their own, or go.
        training_only: patterns of those of our keys that are left out, with all that they match,
            where the model has none of them.
    """

    name: str
    origin: str
    has: tuple[str, ...]
    rules: tuple[Rule, ...]
    lacks: tuple[str, ...] = ()
    tied: tuple[Rule, ...] = ()
    unpack: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] = dict
    training_only: tuple[str, ...] = ()

    def recognise(self, keys: Collection[str]) -> bool:
        """Whether the keys look like this layout's."""
        return all(_any_matches(pattern, keys) for pattern in self.has) and not any(
            _any_matches(pattern, keys) for pattern in self.lacks
        )

    def for_training(self, key: str) -> bool:
        """Whether a key is one of ours that only training uses."""
        return any(re.fullmatch(pattern, key) for pattern in self.training_only)

    def target(self, key: str) -> Target | None:
        """Where a key's tensor goes; None if no rule knows the key."""
        return first_match(key, self.rules)


def first_match(key: str, rules: Iterable[Rule]) -> Target | None:
    """What the first rule that knows a key makes of it; None if there is none."""
    for pattern, replacement, part in rules:
        match = re.fullmatch(pattern, key)
        if match:
            return Target(None if replacement is None else match.expand(replacement), part)
    return None


def recognise(keys: Collection[str], layouts: Collection[Layout]) -> Layout:
    """The one layout that the keys are in.

    Raises:
        ConversionError: there is none, or more than one.
    """
    found = [layout for layout in layouts if layout.recognise(keys)]
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(layout.name for layout in found)
        raise ConversionError(f"the keys fit several layouts ({names}): choose one with --from")
    known = ", ".join(layout.name for layout in layouts)
    raise ConversionError(
        f"the keys ({listed(sorted(keys), 3)}) are in none of the layouts {known}; "
        "--from NAME lists what that layout does not understand"
    )


def listed(keys: Collection[str], count: int = 20) -> str:
    """Join keys to a line, the first ones of many."""
    keys = list(keys)
    rest = len(keys) - count
    return ", ".join(keys[:count]) + (f" and {rest} more" if rest > 0 else "")


# --- tables to rules ----------------------------------------------------------------------------


def modules(names: Mapping[str, str]) -> tuple[Rule, ...]:
    """Rules for modules, whose parameters keep their names."""
    return tuple(
        Rule(rf"{old}\.(.+)", rf"{new}.\g<{_groups(old) + 1}>") for old, new in names.items()
    )


def layers(source: str, target: str, names: Mapping[str, str]) -> tuple[Rule, ...]:
    """Rules for the modules of numbered layers."""
    return modules(
        {rf"{source}\.(\d+)\.{old}": rf"{target}.\1.{new}" for old, new in names.items()}
    )


def joined(source: str, target: str, parts: Mapping[str, str]) -> tuple[Rule, ...]:
    """Rules for the query, key and value projections of numbered layers that we keep in one.

    Args:
        source: pattern of the layers.
        target: our layers.
        parts: the attention modules, theirs and ours.
    """
    return tuple(
        Rule(
            rf"{source}\.(\d+)\.{old}\.{name}_proj\.(weight|bias)",
            rf"{target}.\1.{new}.in_proj_\2",
            part,
        )
        for old, new in parts.items()
        for part, name in enumerate("qkv")
    )


def _any_matches(pattern: str, keys: Collection[str]) -> bool:
    return any(re.fullmatch(pattern, key) for key in keys)


def _groups(pattern: str) -> int:
    return re.compile(pattern).groups
