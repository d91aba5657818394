"""Reading and writing data sets in COCO's json format."""

import datetime
import functools
import json
import logging
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pycocotools.mask
from fvcore.common.timer import Timer
from iopath.common.file_io import file_lock

from detectron2.structures import BoxMode
from detectron2.utils._whole_file import whole_file
from detectron2.utils.file_io import PathManager

from ..catalog import DatasetCatalog, MetadataCatalog

__all__ = ["convert_to_coco_json", "load_coco_json", "register_coco_instances"]

logger = logging.getLogger(__name__)


def register_coco_instances(
    name: str, metadata: dict, json_file: str | os.PathLike, image_root: str | os.PathLike
) -> None:
    """Register a data set in COCO's format; it is read when it is used.

    Args:
        name: of the data set.
        metadata: further entries of its metadata.
        json_file: the annotations.
        image_root: folder of the images.
    """
    assert isinstance(name, str), f"the name of a data set is a string, found {name!r}"
    paths = {"json_file": json_file, "image_root": image_root}
    for role, path in paths.items():
        assert isinstance(path, (str, os.PathLike)), f"{role} of {name!r}: {path!r} is no path"
    load = functools.partial(load_coco_json, **paths, dataset_name=name)  # type: ignore[arg-type]
    if name not in DatasetCatalog:
        DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(**paths, evaluator_type="coco", **metadata)


def load_coco_json(
    json_file: str | os.PathLike,
    image_root: str | os.PathLike,
    dataset_name: str | None = None,
    extra_annotation_keys: Sequence[str] | None = None,
) -> list[dict]:
    """Read annotations in COCO's format into records, one per image, in the order of image ids.

    Args:
        json_file: the annotations.
        image_root: folder of the images, which are not read or looked for.
        dataset_name: if given, categories are renumbered from 0 in the order of their ids, and
            their names and this mapping become metadata of the data set.
        extra_annotation_keys: entries of annotations to keep besides "bbox", "category_id",
            "iscrowd" and "segmentation".

    Raises:
        FileNotFoundError: if there is no such file.
        json.JSONDecodeError: if it is not json.
        AssertionError: if ids of annotations are not unique, or one has the entry "ignore".
        KeyError: for an annotation of an unknown category.
        ValueError: for an annotation with an empty box.
    """
    timer = Timer()
    content = _read_json(os.fspath(json_file), dataset_name)
    if timer.seconds() > 1:
        logger.info("Read %s in %.2f s", json_file, timer.seconds())
    category_map = None
    if dataset_name is not None:
        category_map = _register_categories(content["categories"], dataset_name)

    images = {image["id"]: image for image in content["images"]}
    annotations = _group_by_image(content.get("annotations", []), images, str(json_file))
    logger.info("%d images are listed in %s", len(images), json_file)

    keys = ["iscrowd", "bbox", "category_id", *(extra_annotation_keys or [])]
    records, without_mask = [], 0
    for image_id, image in sorted(images.items()):
        objects = []
        for annotation in annotations[image_id]:
            entry = _convert_annotation(annotation, keys, category_map)
            if entry.get("segmentation") == []:
                without_mask += 1
            else:
                objects.append(entry)
        records.append(
            {
                "file_name": os.path.join(image_root, image["file_name"]),
                "height": image["height"],
                "width": image["width"],
                "image_id": image_id,
                "annotations": objects,
            }
        )
    if without_mask:
        logger.warning(
            "%s: left out %d objects whose polygons have fewer than 3 points",
            json_file,
            without_mask,
        )
    return records


def _read_json(json_file: str, dataset_name: str | None) -> dict[str, Any]:
    try:
        with PathManager.open(json_file) as file:
            return json.load(file)
    except FileNotFoundError as error:
        whose = f" of data set {dataset_name!r}" if dataset_name else ""
        raise FileNotFoundError(f"annotations{whose} not found: {json_file}") from error
    except json.JSONDecodeError as error:
        raise json.JSONDecodeError(
            f"{json_file} is not valid json: {error.msg}", error.doc, error.pos
        ) from error


def _register_categories(categories: list[dict], dataset_name: str) -> dict[int, int]:
    names = {category["id"]: category["name"] for category in categories}
    ids = sorted(names)
    if ids != list(range(1, len(ids) + 1)) and "coco" not in dataset_name:
        logger.warning(
            "Category ids of %s are not 1 to %d; they are mapped to 0 to %d in their order",
            dataset_name,
            len(ids),
            len(ids) - 1,
        )
    mapping = {category: i for i, category in enumerate(ids)}
    MetadataCatalog.get(dataset_name).set(
        thing_classes=[names[category] for category in ids],
        thing_dataset_id_to_contiguous_id=mapping,
    )
    return mapping


def _group_by_image(
    annotations: list[dict], images: dict[Any, dict], json_file: str
) -> dict[Any, list[dict]]:
    grouped = defaultdict(list)
    for annotation in annotations:
        grouped[annotation["image_id"]].append(annotation)
    ids = [a["id"] for image_id in images for a in grouped[image_id]]
    if len(ids) < len(annotations):
        logger.warning(
            "%s: %d of %d annotations belong to no image of the file",
            json_file,
            len(annotations) - len(ids),
            len(annotations),
        )
    # The widely used annotation files of this name are known to repeat a few ids.
    if "minival" not in json_file:
        repeated = len(ids) - len(set(ids))
        assert not repeated, f"{json_file}: {repeated} annotations repeat the id of another one"
    return grouped


