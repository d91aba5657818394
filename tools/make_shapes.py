"""Write a data set of textured shapes in COCO's format, the same for the same parameters.

    python tools/make_shapes.py --output datasets/shapes --train-images 4000 --val-images 400

The output folder holds ``train/``, ``val/``, ``annotations/instances_{train,val}.json`` and
``generation.json`` with the parameters. It appears only when complete; asking again for the same
data set does nothing, asking for another one needs ``--overwrite``.

Annotations describe the whole shape as far as it lies inside the image, also where something is
drawn over it: ``segmentation`` is its polygon, ``bbox`` and ``area`` are that polygon's. A crowd is
a cluster of one category with one run-length mask.
"""

import argparse
import functools
import json
import math
import multiprocessing
import os
import shutil
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from PIL import Image

from engine.errors import UserError, exit_code_of
from tools.shapes_drawing import OUTLINES
from tools.shapes_scene import SPLITS, Settings, draw_image

GENERATOR_VERSION = 1  # raise it whenever the same parameters give other pictures

PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    # What a small detector learns from scratch on a CPU in minutes.
    "quickstart": {
        "size": (96, 96),
        "max_objects": 2,
        "categories": 8,
        "scales": (0.35, 0.9),
        "small_share": 0.0,
        "max_aspect": 1.4,
        "max_rotation": 20.0,
        "crowd_share": 0.02,
        "clutter": 2,
        "min_visible": 0.6,
        "truncation": 0.1,
        "object_contrast": 120.0,
        "background_contrast": 20.0,
    },
}


# --- the data set -------------------------------------------------------------------------------


def _write_image(index: int, settings: Settings, split: str, folder: Path) -> tuple[dict, list]:
    pixels, annotations = draw_image(settings, split, index)
    name = f"{index + 1:06d}.{settings.image_format}"
    jpeg = settings.image_format == "jpg"
    options: dict[str, Any] = {"quality": 92, "subsampling": 0} if jpeg else {}
    Image.fromarray(pixels).save(folder / name, **options)
    height, width = pixels.shape[:2]
    return {"id": index + 1, "file_name": name, "height": height, "width": width}, annotations


def write_split(settings: Settings, split: str, output: Path, workers: int) -> None:
    """Write one split's images and its annotation file."""
    folder = output / split
    folder.mkdir(parents=True)
    count = getattr(settings, f"{split}_images")
    task = functools.partial(_write_image, settings=settings, split=split, folder=folder)
    if workers > 1:
        with multiprocessing.Pool(workers) as pool:
            drawn = pool.map(task, range(count), chunksize=50)
    else:
        drawn = [task(index) for index in range(count)]
    annotations: list[dict] = []
    for image, found in drawn:
        for annotation in found:
            annotations.append({"id": len(annotations) + 1, "image_id": image["id"], **annotation})
    names = list(OUTLINES)[: settings.categories]
    content = {
        "info": {"description": f"generated shapes, {split}", "version": str(GENERATOR_VERSION)},
        "licenses": [],
        "images": [image for image, _ in drawn],
        "annotations": annotations,
        "categories": [
            {"id": i + 1, "name": name, "supercategory": "shape"} for i, name in enumerate(names)
        ],
    }
    path = output / "annotations" / f"instances_{split}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))


def generate(settings: Settings, output: Path, workers: int = 1, overwrite: bool = False) -> bool:
    """Write the data set unless it is there already; say whether anything was written.

    Raises:
        FileExistsError: the folder holds files that are no generated data set, or another one and
            `overwrite` is not set.
    """
    output = output.resolve()
    wanted = {"generator": GENERATOR_VERSION, **json.loads(json.dumps(asdict(settings)))}
    found = _read_parameters(output)
    if found == wanted and _is_whole(output, settings):
        return False
    if found is None and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{output} is not empty and holds no generated data set")
    if found is not None and found != wanted and not overwrite:
        raise FileExistsError(_difference(output, found, wanted))
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # what an interrupted run has left
    partial.mkdir(parents=True)
    for split in SPLITS:
        write_split(settings, split, partial, workers)
    (partial / "generation.json").write_text(json.dumps(wanted, indent=1) + "\n")
    if output.exists():
        shutil.rmtree(output)
    os.replace(partial, output)
    return True


