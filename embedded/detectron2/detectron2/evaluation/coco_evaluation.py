"""COCO's average precision of boxes, computed by faster-coco-eval or pycocotools."""

import contextlib
import io
import itertools
import json
import logging
import math
import os
import pickle
from collections.abc import Sequence
from numbers import Real
from typing import IO, Any

import numpy as np
import torch
from faster_coco_eval import COCOeval_faster
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detectron2.data import MetadataCatalog
from detectron2.data._table import pair_table
from detectron2.data.datasets import convert_to_coco_json
from detectron2.structures import BoxMode, Instances
from detectron2.utils import comm
from detectron2.utils._whole_file import whole_file
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import create_small_table

from .evaluator import DatasetEvaluator

__all__ = ["COCOEvaluator"]

# metric: (IoU threshold or all of them, index of the area range: all, small, medium, large)
_METRICS = {
    "AP": (None, 0),
    "AP50": (0.5, 0),
    "AP75": (0.75, 0),
    "APs": (None, 1),
    "APm": (None, 2),
    "APl": (None, 3),
}


class COCOEvaluator(DatasetEvaluator):
    """Measures the AP of detected boxes in percent, over all classes and for each of them.

    Metrics without ground truth, and all metrics if nothing was detected, are NaN.
    """

    def __init__(
        self,
        dataset_name: str,
        tasks: Sequence[str] | None = None,
        distributed: bool = True,
        output_dir: str | None = None,
        *,
        max_dets_per_image: int | None = None,
        use_fast_impl: bool = True,
        kpt_oks_sigmas: Sequence[float] = (),
        allow_cached_coco: bool = True,
    ):
        """Read the ground truth.

        Args:
            dataset_name: registered with the metadata "json_file", or else any registered data set,
                which is then converted to a file in ``output_dir``.
            tasks: ("bbox",) or None, which means the same.
            distributed: gather the detections of all processes and evaluate in the main one, or
                evaluate those of this process.
            output_dir: if given, detections are written there, as instances_predictions.pth and, in
                COCO's format, as coco_instances_results.json.
            max_dets_per_image: detections per image that count, those with the highest scores; 100
                if None, and at least 10.
            use_fast_impl: compute the same in C++, some ten times as fast as pycocotools, if all
                ids of images and categories are numbers.
            kpt_oks_sigmas: must stay empty, keypoints are not supported.
            allow_cached_coco: use the converted file of an earlier evaluation.

        Raises:
            ValueError: if the data set must be converted and there is no ``output_dir``, or
                ``max_dets_per_image`` is no whole number.
        """
        unsupported = set(tasks or ()) - {"bbox"}
        if unsupported or kpt_oks_sigmas:
            raise NotImplementedError(
                f"evaluation of {sorted(unsupported) or 'keypoints'} needs the real detectron2; "
                "its subset here evaluates 'bbox'"
            )
        self._logger = logging.getLogger(__name__)
        self._distributed = distributed
        self._output_dir = output_dir
        if not isinstance(max_dets_per_image, int | None):
            raise ValueError(f"max_dets_per_image is {max_dets_per_image!r}, expected an integer")
        # pycocotools sorts these and takes the third for AP, so less than 10 acts like 10.
        self._max_dets = [1, 10, 100 if max_dets_per_image is None else max_dets_per_image]
        self._metadata = MetadataCatalog.get(dataset_name)
        if not hasattr(self._metadata, "json_file"):
            self._convert(dataset_name, allow_cached_coco)
        with contextlib.redirect_stdout(io.StringIO()):
            self._coco_api = COCO(PathManager.get_local_path(self._metadata.json_file))
        # The C++ implementation knows numbers only; an id may also be a text.
        ids = itertools.chain(self._coco_api.getImgIds(), self._coco_api.getCatIds())
        fast = use_fast_impl and all(isinstance(each, Real) for each in ids)
        self._evaluation_class = COCOeval_faster if fast else COCOeval
        self._predictions: list[dict] = []

    def _convert(self, dataset_name: str, allow_cached: bool) -> None:
        if self._output_dir is None:
            raise ValueError(
                f"data set {dataset_name!r} has no json_file, so COCOEvaluator needs an output_dir "
                "to convert it to COCO format"
            )
        json_file = os.path.join(self._output_dir, f"{dataset_name}_coco_format.json")
        self._metadata.json_file = json_file
        convert_to_coco_json(dataset_name, json_file, allow_cached=allow_cached)

    def reset(self) -> None:
        """Forget all detections."""
        self._predictions = []

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Take in detections.

        Args:
            inputs: with "image_id".
            outputs: with "instances", which have ``pred_boxes``, ``scores`` and ``pred_classes``.
        """
        for record, output in zip(inputs, outputs, strict=True):
            if "instances" in output:
                image_id = record["image_id"]
                instances = output["instances"].to(torch.device("cpu"))
                detections = instances_to_coco_json(instances, image_id)
                self._predictions.append({"image_id": image_id, "instances": detections})

    def evaluate(self, img_ids: Sequence[int] | None = None) -> dict[str, dict[str, float]]:
        """Return ``{"bbox": {metric: percent}}``.

        It is empty if no image was processed, or in a process other than the main one.

        Args:
            img_ids: images to evaluate, all of the data set if None.
        """
        predictions = self._predictions
        if self._distributed:
            comm.synchronize()
            predictions = list(itertools.chain(*comm.gather(predictions, dst=0)))
            if not comm.is_main_process():
                return {}
        if not predictions:
            self._logger.warning("No image was processed, so there is nothing to evaluate.")
            return {}

        self._save("instances_predictions.pth", predictions)
        detections = self._with_dataset_categories(predictions)
        self._save("coco_instances_results.json", detections)
        if "annotations" not in self._coco_api.dataset:
            self._logger.info("The data set has no annotations, so no AP is computed.")
            return {}
        return {"bbox": self._evaluate_boxes(detections, img_ids)}

    def _with_dataset_categories(self, predictions: list[dict]) -> list[dict]:
        """Return copies of all detections, with the category ids of the data set's file."""
        contiguous = self._metadata.get("thing_dataset_id_to_contiguous_id")
        dataset_ids = None if contiguous is None else {i: c for c, i in contiguous.items()}
        detections = []
        for detection in itertools.chain(*(p["instances"] for p in predictions)):
            category = detection["category_id"]
            if dataset_ids is not None:
                assert category in dataset_ids, (
                    f"detection of class {category} in image {detection['image_id']}, "
                    f"expected 0 to {len(dataset_ids) - 1}"
                )
                category = dataset_ids[category]
            detections.append({**detection, "category_id": category})
        return detections

    def _save(self, file_name: str, content: list[dict]) -> None:
        if self._output_dir is None:
            return
        PathManager.mkdirs(self._output_dir)
        path = os.path.join(self._output_dir, file_name)
        self._logger.info("Writing detections to %s", path)
        if file_name.endswith(".json"):
            with whole_file(path, "w") as file:
                file.write(json.dumps(content))  # to a string: json.dump's encoder is slow
        else:
            with whole_file(path, "wb") as file:
                torch.save(content, file, pickle_module=_PlainPickle)

    def _evaluate_boxes(
        self, detections: list[dict], img_ids: Sequence[int] | None
    ) -> dict[str, float]:
        if not detections:
            self._logger.warning("Nothing was detected in any image, so every metric is NaN.")
            return dict.fromkeys(_METRICS, math.nan)
        with contextlib.redirect_stdout(io.StringIO()):
            found = self._coco_api.loadRes(detections)
            evaluation = self._evaluation_class(self._coco_api, found, "bbox")
            evaluation.params.maxDets = self._max_dets
            if img_ids is not None:
                evaluation.params.imgIds = img_ids
            evaluation.evaluate()
            evaluation.accumulate()
        self._log_summary(evaluation)

        precision = evaluation.eval["precision"][..., -1]
        thresholds = evaluation.params.iouThrs
        results = {
            metric: _percentage(precision[_selected(thresholds, iou), :, :, area])
            for metric, (iou, area) in _METRICS.items()
        }
        self._logger.info("AP of boxes in percent:\n%s", create_small_table(results))
        if not all(map(math.isfinite, results.values())):
            self._logger.info("Metrics without ground truth are shown as NaN.")
        results.update(self._per_category(precision[..., 0]))
        return results

    def _log_summary(self, evaluation: COCOeval | COCOeval_faster) -> None:
        if self._max_dets[-1] != 100:
            return  # this table is correct for 100 detections only
        with contextlib.redirect_stdout(io.StringIO()) as table:
            evaluation.summarize()
        name = type(evaluation).__name__
        self._logger.info("Summary of %s:\n%s", name, table.getvalue().rstrip())

    def _per_category(self, precision: np.ndarray) -> dict[str, float]:
        """Log and return the AP of every class, from precisions of shape (IoUs, recalls, K)."""
        names = self._metadata.get("thing_classes") or []
        if len(names) <= 1:
            return {}
        assert precision.shape[2] == len(names), (
            f"the ground truth has {precision.shape[2]} categories, the metadata {len(names)}"
        )
        pairs = [(name, _percentage(precision[:, :, i])) for i, name in enumerate(names)]
        table = pair_table(pairs, ("category", "AP"))
        self._logger.info("AP of boxes by category:\n%s", table)
        return {f"AP-{name}": ap for name, ap in pairs}


