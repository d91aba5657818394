"""One image of the generated shapes data set: what is in it, and its annotations."""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tools.shapes_drawing import (
    OUTLINES,
    Layer,
    Rng,
    blend,
    clip_polygon,
    clutter_layer,
    contrasting_colour,
    polygon_area,
    polygon_layer,
    texture,
    transform,
)

SPLITS = ("train", "val")
LEAST_SIDE = 8.0  # pixels; nobody could tell smaller shapes apart


def _option(default: Any, text: str, **arguments: Any) -> Any:
    return field(default=default, metadata={"help": text, **arguments})


@dataclass(frozen=True)
class Settings:
    """What the data set looks like; every field is a command-line option."""

    train_images: int = _option(4000, "number of training images")
    val_images: int = _option(400, "number of validation images")
    size: tuple[int, int] = _option((128, 128), "image size, SIDE or HEIGHTxWIDTH")
    size_jitter: float = _option(0.0, "vary each side by up to this fraction, per image")
    min_objects: int = _option(1, "fewest objects in an image that is not empty")
    max_objects: int = _option(4, "most objects in an image")
    categories: int = _option(10, f"number of categories, up to {len(OUTLINES)}")
    scales: tuple[float, float] = _option(
        (0.0625, 0.95),
        "an object's longer side in shorter image sides, log-uniform",
        metavar=("LOW", "HIGH"),
    )
    small_share: float = _option(0.1, "share of objects from the lowest fifth of the scales")
    large_share: float = _option(0.15, "share of objects from the highest twentieth of the scales")
    max_aspect: float = _option(1.8, "largest stretch of a shape")
    max_rotation: float = _option(180.0, "largest rotation, in degrees")
    empty_share: float = _option(0.04, "share of images without objects")
    crowd_share: float = _option(0.06, "share of images with a crowd region")
    clutter: int = _option(6, "most unlabelled strokes and blobs in an image")
    min_visible: float = _option(0.4, "least fraction of a shape inside the image and uncovered")
    truncation: float = _option(0.2, "most of an object's side outside the image")
    object_contrast: float = _option(90.0, "least colour distance to what lies behind an object")
    background_contrast: float = _option(30.0, "strength of the background's texture")
    image_format: str = _option("jpg", "jpg or png", choices=("jpg", "png"))
    seed: int = _option(0, "seed")


class Scene:
    """An image being painted, and what of each thing in it is still visible."""

    def __init__(self, settings: Settings, rng: Rng):
        self.settings, self.rng = settings, rng
        jitter = rng.uniform(-settings.size_jitter, settings.size_jitter, 2)
        self.height, self.width = (
            max(16, round(side * (1 + j))) for side, j in zip(settings.size, jitter, strict=True)
        )
        contrast = settings.background_contrast * rng.uniform(0.3, 1.5)
        colour = rng.uniform(40, 215, 3)
        self.pixels = texture(rng, self.height, self.width, colour, contrast)
        self.annotations: list[dict[str, Any]] = []
        self._owner = np.full((self.height, self.width), -1, dtype=np.int64)
        self._areas: list[float] = []  # whole area of each thing, also where outside the image
        self._visible: list[int] = []  # its pixels that nothing covers

    def clutter(self) -> None:
        """Paint one unlabelled thing, unless it would hide too much of an object."""
        layer = clutter_layer(self.rng, self.height, self.width)
        if self._hides_too_much(layer):
            return
        self._cover(layer)
        self._paint(layer, distance=40, opacity=self.rng.uniform(0.5, 1.0))

    def object(self, longest: float, attempts: int = 10) -> None:
        """Place one labelled shape where all shapes stay visible enough, or give up."""
        category = int(self.rng.integers(self.settings.categories))
        for _ in range(attempts):
            points = self._outline(category, longest)
            extent = np.ptp(points, axis=0)
            slack = self.settings.truncation * self.rng.random() * extent
            points += self.rng.uniform(
                extent / 2 - slack, (self.width, self.height) - extent / 2 + slack
            )
            layer = polygon_layer(points, self.height, self.width)
            if self._place(layer, polygon_area(points)):
                self._paint(layer, self.settings.object_contrast)
                self.annotations.append(
                    _object_annotation(category, clip_polygon(points, self.height, self.width))
                )
                return

    def crowd(self) -> None:
        """Paint a cluster of one category, annotated as one region."""
        category = int(self.rng.integers(self.settings.categories))
        side = min(self.height, self.width)
        member = max(7.0, side * self.rng.uniform(0.07, 0.12))
        count = int(self.rng.integers(8, 15))
        spread = np.sqrt(count) * member * np.array([0.55, 0.45])
        limit = np.minimum(spread + member, (self.width / 2 - 1, self.height / 2 - 1))
        centre = self.rng.uniform(limit, (self.width, self.height) - limit)
        region = np.zeros((self.height, self.width), dtype=bool)
        for _ in range(count):
            points = self._outline(category, member) + centre + self.rng.uniform(-spread, spread)
            layer = polygon_layer(points, self.height, self.width)
            self._paint(layer, self.settings.object_contrast)
            region[layer.window] |= layer.mask
        self._place(Layer(region.astype(np.float32), 0, 0), float(region.sum()))
        self.annotations.append(_crowd_annotation(category, region))

    def finish(self) -> np.ndarray:
        """The picture (H, W, 3), uint8, with a little sensor noise."""
        noise = self.rng.standard_normal((self.height, self.width, 1), dtype=np.float32)
        return (self.pixels + 3 * noise).clip(0, 255).astype(np.uint8)

    def _outline(self, category: int, longest: float) -> np.ndarray:
        log_aspect = math.log(self.settings.max_aspect)
        aspect = math.exp(self.rng.uniform(-log_aspect, log_aspect))
        degrees = self.rng.uniform(-self.settings.max_rotation, self.settings.max_rotation)
        outline = list(OUTLINES.values())[category]
        return transform(outline, longest, aspect, degrees)

    def _paint(self, layer: Layer, distance: float, opacity: float = 1.0) -> None:
        if not layer.mask.any():
            return
        behind = self.pixels[layer.window][layer.mask].mean(axis=0)
        colour = contrasting_colour(self.rng, behind, distance)
        height, width = layer.coverage.shape
        paint = texture(self.rng, height, width, colour, self.rng.uniform(5, 25))
        blend(self.pixels, layer, paint, opacity)

    def _place(self, layer: Layer, whole_area: float) -> bool:
        least = self.settings.min_visible
        if layer.mask.sum() < least * whole_area or self._hides_too_much(layer):
            return False
        self._cover(layer)
        self._owner[layer.window][layer.mask] = len(self._areas)
        self._areas.append(whole_area)
        self._visible.append(int(layer.mask.sum()))
        return True

    def _lost(self, layer: Layer) -> np.ndarray:
        owners = self._owner[layer.window][layer.mask]
        return np.bincount(owners[owners >= 0], minlength=len(self._areas))

    def _hides_too_much(self, layer: Layer) -> bool:
        left = np.array(self._visible) - self._lost(layer)
        return bool((left < self.settings.min_visible * np.array(self._areas)).any())

    def _cover(self, layer: Layer) -> None:
        self._visible = (np.array(self._visible, dtype=int) - self._lost(layer)).tolist()
        self._owner[layer.window][layer.mask] = -1


