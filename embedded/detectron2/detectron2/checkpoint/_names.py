"""Parameter names: other packages' names of ResNets, and matching of names by suffix."""

import logging
import re
from collections.abc import Callable, Iterable
from typing import Any

_Substitutions = tuple[tuple[str, str | Callable[[re.Match], str]], ...]

_TORCHVISION: _Substitutions = (
    (r"^(conv1|bn1|fc)\.", r"stem.\1."),  # no detector has a stem.fc: the classifier is left over
    (r"^layer(\d)\.", lambda match: f"res{int(match[1]) + 1}."),
    (r"\bbn(\d)\.", r"conv\1.norm."),
    (r"\bdownsample\.0\.", "shortcut."),
    (r"\bdownsample\.1\.", "shortcut.norm."),
)
_CAFFE2: _Substitutions = (
    (r"^res_conv1_bn_", "conv1_bn_"),
    (r"^conv1_", "stem_conv1_"),
    (r"_branch1_", "_shortcut_"),
    (r"_branch2([abc])_", lambda match: f"_conv{'abc'.index(match[1]) + 1}_"),
    (r"_(?:bn|gn)_(?:s|gamma)$", "_norm_weight"),
    (r"_(?:bn|gn)_(?:b|beta|bias)$", "_norm_bias"),
    (r"_bn_(?:rm|running_mean)$", "_norm_running-mean"),
    (r"_bn_(?:riv|running_var)$", "_norm_running-var"),
    (r"_w$", "_weight"),
    (r"_b$", "_bias"),
    (r"_", "."),
    (r"running-", "running_"),
)


def _substitute(name: str, substitutions: _Substitutions) -> str:
    for pattern, replacement in substitutions:
        name = re.sub(pattern, replacement, name)
    return name


def is_torchvision_resnet(keys: Iterable[str]) -> bool:
    """Whether these are the names of a torchvision ResNet."""
    return {"conv1.weight", "bn1.weight", "layer1.0.conv1.weight"} <= set(keys)


def from_torchvision(name: str) -> str:
    """Translate a parameter name of torchvision's ResNet."""
    return _substitute(name, _TORCHVISION)


def from_caffe2(name: str) -> str:
    """Translate a parameter name of a Caffe2 ResNet."""
    return _substitute(name, _CAFFE2)


def match_by_suffix(model_state: dict[str, Any], checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Rename checkpoint entries to the model's names that end in theirs.

    ``res2.0.conv1.weight`` serves the model's ``backbone.res2.0.conv1.weight``. Where several
    entries fit, the longest name wins. Entries that fit nothing keep their name.

    Args:
        model_state: the model's state dict; entries of another shape are skipped with a warning.
        checkpoint: names and tensors.

    Raises:
        ValueError: if an entry fits two parameters of the model.
    """
    logger = logging.getLogger(__name__)
    users: dict[str, str] = {}
    renamed: dict[str, Any] = {}
    for name, parameter in model_state.items():
        source = _longest_suffix(name, checkpoint)
        if source is None:
            continue
        if checkpoint[source].shape != parameter.shape:
            logger.warning(
                "'%s' is not loaded: shape %s in the checkpoint, but %s of '%s' in the model",
                source,
                tuple(checkpoint[source].shape),
                tuple(parameter.shape),
                name,
            )
            continue
        if source in users:
            raise ValueError(
                f"checkpoint entry '{source}' fits both '{users[source]}' and '{name}' of the model"
            )
        users[source] = name
        renamed[name] = checkpoint[source]
    if not users:
        logger.warning("no entry of the checkpoint fits a parameter of the model")
        return checkpoint
    logger.info("%d of %d checkpoint entries fit the model", len(users), len(checkpoint))
    return renamed | {k: v for k, v in checkpoint.items() if k not in users}


def _longest_suffix(name: str, candidates: dict[str, Any]) -> str | None:
    """Longest candidate that is ``name`` without some of its leading parts."""
    while name not in candidates:
        _, dot, name = name.partition(".")
        if not dot:
            return None
    return name
