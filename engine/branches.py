"""Evaluating branches that see the ground truth, such as KS-DETR's teachers, beside the student.

A model that has branches says which in ``branch_names``; its ``detect_branches(batch, names)``
returns, by branch, what the model itself returns in evaluation.
"""

import copy
import functools
import logging
from collections.abc import Mapping, MutableSequence, Sequence
from typing import Any

from detectron2.config import instantiate
from detectron2.data import DatasetCatalog
from detectron2.evaluation import (
    DatasetEvaluator,
    DatasetEvaluators,
    inference_context,
    inference_on_dataset,
    print_csv_format,
)
from detectron2.utils import comm
from omegaconf import DictConfig, ListConfig
from torch import nn

from .datasets import build_loader, dataset_names
from .errors import LocalError, UserError, did_you_mean

__all__ = ["STUDENT", "check_branches", "check_ground_truth", "evaluate_branches", "named_branches"]

logger = logging.getLogger(__name__)

STUDENT = "student"
"""The branch that needs no ground truth: the detector itself."""


def named_branches(config: DictConfig) -> tuple[str, ...]:
    """Return the branches that ``evaluation.branch`` names, each once.

    Raises:
        UserError: it is neither a name nor a list of names.
    """
    value = config.evaluation.branch
    names = list(value) if isinstance(value, ListConfig) else [value]
    if not names or not all(isinstance(name, str) for name in names):
        raise UserError(f"evaluation.branch is {value}, expected a branch's name or a list of them")
    return tuple(dict.fromkeys(names))


def check_branches(names: Sequence[str], model: nn.Module) -> None:
    """Stop if the model lacks one of the branches."""
    possible: Sequence[str] = getattr(model, "branch_names", (STUDENT,))  # type: ignore[assignment]
    for name in names:
        if name not in possible:
            raise UserError(
                f"evaluation.branch is '{name}', the {type(model).__name__} of this config has "
                f"{', '.join(possible)}{did_you_mean(name, possible)}"
            )


def check_ground_truth(config: DictConfig) -> None:
    """Stop if a branch is to be evaluated on a data set without ground truth."""
    if named_branches(config) == (STUDENT,):
        return
    for name in dataset_names(config.dataloader.test):
        if not any(record.get("annotations") for record in DatasetCatalog.get(name)):
            raise UserError(
                f"data set '{name}' has no annotations, which evaluation.branch needs: "
                "name one that has in dataloader.test.dataset.names"
            )


def evaluate_branches(config: DictConfig, model: nn.Module, names: Sequence[str]) -> dict:
    """Evaluate several branches on ``dataloader.test`` at once, and print their results tables.

    Returns:
        the evaluator's nested dict of numbers by branch; the student's also without its name, as
        in an evaluation of the student alone. Empty in other processes than the first.
    """
    loader = build_loader(_with_ground_truth(config.dataloader.test))
    evaluator = BranchEvaluator(
        {name: _build_evaluator(config.dataloader.evaluator, name) for name in names}
    )
    with inference_context(model):
        detect = functools.partial(_detect, model, names)
        results = inference_on_dataset(detect, loader, evaluator)
    if results and comm.is_main_process():
        for name, numbers in results.items():
            logger.info("Branch %s:", name)
            print_csv_format(numbers)
    return {**results.get(STUDENT, {}), **results}


class BranchEvaluator(DatasetEvaluator):
    """One evaluator for each branch.

    Args:
        evaluators: by branch.
    """

    def __init__(self, evaluators: Mapping[str, DatasetEvaluator]) -> None:
        self._evaluators = evaluators

    def reset(self) -> None:
        """Reset all."""
        for evaluator in self._evaluators.values():
            evaluator.reset()

    def process(self, inputs: list[dict], outputs: Any) -> None:
        """Hand every branch's outputs, a dict by branch, to its evaluator."""
        for name, evaluator in self._evaluators.items():
            evaluator.process(inputs, outputs[name])

    def evaluate(self) -> dict[str, Any]:
        """Return the results by branch, those of none that has none."""
        results = {}
        for name, evaluator in self._evaluators.items():
            logger.info("Branch %s:", name)
            results[name] = evaluator.evaluate()
        return {name: numbers for name, numbers in results.items() if numbers}


def _detect(model: Any, names: Sequence[str], batch: list[dict]) -> dict[str, list[dict]]:
    if any("instances" not in item for item in batch):
        raise LocalError(
            "evaluation.branch needs ground truth, but the images of dataloader.test come without "
            "'instances': use a mapper that keeps the annotations"
        )
    return model.detect_branches(batch, names)


def _with_ground_truth(node: DictConfig) -> DictConfig:
    """The test loader whose mapper treats annotations as in training, and images as in a test."""
    node = copy.deepcopy(node)
    if isinstance(node.get("mapper"), DictConfig) and "is_train" in node.mapper:
        node.mapper.is_train = True
    return node


def _build_evaluator(node: Any, branch: str) -> DatasetEvaluator:
    """An evaluator of its own, which leaves a teacher's detections in a folder of their own."""
    if branch != STUDENT and isinstance(node, DictConfig) and node.get("output_dir"):
        node = copy.deepcopy(node)
        node.output_dir = f"{node.output_dir}/{branch}"
    evaluator = instantiate(node)
    if isinstance(evaluator, MutableSequence):
        return DatasetEvaluators(evaluator)
    return evaluator
