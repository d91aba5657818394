"""Weights in a layout to those of a model, every key and shape checked."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from .classes import select_classes
from .layout import ConversionError, Layout, first_match, listed
from .resnet import to_detectron2

_logger = logging.getLogger(__name__)

# counts batches of training, which frozen norms do not do
_COUNTER = re.compile(r".+\.num_batches_tracked")

# follows from the config alone, so that few layouts have it
_CONSTANTS = ("criterion.empty_weight",)


def convert(
    weights: Mapping[str, Tensor],
    layout: Layout,
    model: nn.Module,
    report: Callable[[str], object] = _logger.info,
) -> dict[str, Tensor]:
    """Give a model's names and shapes to weights in a layout.

    Args:
        weights: by the layout's names.
        layout: which says what becomes of them.
        model: what they are for, on the CPU. It is not changed.
        report: is given a line that says what only training uses and was left out.

    Returns:
        The model's complete state dict, in its precision.

    Raises:
        ConversionError: a key is not understood, missing or superfluous, a shape is another than
            the model's, or tensors differ that are one in the model.
    """
    wanted = model.state_dict(keep_vars=True)
    converted = _renamed(layout.unpack(weights), layout, wanted)
    left_out = _leave_out_training(converted, layout, wanted)
    for key in [*converted]:
        if _COUNTER.fullmatch(key) and key not in wanted:
            del converted[key]
        elif key in wanted:
            chosen = select_classes(key, converted[key], wanted)
            # a copy, as a file would hold all of what a tensor is a view of
            converted[key] = chosen.to(wanted[key].dtype, copy=True).contiguous()
    _check_shapes(converted, wanted)
    _share(converted, wanted)
    _fill_tied(converted, wanted, layout)
    for key, value in wanted.items():
        if key in _CONSTANTS or _COUNTER.fullmatch(key):
            converted.setdefault(key, value.detach())
    missing = [key for key in wanted if key not in converted]
    if missing:
        raise ConversionError(
            f"{len(missing)} of the model's weights are missing: {listed(missing)}"
        )
    if left_out:
        report(f"{len(left_out)} weights only training uses are left out: {listed(left_out)}")
    return {key: converted[key] for key in wanted}


def _renamed(
    weights: Mapping[str, Tensor], layout: Layout, wanted: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The weights by our names, with those joined that we keep in one."""
    parts: dict[str, dict[int, Tensor]] = defaultdict(dict)
    unknown = []
    has_body = any(key.startswith("backbone.body.") for key in wanted)
    for source, tensor in weights.items():
        target = layout.target(source)
        if target is None:
            unknown.append(source)
        elif target.key is not None:
            key = target.key if has_body else to_detectron2(target.key)
            parts[key][target.part or 0] = tensor
    if unknown:
        raise ConversionError(
            f"{len(unknown)} keys are not understood as {layout.name}: {listed(unknown)}"
        )
    return {key: _join(found) for key, found in parts.items()}


def _leave_out_training(
    converted: dict[str, Tensor], layout: Layout, wanted: Mapping[str, Tensor]
) -> list[str]:
    """Remove what only training uses, unless the model has such weights itself; its keys."""
    if any(layout.for_training(key) for key in wanted):
        return []
    keys = [key for key in converted if layout.for_training(key)]
    for key in keys:
        del converted[key]
    return keys


def _join(parts: Mapping[int, Tensor]) -> Tensor:
    """One part as it is, several row after row."""
    tensors = [parts[place] for place in sorted(parts)]
    return torch.cat(tensors) if len(tensors) > 1 else tensors[0]


def _check_shapes(converted: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    surplus = [key for key in converted if key not in wanted]
    if surplus:
        raise ConversionError(
            f"{len(surplus)} converted weights are unknown to the model: {listed(surplus)}"
        )
    wrong = [
        f"{key} is {tuple(value.shape)}, expected {tuple(wanted[key].shape)}"
        for key, value in converted.items()
        if value.shape != wanted[key].shape
    ]
    if wrong:
        raise ConversionError(
            f"{len(wrong)} weights are of another shape than the model's: {listed(wrong)}"
        )


def _share(converted: dict[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Give a tensor all its names in the model."""
    names = defaultdict(list)
    for key, value in wanted.items():
        names[id(value)].append(key)
    for group in names.values():
        found = [key for key in group if key in converted]
        for key in found[1:]:
            if not torch.equal(converted[key], converted[found[0]]):
                raise ConversionError(
                    f"{found[0]} and {key} differ in the checkpoint and are one in the model: "
                    "is it another variant of the detector?"
                )
        for key in group if found else ():
            converted[key] = converted[found[0]]


def _fill_tied(converted: dict[str, Tensor], wanted: Mapping[str, Tensor], layout: Layout) -> None:
    """Repeat the one weight that a file holds for several."""
    groups = defaultdict(list)
    for key in wanted:
        target = first_match(key, layout.tied)
        if target is not None and target.key is not None:
            groups[target.key].append(key)
    for given, keys in groups.items():
        if [key for key in keys if key in converted] == [given]:
            converted.update(dict.fromkeys(keys, converted[given]))
