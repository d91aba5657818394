"""Draw a grid of images of a data set with their ground truth and a run's predictions.

    python tools/visualize_predictions.py --output-dir output/quickstart --dataset shapes_val

Predictions are the ``coco_instances_results.json`` that an evaluation has left in that folder.
"""

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import projects  # noqa: F401  (makes detectron2 importable)

# isort: split
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image, ImageDraw, ImageFont

from engine.boxes import is_box
from engine.config import read_config
from engine.errors import UserError, exit_code_of
from engine.registration import register_shapes

TRUTH, PREDICTION, CROWD = (70, 230, 90), (255, 90, 40), (150, 150, 150)
TILE = 320
GAP = 6
FONT = ImageFont.load_default(size=13)
RESULTS = "coco_instances_results.json"


def by_image(items: list[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    """Group annotations or predictions by their image."""
    grouped: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for item in items:
        grouped[item["image_id"]].append(item)
    return grouped


def spread(items: list[Any], count: int) -> list[Any]:
    """Up to `count` items, evenly spaced over the list, so that a picture shows the same ones."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


class Tile:
    """One enlarged or reduced image, on which boxes ``(x, y, w, h)`` of the original are drawn."""

    def __init__(self, image: Image.Image):
        self.scale = TILE / max(image.size)
        if self.scale > 1:
            self.scale = max(1.0, int(self.scale))  # whole pixels stay sharp
        size = tuple(max(1, round(side * self.scale)) for side in image.size)
        method = Image.Resampling.NEAREST if self.scale >= 1 else Image.Resampling.BILINEAR
        self.image = image.convert("RGB").resize((size[0], size[1]), method)
        self.draw = ImageDraw.Draw(self.image)

    def box(self, box: list[float], text: str, colour: tuple, width: int, below: bool) -> None:
        """Outline a box and write its label at its upper or lower left corner."""
        x, y, w, h = (value * self.scale for value in box)
        self.draw.rectangle((x, y, max(x, x + w - 1), max(y, y + h - 1)), None, colour, width)
        left, _, right, bottom = FONT.getbbox(text)
        high, wide = bottom + 2, right - left + 4
        label_y = y + h if below else y - high
        label_x = min(max(x, 0), self.image.width - wide)
        label_y = min(max(label_y, 0), self.image.height - high)
        self.draw.rectangle((label_x, label_y, label_x + wide, label_y + high), colour)
        self.draw.text((label_x + 2, label_y), text, (0, 0, 0), FONT)


def draw_tile(
    image: Image.Image,
    truth: list[dict[str, Any]],
    predictions: list[dict[str, Any]],
    names: dict[int, str],
) -> Image.Image:
    """One image with true boxes (thin, label below) and predicted ones (thick, label above)."""
    tile = Tile(image)
    for item in truth:
        name = names[item["category_id"]]
        if item.get("iscrowd", 0):
            tile.box(item["bbox"], f"crowd: {name}", CROWD, 1, below=True)
        else:
            tile.box(item["bbox"], name, TRUTH, 1, below=True)
    for item in sorted(predictions, key=lambda item: item["score"]):
        text = f"{names[item['category_id']]} {item['score']:.2f}"
        tile.box(item["bbox"], text, PREDICTION, 2, below=False)
    return tile.image


def grid(tiles: list[Image.Image], columns: int, title: list[tuple[str, tuple]]) -> Image.Image:
    """Arrange pictures in rows under a line of coloured words."""
    columns = min(columns, len(tiles))
    wide = max(tile.width for tile in tiles) + GAP
    high = max(tile.height for tile in tiles) + GAP
    head = 24
    rows = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (columns * wide + GAP, rows * high + head + GAP), (30, 30, 30))
    draw = ImageDraw.Draw(sheet)
    x = float(GAP)
    for text, colour in title:
        draw.text((x, 4), text, colour, FONT)
        x += FONT.getlength(text) + 20
    for index, tile in enumerate(tiles):
        row, column = divmod(index, columns)
        sheet.paste(tile, (GAP + column * wide, head + GAP + row * high))
    return sheet


def find_results(output_dir: Path) -> Path:
    """The newest predictions file in the folder or its ``inference`` folder.

    Raises:
        FileNotFoundError: there is none.
    """
    found = [p for p in (output_dir / RESULTS, output_dir / "inference" / RESULTS) if p.is_file()]
    if not found:
        raise FileNotFoundError(f"{output_dir} holds no {RESULTS}: evaluate first")
    return max(found, key=lambda path: path.stat().st_mtime)


def read_results(path: Path, names: dict[int, str]) -> list[dict[str, Any]]:
    """Read the predictions of a file in COCO's format.

    Raises:
        ValueError: it is no list of boxes with a score, each of a category in ``names``.
    """
    try:
        items = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no json: {error}") from None
    if not isinstance(items, list):
        raise ValueError(f"{path} holds a {type(items).__name__}, expected a list of predictions")
    for index, item in enumerate(items):
        valid = isinstance(item, dict) and is_box(item.get("bbox")) and "image_id" in item
        if not (valid and isinstance(item.get("score"), int | float)):
            raise ValueError(
                f"{path}: prediction {index} is {str(item)[:80]}, expected image_id, category_id, "
                "a bbox of 4 numbers and a score"
            )
        if item.get("category_id") not in names:
            raise ValueError(
                f"{path}: prediction {index} has the category_id {item.get('category_id')}, "
                "which the data set lacks"
            )
    return items


def draw_dataset(
    dataset: str, results: Path, count: int, columns: int, threshold: float
) -> Image.Image:
    """Draw `count` images of a registered COCO data set with predictions above a score."""
    if dataset not in DatasetCatalog.list():
        raise ValueError(f"data set {dataset} is not one of {', '.join(DatasetCatalog.list())}")
    metadata = MetadataCatalog.get(dataset)
    content = json.loads(Path(metadata.json_file).read_text())
    names = {category["id"]: category["name"] for category in content["categories"]}
    truth = by_image(content["annotations"])
    kept = [p for p in read_results(results, names) if p["score"] >= threshold]
    predicted = by_image(kept)
    tiles = []
    for record in spread(content["images"], count):
        with Image.open(Path(metadata.image_root) / record["file_name"]) as image:
            tiles.append(draw_tile(image, truth[record["id"]], predicted[record["id"]], names))
    if not tiles:
        raise ValueError(f"{metadata.json_file} lists no image")
    title = [("ground truth", TRUTH), (f"prediction, score >= {threshold:g}", PREDICTION)]
    return grid(tiles, columns, [*title, ("crowd (not evaluated)", CROWD)])


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", type=Path, required=True, help="a run's folder")
    parser.add_argument("--dataset", required=True, help="registered name, such as shapes_val")
    parser.add_argument("--config-file", help="a config whose loading registers the data set")
    parser.add_argument("--images", type=int, default=20, help="how many (%(default)s)")
    parser.add_argument("--columns", type=int, default=5, help="images in a row (%(default)s)")
    parser.add_argument("--threshold", type=float, default=0.5, help="least score (%(default)s)")
    args = parser.parse_args(arguments)
    register_shapes()
    if args.config_file:
        read_config(args.config_file)
    try:
        results = find_results(args.output_dir)
        picture = draw_dataset(args.dataset, results, args.images, args.columns, args.threshold)
    except (OSError, ValueError) as error:
        raise UserError(str(error)) from None
    path = args.output_dir / "predictions.png"
    picture.save(path)
    print(f"predictions: {path}")


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
