"""Are the data sets that a config names there, and do they fit the model?"""

import os
from collections.abc import Callable
from typing import Any

from detectron2.config import instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import SizeMismatchError
from omegaconf import DictConfig, ListConfig

from .annotations import explain_fault
from .boxes import float_boxes
from .building import FAULTS, build, reason_of
from .data import image_fault
from .errors import LocalError, UserError, did_you_mean
from .registration import register_shapes

__all__ = ["build_loader", "check_class_count", "check_datasets", "dataset_names"]


def dataset_names(loader: Any) -> list[str]:
    """Return the names in a ``dataloader.train`` or ``.test`` node; none if it has another form."""
    dataset = loader.get("dataset") if isinstance(loader, DictConfig) else None
    names = dataset.get("names") if isinstance(dataset, DictConfig) else None
    if isinstance(names, str):
        return [names]
    return list(names) if isinstance(names, ListConfig | list | tuple) else []


def check_datasets(names: list[str]) -> None:
    """Stop if a data set is not registered, or its annotations or images are not there."""
    register_shapes()  # a run started from a saved yaml has not executed their config
    for name in names:
        known = list(DatasetCatalog.keys())
        if name not in known:
            raise UserError(f"data set '{name}' is not registered{did_you_mean(name, known)}")
        metadata = MetadataCatalog.get(name)
        for what, attribute in (("annotation file", "json_file"), ("image folder", "image_root")):
            path = metadata.get(attribute, None)
            if path and "://" not in path and not os.path.exists(path):
                root = os.environ.get("DETECTRON2_DATASETS", "datasets")
                raise UserError(
                    f"{what} {path} of data set '{name}' not found; set DETECTRON2_DATASETS to the "
                    f"folder that holds your data sets (now '{root}')"
                )


def build_loader(node: DictConfig) -> Any:
    """Instantiate a loader node; what is wrong with its data set is told in one line.

    An image that cannot be decoded raises a LocalError that names it, unless the loader replaces
    it; one of another size than its annotations state always does.
    """
    names = dataset_names(node)
    check_datasets(names)
    mapper = node.get("mapper")
    if mapper is not None:
        node.mapper = _Named(build("a data set's mapper", mapper))
    try:
        return instantiate(node)
    except UserError:
        raise
    except FAULTS as error:
        for name in names:
            explain_fault(MetadataCatalog.get(name).get("json_file", None))
        what = f"data set {', '.join(names)}" if names else "the data"
        raise UserError(f"cannot load {what}: {reason_of(error)}") from error
    finally:
        if mapper is not None:
            node.mapper = mapper


def check_class_count(names: list[str], model: Any, *, exactly: bool = False) -> None:
    """Stop if a data set has more classes than the model's ``num_classes``, where it has one.

    With ``exactly`` also if it has fewer: a detection of a class that it lacks has no place in its
    evaluation.
    """
    possible = getattr(model, "num_classes", None)
    if not isinstance(possible, int):
        return
    for name in names:
        found = len(MetadataCatalog.get(name).get("thing_classes", None) or [])
        if found > possible or (exactly and 0 < found < possible):
            raise UserError(
                f"data set '{name}' has {found} classes, the model {possible}: "
                "set the model's num_classes"
            )


class _Named:
    """A mapper that gets boxes as floats and whose error names the image if that is at fault."""

    def __init__(self, mapper: Callable[[dict], Any]) -> None:
        self.mapper = mapper

    def __call__(self, record: dict) -> Any:
        try:
            return self.mapper(float_boxes(record))
        except SizeMismatchError as error:
            reason = " ".join(str(error).split())
            raise LocalError(f"{record.get('file_name')}: {reason}") from error
        except Exception as error:
            fault = image_fault(record.get("file_name"))
            if not fault:
                raise
            raise LocalError(fault) from error