def _object_annotation(category: int, polygon: np.ndarray) -> dict[str, Any]:
    polygon = polygon.round(2)
    low, high = polygon.min(axis=0), polygon.max(axis=0)
    return {
        "category_id": category + 1,
        "bbox": [round(float(v), 2) for v in (*low, *(high - low))],
        "area": round(polygon_area(polygon), 2),
        "iscrowd": 0,
        "segmentation": [polygon.ravel().tolist()],
    }


def _crowd_annotation(category: int, region: np.ndarray) -> dict[str, Any]:
    rows, columns = np.flatnonzero(region.any(axis=1)), np.flatnonzero(region.any(axis=0))
    left, top = int(columns[0]), int(rows[0])
    flat = region.ravel(order="F")
    changes = np.flatnonzero(np.diff(flat, prepend=False))  # runs start with the background
    counts = np.diff(changes, prepend=0, append=flat.size)
    return {
        "category_id": category + 1,
        "bbox": [left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top],
        "area": int(region.sum()),
        "iscrowd": 1,
        "segmentation": {"counts": counts.tolist(), "size": list(region.shape)},
    }


def _object_size(settings: Settings, rng: Rng, side: int) -> float:
    kind = rng.random()
    if kind < settings.small_share:
        position = rng.uniform(0, 0.2)
    elif kind < settings.small_share + settings.large_share:
        position = rng.uniform(0.95, 1)
    else:
        position = rng.random()
    low, high = settings.scales
    return max(LEAST_SIDE, side * low * (high / low) ** position)


def draw_image(settings: Settings, split: str, index: int) -> tuple[np.ndarray, list[dict]]:
    """Picture (H, W, 3) uint8 and annotations (without ids) of one image of a split."""
    rng = np.random.default_rng([settings.seed, SPLITS.index(split), index])
    scene = Scene(settings, rng)
    clutter = int(rng.integers(settings.clutter + 1))
    for _ in range(clutter - clutter // 3):
        scene.clutter()
    if rng.random() >= settings.empty_share:
        if rng.random() < settings.crowd_share:
            scene.crowd()
        count = int(rng.integers(settings.min_objects, settings.max_objects + 1))
        side = min(scene.height, scene.width)
        sizes = np.array([_object_size(settings, rng, side) for _ in range(count)])
        # Large ones mostly first: drawn last they would hide the small ones.
        for longest in sizes[np.argsort(-sizes * np.exp(rng.normal(0, 0.5, count)))]:
            scene.object(float(longest))
    for _ in range(clutter // 3):
        scene.clutter()
    return scene.finish(), scene.annotations
