"""The generated data sets, under the names that configs use."""

import os
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

__all__ = ["register_shapes"]


def register_shapes(root: str | Path | None = None) -> None:
    """Register ``shapes_train`` and ``shapes_val``; again only if they lie elsewhere by now.

    Further sets beside them, in folders named ``shapes_...``, are registered by their folders'
    names: ``shapes_large_train`` and ``shapes_large_val``.

    Args:
        root: what ``tools/make_shapes.py`` has written; ``$DETECTRON2_DATASETS/shapes`` if not
            given, ``datasets/shapes`` without that variable.
    """
    if root is None:
        root = Path(os.environ.get("DETECTRON2_DATASETS", "datasets")).expanduser() / "shapes"
    root = Path(root)
    _register("shapes", root)
    for marker in sorted(root.parent.glob("shapes_*/generation.json")):
        _register(marker.parent.name, marker.parent)


def _register(prefix: str, root: Path) -> None:
    for split in ("train", "val"):
        name = f"{prefix}_{split}"
        json_file = str(root / "annotations" / f"instances_{split}.json")
        if name in DatasetCatalog.list():
            if MetadataCatalog.get(name).json_file == json_file:
                continue
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
        register_coco_instances(name, {}, json_file, str(root / split))
