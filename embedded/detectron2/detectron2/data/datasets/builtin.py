"""Registration of the COCO data sets, expected under ``$DETECTRON2_DATASETS``."""

import os
from functools import partial

from ..catalog import DatasetCatalog
from .builtin_meta import _get_builtin_metadata
from .coco import load_coco_json, register_coco_instances

# name: (folder of the images, file of the annotations)
_SPLITS = {
    "coco_2014_train": ("train2014", "instances_train2014"),
    "coco_2014_val": ("val2014", "instances_val2014"),
    "coco_2014_minival": ("val2014", "instances_minival2014"),
    "coco_2014_valminusminival": ("val2014", "instances_valminusminival2014"),
    "coco_2017_train": ("train2017", "instances_train2017"),
    "coco_2017_val": ("val2017", "instances_val2017"),
    "coco_2017_val_100": ("val2017", "instances_val2017_100"),
    "coco_2017_test": ("test2017", "image_info_test2017"),
    "coco_2017_test-dev": ("test2017", "image_info_test-dev2017"),
}


def register_all_coco(root: str) -> None:
    """Register COCO's splits, for files in ``root/coco``."""
    for name, (images, annotations) in _SPLITS.items():
        json_file = os.path.join(root, "coco", "annotations", f"{annotations}.json")
        image_root = os.path.join(root, "coco", images)
        DatasetCatalog.register(name, partial(_load, json_file, image_root, name))
        register_coco_instances(name, _get_builtin_metadata("coco"), json_file, image_root)


def _load(json_file: str, image_root: str, name: str) -> list[dict]:
    try:
        return load_coco_json(json_file, image_root, name)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error} (set DETECTRON2_DATASETS to the folder that holds 'coco')"
        ) from error


register_all_coco(os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets")))
