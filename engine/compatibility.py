"""Does a checkpoint fit a model?"""

import logging
import re
from collections import defaultdict
from typing import Any

from torch import nn

from .errors import UserError

__all__ = ["check_compatible", "lasting"]

logger = logging.getLogger(__name__)

# What a classifier has and a detector's backbone does not need.
_IMAGENET_ONLY = re.compile(r"((^|\.)(fc|classifier|head)\.(weight|bias)|num_batches_tracked)$")

# What a method adds for training and its detector does without, such as KS-DETR's teachers.
_TRAINING_ONLY = re.compile(r"\.teacher\.")

# Set from the config, and absent from old checkpoints without harm.
_FROM_CONFIG = {"pixel_mean", "pixel_std"}


def check_compatible(path: str, model: nn.Module, incompatible: Any, *, strictness: str) -> None:
    """Stop if the weights just loaded are those of another architecture.

    Args:
        path: the checkpoint, for the message.
        model: what it was loaded into.
        incompatible: fvcore's result, with missing_keys, unexpected_keys and incorrect_shapes.
        strictness: "resume" wants an exact fit; "evaluate" that, training-only weights aside,
            both have the same; "evaluate branches" also that no training-only one is missing;
            "initialise" that, those aside, either the model or the checkpoint is covered, as when
            a backbone is loaded or a detector is started with another method's weights; "partial"
            anything in common.

    Raises:
        UserError: names the first keys that do not fit.
    """
    missing = _really_missing(model, incompatible.missing_keys)
    wrong = {key for key, _, _ in incompatible.incorrect_shapes}
    missing = [key for key in missing if key not in wrong]
    unexpected = [k for k in incompatible.unexpected_keys if not _IMAGENET_ONLY.search(k)]
    wanted = set(model.state_dict()) - _FROM_CONFIG
    matched = len(wanted - set(incompatible.missing_keys) - wrong)
    surplus = [k for k in lasting(unexpected) if k not in _FROM_CONFIG]
    same = not (lasting(missing) or surplus or wrong)
    fits = {
        "resume": not (missing or unexpected or wrong),
        "evaluate": same,
        "evaluate branches": same,
        "initialise": matched > 0 and not wrong and not (lasting(missing) and surplus),
        "partial": matched > 0,
    }[strictness]
    if not fits:
        evaluates = strictness.startswith("evaluate")
        shown = (lasting(missing), surplus) if evaluates else (missing, unexpected)
        raise UserError(
            f"checkpoint {path} is of another architecture than the model: "
            + _describe(incompatible.incorrect_shapes, *shown)
            + _advice(strictness)
        )
    if strictness == "evaluate branches" and missing:
        raise UserError(
            f"checkpoint {path} has no teacher weights ({len(missing)} missing: "
            f"{_first(missing)}), which evaluation.branch needs for all but the student"
        )
    outcome = "not loaded but initialised"
    outcome += ", and not used in an evaluation" if strictness == "evaluate" else ""
    _log_training_only(unexpected, "ignored")
    _log_training_only(missing, outcome)
    logger.info("%d of the model's %d weights were loaded from %s", matched, len(wanted), path)


def lasting(keys: list[str]) -> list[str]:
    """Leave out the keys of what only training uses."""
    return [key for key in keys if not _TRAINING_ONLY.search(key)]


def _log_training_only(keys: list[str], outcome: str) -> None:
    extra = [key for key in keys if _TRAINING_ONLY.search(key)]
    if extra:
        logger.info(
            "%d weights only training uses were %s: %s", len(extra), outcome, ", ".join(extra)
        )


def _describe(wrong: list[tuple], missing: list[str], unexpected: list[str]) -> str:
    parts = []
    if wrong:
        shown = [f"{key} is {tuple(a)}, expected {tuple(b)}" for key, a, b in wrong]
        parts.append(f"{len(wrong)} of another shape ({_first(shown)})")
    if missing:
        parts.append(f"{len(missing)} missing ({_first(missing)})")
    if unexpected:
        parts.append(f"{len(unexpected)} unknown to the model ({_first(unexpected)})")
    return "; ".join(parts) or "no weight in common"


def _first(items: list[str], count: int = 3) -> str:
    return ", ".join(items[:count]) + (", …" if len(items) > count else "")


def _advice(strictness: str) -> str:
    if strictness == "initialise":
        return "; set train.init_partial=True to load the matching part"
    return ""


def _really_missing(model: nn.Module, keys: list[str]) -> list[str]:
    """Leave out keys whose tensor was loaded under another of its names."""
    names = defaultdict(set)
    for key, value in model.state_dict(keep_vars=True).items():
        names[id(value)].add(key)
    absent = set(keys)
    excused = {key for group in names.values() if not group <= absent for key in group}
    return [key for key in keys if key not in excused]