class _PlainPickle:
    """For torch.save, in place of the module: without asking whether each number is a tensor."""

    class Pickler:
        def __init__(self, file: IO[bytes], protocol: int):
            self._pickler = pickle.Pickler(file, protocol)

        def dump(self, content: Any) -> None:
            self._pickler.dump(content)


def _selected(thresholds: np.ndarray, iou: float | None) -> np.ndarray:
    return np.full(len(thresholds), True) if iou is None else np.isclose(thresholds, iou)


def _percentage(precision: np.ndarray) -> float:
    """Return the mean of all entries but those of -1, which stand for missing ground truth."""
    valid = precision[precision > -1]
    return float(valid.mean()) * 100 if valid.size else math.nan


def instances_to_coco_json(instances: Instances, img_id: Any) -> list[dict]:
    """Return the detections in one image in COCO's format, with boxes as xywh."""
    if len(instances) == 0:
        return []
    boxes = BoxMode.convert(instances.pred_boxes.tensor, BoxMode.XYXY_ABS, BoxMode.XYWH_ABS)
    return [
        {"image_id": img_id, "category_id": category, "bbox": box, "score": score}
        for category, box, score in zip(
            instances.pred_classes.tolist(), boxes.tolist(), instances.scores.tolist(), strict=True
        )
    ]
