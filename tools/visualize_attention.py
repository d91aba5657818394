"""Draw what a detector's queries attend to: per head, over the images, with Gaussians if any.

    python tools/visualize_attention.py --output-dir RUN --dataset shapes_val
    python tools/visualize_attention.py --config-file FILE --checkpoint FILE --files a.jpg b.jpg
    python tools/visualize_attention.py --output-dir RUN --dataset shapes_val --queries 3 7 --self

A block for each image and query: the detection, then every head of the decoder's cross-attention;
below it the Gaussians that modulate it, and the queries' attention to one another, if asked for.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import projects  # noqa: F401  (makes detectron2 importable)

# isort: split
import numpy as np
from detectron2.config import instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import convert_image_to_rgb
from omegaconf import DictConfig

from detectors.detector import Detector
from engine.checkpoint import newest_checkpoint
from engine.config import load_config
from engine.data import image_fault
from engine.datasets import build_loader, check_datasets, dataset_names
from engine.errors import UserError, exit_code_of
from engine.run import load_for_evaluation
from engine.settings import resolve_device
from tools.attention_drawing import Entry, draw
from tools.attention_views import look
from tools.visualize_predictions import spread

MOST = 50
"""Blocks in a picture."""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output-dir", type=Path, help="a run's folder: its config and weights")
    parser.add_argument("--config-file", metavar="FILE", help="instead of the run's config.yaml")
    parser.add_argument("--checkpoint", metavar="FILE", help="instead of the run's best or newest")
    images = parser.add_mutually_exclusive_group(required=True)
    images.add_argument("--dataset", help="registered name, such as shapes_val")
    images.add_argument("--files", nargs="+", type=Path, metavar="FILE", help="images")
    parser.add_argument("--images", type=int, default=3, help="how many of it (%(default)s)")
    queries = parser.add_mutually_exclusive_group()
    queries.add_argument(
        "--top", type=int, default=2, help="best queries of an image (%(default)s)"
    )
    queries.add_argument("--queries", type=int, nargs="+", help="these instead, counted from 0")
    parser.add_argument("--layer", type=int, help="of the decoder, counted from 0 (the last)")
    parser.add_argument("--heads", type=int, nargs="+", help="counted from 0 (all)")
    parser.add_argument("--self", action="store_true", help="also attention to other queries")
    parser.add_argument("--output", type=Path, metavar="FILE", help="(attention.png in the run)")
    parser.add_argument("--traceback", action="store_true", help="show where an error arose")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser.parse_intermixed_args(arguments)


class Input(NamedTuple):
    """An image: what it is, its RGB pixels (h, w, 3) and what the detector takes."""

    title: str
    picture: np.ndarray
    item: dict


def main(args: argparse.Namespace) -> None:
    """Look at every image and draw.

    Raises:
        UserError: something named on the command line does not exist or is out of range.
    """
    count = (len(args.files) if args.files else args.images) * len(args.queries or range(args.top))
    if not 1 <= count <= MOST:
        raise UserError(f"{count} queries to draw, expected 1 to {MOST}: see --images and --top")
    config = load_config(config_path(args), args.overrides)
    config.train.device = resolve_device(config.train.device)
    config.train.init_checkpoint = weights_path(args)
    images = list(inputs(config, args))
    names = class_names(config, args)
    detector, _ = load_for_evaluation(config)
    if not isinstance(detector, Detector):
        raise UserError(f"the model is a {type(detector).__name__}, expected a detector")
    entries = [entry for image in images for entry in look_at(detector, image, names, args)]
    path = args.output or (args.output_dir or Path()) / "attention.png"
    try:
        draw(entries, args.heads, args.self).savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write {path}: {str(error).splitlines()[0]}") from error
    print(f"attention: {path}")


def config_path(args: argparse.Namespace) -> str:
    """The config that is named, or the run's."""
    if args.config_file:
        return args.config_file
    if args.output_dir is None:
        raise UserError("neither --output-dir nor --config-file says which detector to draw")
    path = args.output_dir / "config.yaml"
    if not path.is_file():
        raise UserError(f"{args.output_dir} is not a run's folder: it has no config.yaml")
    return str(path)


def weights_path(args: argparse.Namespace) -> str:
    """The checkpoint that is named, or the run's best or newest; empty without a run."""
    if args.checkpoint or args.output_dir is None:
        return args.checkpoint or ""
    best = args.output_dir / "model_best.pth"
    path = str(best) if best.is_file() else newest_checkpoint(str(args.output_dir))
    if not path:
        raise UserError(f"{args.output_dir} holds no checkpoint")
    return path


def inputs(config: DictConfig, args: argparse.Namespace) -> Iterator[Input]:
    """The images, prepared as for the evaluation."""
    node = config.dataloader.test
    if args.dataset:
        check_datasets([args.dataset])
        node.dataset.names = args.dataset
        data = build_loader(node).dataset
        items = [data[index] for index in spread(list(range(len(data))), args.images)]
    else:
        mapper = instantiate(node.mapper)
        items = [mapper({"file_name": str(path)}) for path in map(readable, args.files)]
    colours = node.mapper.get("img_format", "RGB")
    for item in items:
        picture = convert_image_to_rgb(item["image"].permute(1, 2, 0), colours)
        yield Input(Path(item["file_name"]).name, picture, item)


def readable(path: Path) -> Path:
    """The path of an image that is there and whole."""
    if fault := image_fault(str(path)):
        raise UserError(fault)
    return path


def class_names(config: DictConfig, args: argparse.Namespace) -> list[str]:
    """Names of the classes, as far as a data set tells them."""
    known = [args.dataset] if args.dataset else dataset_names(config.dataloader.test)
    if not known:
        return []
    metadata = MetadataCatalog.get(known[0])
    names = metadata.get("thing_classes", None)
    if not names and Path(metadata.get("json_file", "")).is_file():
        DatasetCatalog.get(known[0])  # reads them
        names = metadata.thing_classes
    return list(names or [])


def look_at(
    detector: Detector, image: Input, names: list[str], args: argparse.Namespace
) -> Iterator[Entry]:
    """The queries of one image that are to be drawn."""
    (view,) = look(detector, [image.item], args.layer)
    check_range("head", args.heads, view.num_heads)
    check_range("query", args.queries, len(view.scores))
    for query in args.queries or view.best_queries(args.top):
        label = int(view.classes[query])
        name = names[label] if label < len(names) else f"class {label}"
        caption = f"query {query}: {name} {view.scores[query]:.2f}"
        yield Entry(image.picture, image.title, caption, view, query)


def check_range(what: str, chosen: list[int] | None, count: int) -> None:
    """Refuse indices that do not exist."""
    for index in chosen or []:
        if not 0 <= index < count:
            raise UserError(f"there is no {what} {index}: there are 0 to {count - 1}")


if __name__ == "__main__":
    args = parse()
    sys.exit(exit_code_of(lambda: main(args), traceback=args.traceback))