def _read_parameters(output: Path) -> dict[str, Any] | None:
    try:
        return json.loads((output / "generation.json").read_text())
    except (OSError, ValueError):
        return None


def _is_whole(output: Path, settings: Settings) -> bool:
    return all(
        (output / "annotations" / f"instances_{split}.json").is_file()
        and len(list((output / split).glob("*"))) == getattr(settings, f"{split}_images")
        for split in SPLITS
    )


def _difference(output: Path, found: dict[str, Any], wanted: dict[str, Any]) -> str:
    changes = [
        f"{key} {found.get(key)} instead of {value}"
        for key, value in wanted.items()
        if found.get(key) != value
    ]
    return f"{output} holds a data set with {', '.join(changes)} (--overwrite replaces it)"


# --- command line -------------------------------------------------------------------------------


def _size(text: str) -> tuple[int, int]:
    sides = [int(side) for side in text.lower().split("x")]
    if len(sides) > 2 or min(sides) < 16:
        raise ValueError(text)
    return sides[0], sides[-1]


_size.__name__ = "size (SIDE or HEIGHTxWIDTH, at least 16)"  # what argparse calls the type


def check(settings: Settings) -> None:
    """Raise ValueError, naming the option, for values that make no data set."""
    shares = ("small_share", "large_share", "empty_share", "crowd_share", "min_visible")
    low, high = settings.scales
    for name, valid, expected in (
        ("categories", 1 <= settings.categories <= len(OUTLINES), f"1 to {len(OUTLINES)}"),
        ("scales", 0 < low <= high <= 1, "0 < LOW <= HIGH <= 1"),
        ("max_objects", 0 <= settings.min_objects <= settings.max_objects, "at least min-objects"),
        *((name, math.isfinite(getattr(settings, name)), "a finite number") for name in _FLOATS),
        ("max_aspect", settings.max_aspect >= 1, "at least 1"),
        ("size_jitter", 0 <= settings.size_jitter < 1, "0 to below 1"),
        ("truncation", 0 <= settings.truncation <= 1, "0 to 1"),
        *((name, 0 <= getattr(settings, name) <= 1, "0 to 1") for name in shares),
        *((name, getattr(settings, name) >= 0, "at least 0") for name in _NOT_NEGATIVE),
    ):
        if not valid:
            option = name.replace("_", "-")
            raise ValueError(f"--{option}: {getattr(settings, name)}, expected {expected}")


_FLOATS = [
    name for name, spec in Settings.__dataclass_fields__.items() if isinstance(spec.default, float)
]
_NOT_NEGATIVE = ("train_images", "val_images", "clutter", "seed", "max_rotation")


def parse(arguments: list[str] | None = None) -> tuple[Settings, argparse.Namespace]:
    """Data set parameters and the remaining options of a command line."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s --output FOLDER [options]", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--preset", choices=PRESETS, default="default", help="defaults to start at")
    parser.add_argument("--overwrite", action="store_true", help="replace another data set")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    for name, spec in Settings.__dataclass_fields__.items():
        default: Any = spec.default
        shape: dict[str, Any] = {"type": type(default)}
        if name == "size":
            shape = {"type": _size}
        elif isinstance(default, tuple):
            shape = {"type": type(default[0]), "nargs": len(default)}
        options = {**spec.metadata, "help": f"{spec.metadata['help']} (default: {default})"}
        parser.add_argument("--" + name.replace("_", "-"), **shape, **options)
    args = parser.parse_args(arguments)
    given: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in vars(args).items()
        if name in Settings.__dataclass_fields__ and value is not None
    }
    settings = replace(Settings(**PRESETS[args.preset]), **given)
    if args.workers < 1:
        parser.error(f"--workers: {args.workers}, expected at least 1")
    try:
        check(settings)
    except ValueError as error:
        parser.error(str(error))
    return settings, args


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    settings, args = parse(arguments)
    start = time.perf_counter()
    try:
        written = generate(settings, args.output, args.workers, args.overwrite)
    except OSError as error:
        raise UserError(str(error)) from None
    count = f"{settings.train_images} + {settings.val_images} images in {args.output}"
    if written:
        print(f"{count}, {time.perf_counter() - start:.1f} s")
    else:
        print(f"{count}: already there")


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
