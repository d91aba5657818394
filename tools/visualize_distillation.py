"""Draw how a teacher teaches: where, which queries, and what both attend to.

    python tools/visualize_distillation.py --output-dir RUN --dataset shapes_val
    python tools/visualize_distillation.py --config-file FILE --checkpoint STUDENT \
        --files a.jpg b.jpg --top 3 teacher.init_checkpoint=TEACHER

It writes distillation_masks.png (target-aware selection masks, quality-weighted and per query),
distillation_pairs.png (matched boxes), distillation_attention.png (teacher, student and the
teacher's query in the student's decoder, for matched queries) and, if the run has logged it,
distillation_instability.png.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import projects  # noqa: F401  (makes detectron2 importable)

# isort: split
from detectron2.config import instantiate
from matplotlib.figure import Figure
from omegaconf import DictConfig

from engine.checkpoint import AtomicCheckpointer
from engine.config import load_config
from engine.errors import UserError, exit_code_of
from engine.settings import resolve_device
from projects.detr_distill.distiller import Distiller
from tools.attention_drawing import Entry, draw
from tools.attention_views import View
from tools.distillation_drawing import draw_instability, draw_masks, draw_pairs
from tools.distillation_views import Observation, make_watched, observe
from tools.plot_metrics import read_metrics
from tools.visualize_attention import (
    MOST,
    Input,
    check_range,
    class_names,
    config_path,
    inputs,
    weights_path,
)


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
    parser.add_argument("--top", type=int, default=3, help="pairs of an image (%(default)s)")
    parser.add_argument(
        "--attended", type=int, default=1, help="pairs whose attention is drawn (%(default)s)"
    )
    parser.add_argument("--layer", type=int, help="of the student, counted from 0 (the last)")
    parser.add_argument("--heads", type=int, nargs="+", help="counted from 0 (all)")
    parser.add_argument("--self", action="store_true", help="also attention to other queries")
    parser.add_argument("--place", default="neck", choices=("neck", "memory"), help="of the masks")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="(the run's, or this one)")
    parser.add_argument("--traceback", action="store_true", help="show where an error arose")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser.parse_intermixed_args(arguments)


def main(args: argparse.Namespace) -> None:
    """Look at every image and draw.

    Raises:
        UserError: something named on the command line does not exist or is out of range.
    """
    count = len(args.files) if args.files else args.images
    if count < 1 or not 1 <= args.top <= MOST or not 0 <= count * args.attended * 3 <= MOST:
        raise UserError(
            f"{count} images, --top {args.top}, --attended {args.attended}: expected at least 1 "
            f"image and pair, and at most {MOST} blocks of attention, 3 for each pair"
        )
    config = load_config(config_path(args), args.overrides)
    config.train.device = resolve_device(config.train.device)
    if args.dataset and "is_train" in config.dataloader.test.get("mapper", {}):
        config.dataloader.test.mapper.is_train = True  # which keeps the ground truth
    images = list(inputs(config, args))
    names = class_names(config, args)
    model = build(config, weights_path(args))
    observed = [(image, observe(model, image.item)) for image in images]
    layers = len(observed[0][1].context.student.logits)
    check_range("layer", [args.layer] if args.layer is not None else None, layers)
    layer = layers - 1 if args.layer is None else args.layer
    folder = args.output or args.output_dir or Path()
    save(mask_figure(observed, names, args), folder / "distillation_masks.png")
    save(pair_figure(observed, names, layer, args.top), folder / "distillation_pairs.png")
    entries = [entry for each in observed for entry in attention_entries(*each, names, layer, args)]
    if entries:
        save(draw(entries, args.heads, args.self), folder / "distillation_attention.png")
    metrics = (args.output_dir or Path()) / "metrics.json"
    figure = draw_instability(read_metrics(metrics)) if metrics.is_file() else None
    if figure is not None:
        save(figure, folder / "distillation_instability.png")


def build(config: DictConfig, checkpoint: str) -> Distiller:
    """The distillation with the student's weights, ready to be observed."""
    model = instantiate(config.model).to(config.train.device)
    if not isinstance(model, Distiller):
        raise UserError(f"the model is a {type(model).__name__}, expected a Distiller")
    checkpointer = AtomicCheckpointer(model.student, training_parts=model.training_parts)
    checkpointer.strictness = "evaluate"
    checkpointer.load(checkpoint)
    return make_watched(model)


def save(figure: Figure, path: Path) -> None:
    """Write a figure and say where."""
    try:
        figure.savefig(path, dpi=130)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write {path}: {str(error).splitlines()[0]}") from error
    print(f"{path.stem}: {path}")


def mask_figure(
    observed: list[tuple[Input, Observation]], names: list[str], args: argparse.Namespace
) -> Figure:
    """The masks of all images."""
    drawn = []
    for image, seen in observed:
        masks, queries = seen.masks(args.place, args.top)
        teacher = seen.view(seen.context.teacher, len(seen.context.teacher.logits) - 1)
        captions = [caption(teacher, query, names) for query in queries]
        boxes = [teacher.boxes[query] for query in queries]
        drawn.append((image.picture, image.title, masks.cpu(), captions, boxes))
    shapes = observed[0][1].cells.padded
    levels = [f"level {place}, {height} x {width}" for place, (height, width) in enumerate(shapes)]
    return draw_masks(drawn, levels)


def pair_figure(
    observed: list[tuple[Input, Observation]], names: list[str], layer: int, count: int
) -> Figure:
    """The best pairs of all images in a layer."""
    drawn = []
    for image, seen in observed:
        student = seen.view(seen.context.student, layer)
        teacher = seen.view(seen.context.teacher, seen.stage(layer))
        pairs = [
            (student.boxes[own], teacher.boxes[other], caption(teacher, other, names))
            for own, other in seen.pairs(layer, count)
        ]
        drawn.append((image.picture, f"{image.title}, layer {layer}", pairs))
    return draw_pairs(drawn)


def attention_entries(
    image: Input, seen: Observation, names: list[str], layer: int, args: argparse.Namespace
) -> Iterator[Entry]:
    """Of each of the best pairs the teacher, the student, and the auxiliary group if there is."""
    views = {
        "teacher": seen.view(seen.context.teacher, seen.stage(layer)),
        "student": seen.view(seen.context.student, layer),
    }
    if seen.has_group:
        views["group"] = seen.view(seen.context.group, layer)
    for view in views.values():
        if view.cross is None and view.weights is None:
            return
        check_range("head", args.heads, view.num_heads)
    for own, other in seen.pairs(layer, args.attended):
        for who, view in views.items():
            query = own if who == "student" else other
            text = caption(view, query, names)
            yield Entry(image.picture, f"{who}, {image.title}", text, view, query)


def caption(view: View, query: int, names: list[str]) -> str:
    """A query and its best class."""
    label = int(view.classes[query])
    name = names[label] if label < len(names) else f"class {label}"
    return f"{query}: {name} {view.scores[query]:.2f}"


if __name__ == "__main__":
    args = parse()
    sys.exit(exit_code_of(lambda: main(args), traceback=args.traceback))