def _convert_annotation(
    annotation: dict, keys: Sequence[str], category_map: dict[int, int] | None
) -> dict:
    image_id = annotation["image_id"]
    assert not annotation.get("ignore", 0), f"image {image_id}: 'ignore' is not supported"
    entry = {key: annotation[key] for key in keys if key in annotation}
    if "bbox" in entry and not entry["bbox"]:
        raise ValueError(f"image {image_id}: annotation {annotation.get('id')} has an empty 'bbox'")
    if annotation.get("segmentation"):
        entry["segmentation"] = _valid_segmentation(annotation["segmentation"])
    entry["bbox_mode"] = BoxMode.XYWH_ABS
    if category_map is not None:
        category = entry["category_id"]
        if category not in category_map:
            raise KeyError(
                f"image {image_id}: category_id {category} is not in the file's 'categories'"
            )
        entry["category_id"] = category_map[category]
    return entry


def _valid_segmentation(segmentation: list | dict) -> list | dict:
    """Compress run lengths, or leave out polygons with fewer than three points."""
    if isinstance(segmentation, dict):
        if isinstance(segmentation["counts"], list):
            return pycocotools.mask.frPyObjects(segmentation, *segmentation["size"])
        return segmentation
    return [polygon for polygon in segmentation if len(polygon) >= 6 and len(polygon) % 2 == 0]


def convert_to_coco_json(dataset_name: str, output_file: str, allow_cached: bool = True) -> None:
    """Write a registered data set to a file in COCO's format.

    Args:
        dataset_name: must have the metadata "thing_classes".
        output_file: where to write it.
        allow_cached: keep the file if there is one.
    """
    folder = os.path.dirname(output_file)
    PathManager.mkdirs(folder)
    with file_lock(output_file):  # several processes may need the same file
        is_missing = not PathManager.exists(output_file)
        if is_missing or not allow_cached:
            content = convert_to_coco_dict(dataset_name)
            with whole_file(output_file, "w") as file:
                json.dump(content, file)
            logger.info("Wrote the annotations of %s to %s", dataset_name, output_file)
            return
    logger.warning(
        "Using annotations of %s that were cached in %s; remove it if the data changed",
        dataset_name,
        output_file,
    )


def convert_to_coco_dict(dataset_name: str) -> dict[str, Any]:
    """Return a registered data set in COCO's format; without annotations it lacks that key."""
    metadata = MetadataCatalog.get(dataset_name)
    contiguous = metadata.get("thing_dataset_id_to_contiguous_id")
    if contiguous is None:
        contiguous = {i: i for i in range(len(metadata.thing_classes))}
    dataset_ids = {i: category for category, i in contiguous.items()}

    images: list[dict] = []
    annotations: list[dict] = []
    for index, record in enumerate(DatasetCatalog.get(dataset_name)):
        image_id = record.get("image_id", index)
        images.append(
            {
                "id": image_id,
                "width": int(record["width"]),
                "height": int(record["height"]),
                "file_name": str(record["file_name"]),
            }
        )
        for fields in _coco_annotations(record.get("annotations", []), dataset_ids):
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, **fields})

    content = {
        "info": {
            "date_created": str(datetime.datetime.now()),
            "description": f"{dataset_name}, converted",
        },
        "images": images,
        "categories": [
            {"id": dataset_ids[i], "name": name} for i, name in enumerate(metadata.thing_classes)
        ],
        "licenses": None,
    }
    if annotations:
        content["annotations"] = annotations
    return content


def _coco_annotations(
    annotations: Sequence[dict], dataset_ids: dict[int, int]
) -> Iterator[dict[str, Any]]:
    for annotation in annotations:
        box = np.asarray(annotation["bbox"]).tolist()
        if len(box) != 4 or np.ndim(box) != 1:
            raise ValueError(f"a box has 4 numbers, found {box}")
        x, y, width, height = BoxMode.convert(box, annotation["bbox_mode"], BoxMode.XYWH_ABS)
        fields: dict[str, Any] = {
            "bbox": [round(float(number), 3) for number in (x, y, width, height)],
            "area": float(width * height),
            "iscrowd": int(annotation.get("iscrowd", 0)),
            "category_id": int(dataset_ids[annotation["category_id"]]),
        }
        if "segmentation" in annotation:
            mask = annotation["segmentation"]
            fields["area"] = _mask_area(mask)
            fields["segmentation"] = _as_text(mask) if isinstance(mask, dict) else mask
        yield fields


def _mask_area(mask: list | dict) -> float:
    if isinstance(mask, dict):
        return float(pycocotools.mask.area(mask))
    return sum(_polygon_area(np.asarray(polygon).reshape(-1, 2)) for polygon in mask)


def _polygon_area(points: np.ndarray) -> float:
    x, y = points.T
    return float(abs(x @ np.roll(y, 1) - y @ np.roll(x, 1)) / 2)


def _as_text(run_lengths: dict) -> dict:
    counts = run_lengths["counts"]
    if isinstance(counts, bytes):
        counts = counts.decode("ascii")
    return {**run_lengths, "counts": counts}
