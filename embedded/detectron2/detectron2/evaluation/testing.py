"""Printing and checking of evaluation results."""

import logging
import math
import sys
from collections.abc import Mapping
from typing import Any

__all__ = ["flatten_results_dict", "print_csv_format", "verify_results"]

logger = logging.getLogger(__name__)


def print_csv_format(results: Mapping[str, Any]) -> None:
    """Log the metrics of each task in two lines ready to be pasted, per-category ones left out."""
    assert isinstance(results, Mapping), f"expected a mapping of tasks, found {type(results)}"
    for task, metrics in results.items():
        if not isinstance(metrics, Mapping):
            logger.info("copypaste: %s=%s", task, metrics)
            continue
        main = {name: value for name, value in metrics.items() if "-" not in name}
        logger.info("copypaste: Task: %s", task)
        logger.info("copypaste: %s", ",".join(main))
        logger.info("copypaste: %s", ",".join(f"{value:.4f}" for value in main.values()))


def verify_results(cfg: Any, results: Mapping[str, Mapping[str, float]]) -> bool:
    """Compare results with those expected by ``cfg``; exit with status 1 if one is off.

    Args:
        cfg: ``cfg.TEST.EXPECTED_RESULTS`` lists (task, metric, expected value, tolerance).
        results: task to metric to value.
    """
    expectations = cfg.TEST.EXPECTED_RESULTS
    if not expectations:
        return True
    failures = []
    for task, metric, expected, tolerance in expectations:
        actual = results[task].get(metric, math.nan)
        if not abs(actual - expected) <= tolerance:  # also true for NaN
            failures.append(f"{task}/{metric} is {actual}, expected {expected} +- {tolerance}")
    if failures:
        logger.error("Unexpected results: %s", "; ".join(failures))
        sys.exit(1)
    logger.info("All %d expected results were reached.", len(expectations))
    return True


def flatten_results_dict(results: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested results as one level, with keys such as "bbox/AP50"."""
    flat = {}
    for key, value in results.items():
        if isinstance(value, Mapping):
            for inner_key, inner_value in flatten_results_dict(value).items():
                flat[f"{key}/{inner_key}"] = inner_value
        else:
            flat[key] = value
    return flat
