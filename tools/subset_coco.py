"""Copy a few images of a COCO-layout folder, with their annotations, into a folder like it.

    python tools/subset_coco.py --source datasets/coco --output tiny/coco --images 16 --as-val
    DETECTRON2_DATASETS=tiny python tools/train_net.py --config-file ...

The choice depends only on the seed and the ids of the images that have a box to learn from.
"""

import argparse
import json
import os
import random
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.annotations import explain_fault
from engine.errors import UserError, exit_code_of

OTHER = {"train2017": "val2017", "val2017": "train2017", "train": "val", "val": "train"}


def choose(content: dict[str, Any], count: int, seed: int) -> dict[str, Any]:
    """Reduce COCO annotations to `count` random images that have a box that is no crowd.

    Raises:
        ValueError: there are fewer such images.
    """
    labelled = {a["image_id"] for a in content["annotations"] if not a.get("iscrowd", 0)}
    if not 0 < count <= len(labelled):
        raise ValueError(f"--images {count}, expected 1 to the {len(labelled)} images with a box")
    chosen = set(random.Random(seed).sample(sorted(labelled), count))
    return {
        **content,
        "images": [image for image in content["images"] if image["id"] in chosen],
        "annotations": [a for a in content["annotations"] if a["image_id"] in chosen],
    }


def write_subset(content: dict[str, Any], images: Path, output: Path, split: str) -> None:
    """Write one split: its images (hard links where possible), then its annotation file.

    Raises:
        ValueError: a file name points out of the image folder.
    """
    for image in content["images"]:
        name = Path(image["file_name"])
        if name.is_absolute() or ".." in name.parts:
            raise ValueError(f"file_name {name}, expected a path below {images}")
        _link_or_copy(images / name, output / split / name)
    path = output / "annotations" / f"instances_{split}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps(content))
    os.replace(temporary, path)


def _link_or_copy(source: Path, target: Path) -> None:
    if target.exists() and target.samefile(source):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(target.name + ".partial")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except FileNotFoundError:
        raise
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, temporary)
    os.replace(temporary, target)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, required=True, help="COCO-layout folder")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--images", type=int, default=16, help="number of images (%(default)s)")
    parser.add_argument("--split", default="train2017", help="split to read (%(default)s)")
    parser.add_argument("--as-val", action="store_true", help="the same images as the other split")
    parser.add_argument("--seed", type=int, default=0, help="of the choice (%(default)s)")
    args = parser.parse_args(arguments)
    if args.as_val and args.split not in OTHER:
        parser.error(f"--as-val: split {args.split}, expected one of {', '.join(OTHER)}")
    if args.output.resolve() == args.source.resolve():
        parser.error(f"--output {args.output}, expected another folder than --source")
    return args


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    args = parse(arguments)
    source = args.source / "annotations" / f"instances_{args.split}.json"
    splits = [args.split, OTHER[args.split]] if args.as_val else [args.split]
    try:
        content = choose(json.loads(source.read_text()), args.images, args.seed)
        for split in splits:
            write_subset(content, args.source / args.split, args.output, split)
    except (OSError, ValueError) as error:
        raise UserError(str(error)) from None
    except (AttributeError, KeyError, TypeError) as error:
        explain_fault(source)
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{source} is not a COCO annotation file: {reason}") from error
    print(
        f"{args.images} images with {len(content['annotations'])} annotations "
        f"as {' and '.join(splits)} in {args.output}"
    )


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
