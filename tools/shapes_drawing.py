"""Drawing for the generated shapes data set: outlines, anti-aliased coverage, textures, clutter.

Points are ``(x, y)`` arrays in pixels, pixel ``(i, j)`` covering ``[j, j + 1) x [i, i + 1)``; sizes
are ``(height, width)``. Everything random takes the generator it draws from.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

Rng = np.random.Generator


# --- outlines: one closed polygon each, in a square of half-width one ---------------------------


def _arc(start: float, stop: float, count: int, radius: float = 1.0) -> np.ndarray:
    angles = np.radians(np.linspace(start, stop, count))
    return radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _regular(corners: int) -> np.ndarray:
    return _arc(-90, 270, corners + 1)[:-1]


def _star() -> np.ndarray:
    points = _regular(10)
    points[1::2] *= 0.42
    return points


def _ring() -> np.ndarray:
    # The hole is reached over a slit, so that one polygon describes the shape.
    return np.concatenate([_arc(0, 360, 41), _arc(360, 0, 41, radius=0.55)])


def _cross() -> np.ndarray:
    a = 0.3
    corner = np.array([(a, -1), (a, -a), (1, -a)])
    quarter_turn = np.array([(0, 1), (-1, 0)])
    return np.concatenate([corner @ np.linalg.matrix_power(quarter_turn, k) for k in range(4)])


def _crescent() -> np.ndarray:
    inner = _arc(-50, 50, 25)
    inner[:, 0] = 2 * inner[0, 0] - inner[:, 0]  # the small cap of the circle folded inwards
    inner[:, 0] -= 0.25 * (1 - (inner[:, 1] / inner[0, 1]) ** 2)
    return np.concatenate([_arc(50, 310, 40), inner])


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 49)[:-1]
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return np.stack([x, y], axis=1) / 16


_ARROW = [(1, 0), (0, -0.9), (0, -0.3), (-1, -0.3), (-1, 0.3), (0, 0.3), (0, 0.9)]
_HOURGLASS = [(-0.9, -1), (0.9, -1), (0.15, 0), (0.9, 1), (-0.9, 1), (-0.15, 0)]

# Easiest to tell apart first: fewer categories means a prefix of this table.
OUTLINES: dict[str, np.ndarray] = {
    "circle": _arc(0, 360, 49)[:-1],
    "rectangle": np.array([(-1.0, -1.0), (1, -1), (1, 1), (-1, 1)]),
    "triangle": _regular(3),
    "cross": _cross(),
    "ring": _ring(),
    "star": _star(),
    "crescent": _crescent(),
    "arrow": np.array(_ARROW, dtype=float),
    "heart": _heart(),
    "hourglass": np.array(_HOURGLASS, dtype=float),
    "half_disc": _arc(0, 180, 25),
    "hexagon": _regular(6),
}


def transform(outline: np.ndarray, longest: float, aspect: float, degrees: float) -> np.ndarray:
    """Stretch, turn and scale an outline to a box whose longer side is `longest`, centred at 0."""
    stretched = outline * np.array([np.sqrt(aspect), 1 / np.sqrt(aspect)])
    angle = np.radians(degrees)
    rotation = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    turned = stretched @ rotation
    low, high = turned.min(axis=0), turned.max(axis=0)
    return (turned - (low + high) / 2) * (longest / (high - low).max())


def polygon_area(points: np.ndarray) -> float:
    """Area enclosed by a polygon, in pixels."""
    x, y = points[:, 0], points[:, 1]
    return abs(float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))) / 2


def clip_polygon(points: np.ndarray, height: int, width: int) -> np.ndarray:
    """The part of a polygon inside the image; no points if there is none."""
    for axis, limit, sign in ((0, 0, 1), (0, width, -1), (1, 0, 1), (1, height, -1)):
        if len(points) == 0:
            break
        distance = sign * (points[:, axis] - limit)
        if (distance >= 0).all():
            continue
        kept: list[np.ndarray] = []
        for here, there, d, e in zip(
            points, np.roll(points, -1, axis=0), distance, np.roll(distance, -1), strict=True
        ):
            if d >= 0:
                kept.append(here)
            if (d >= 0) != (e >= 0):
                crossing = here + (there - here) * (d / (d - e))
                crossing[axis] = limit
                kept.append(crossing)
        points = np.array(kept).reshape(-1, 2)
    return points


# --- coverage -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """Coverage in [0, 1] of a part of the image, whose first pixel is ``(top, left)``."""

    coverage: np.ndarray
    top: int
    left: int

    @property
    def window(self) -> tuple[slice, slice]:
        """The image rows and columns that the layer occupies."""
        height, width = self.coverage.shape
        return slice(self.top, self.top + height), slice(self.left, self.left + width)

    @property
    def mask(self) -> np.ndarray:
        """Pixels covered by more than half."""
        return self.coverage > 0.5


def polygon_layer(points: np.ndarray, height: int, width: int) -> Layer:
    """Anti-aliased coverage of a filled polygon, cropped to the image."""
    return _rasterise(points, height, width, stroke=None)


def stroke_layer(points: np.ndarray, stroke: float, height: int, width: int) -> Layer:
    """Anti-aliased coverage of a line through the points, `stroke` pixels wide."""
    return _rasterise(points, height, width, stroke=stroke)


def _rasterise(points: np.ndarray, height: int, width: int, stroke: float | None) -> Layer:
    margin = (stroke or 0) / 2 + 1
    left, top = (int(v) for v in np.floor(points.min(axis=0) - margin).clip(0, (width, height)))
    right, bottom = (int(v) for v in np.ceil(points.max(axis=0) + margin).clip(0, (width, height)))
    if right <= left or bottom <= top:
        return Layer(np.zeros((0, 0), dtype=np.float32), 0, 0)
    # Pillow includes the edge's own pixels, which is felt in small shapes: there, finer ones.
    fine = int(np.clip(320 // max(right - left, bottom - top), 4, 12))
    canvas = Image.new("L", ((right - left) * fine, (bottom - top) * fine))
    # Pillow's coordinates are those of pixel centres.
    placed = ((points - (left, top)) * fine - 0.5).ravel().tolist()
    draw = ImageDraw.Draw(canvas)
    if stroke is None:
        draw.polygon(placed, fill=255)
    else:
        draw.line(placed, fill=255, width=max(1, round(stroke * fine)), joint="curve")
    small = canvas.reduce(fine)
    return Layer(np.asarray(small, dtype=np.float32) / 255, top, left)


def blend(pixels: np.ndarray, layer: Layer, paint: np.ndarray, opacity: float = 1.0) -> None:
    """Paint a layer's pixels (H, W, 3) onto the image, in place."""
    alpha = (opacity * layer.coverage)[..., None]
    pixels[layer.window] += alpha * (paint - pixels[layer.window])


# --- textures -----------------------------------------------------------------------------------


def _noise(rng: Rng, height: int, width: int, cell: float) -> np.ndarray:
    cells = (max(2, round(height / cell)), max(2, round(width / cell)))
    coarse = Image.fromarray(rng.random(cells, dtype=np.float32))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)) * 2 - 1


def _wave(rng: Rng, height: int, width: int, period: float) -> np.ndarray:
    angle, phase = rng.uniform(0, 2 * np.pi, 2)
    frequency = 2 * np.pi / period
    x = np.arange(width, dtype=np.float32) * np.float32(frequency * np.cos(angle))
    y = np.arange(height, dtype=np.float32) * np.float32(frequency * np.sin(angle) + 1e-6)
    return np.sin(x[None, :] + y[:, None] + np.float32(phase))


def _pattern(rng: Rng, height: int, width: int) -> np.ndarray:
    """One texture in about [-1, 1]: plain, gradient, stripes, checks, coarse or mixed noise."""
    side = min(height, width)
    kind = int(rng.integers(6))
    if kind == 0:
        return np.zeros((height, width), dtype=np.float32)
    if kind == 1:
        return _wave(rng, height, width, period=2.5 * max(height, width))
    if kind == 2:
        stripes = _wave(rng, height, width, period=rng.uniform(4, max(6.0, side / 3)))
        return (stripes * rng.uniform(1, 6)).clip(-1, 1)
    if kind == 3:
        cell = rng.uniform(3, max(5.0, side / 4))
        offset = rng.uniform(0, cell, 2)
        rows = ((np.arange(height) + offset[0]) // cell) % 2
        columns = ((np.arange(width) + offset[1]) // cell) % 2
        return np.where(rows[:, None] == columns[None, :], 1.0, -1.0).astype(np.float32)
    if kind == 4:
        return _noise(rng, height, width, cell=rng.uniform(side / 6, side / 2))
    cells = (2.0, 5.0, 12.0, 30.0)
    return sum((_noise(rng, height, width, cell) for cell in cells), np.float32(0)) / 2


def texture(rng: Rng, height: int, width: int, colour: np.ndarray, contrast: float) -> np.ndarray:
    """Paint (H, W, 3) around a colour, varying by about `contrast` grey levels."""
    direction = rng.uniform(-1, 1, 3)
    direction *= contrast * np.sqrt(3) / max(float(np.linalg.norm(direction)), 1e-6)
    pattern = _pattern(rng, height, width)
    return np.float32(colour) + pattern[..., None] * np.float32(direction)


def contrasting_colour(rng: Rng, behind: np.ndarray, distance: float) -> np.ndarray:
    """A random colour at least `distance` (RGB, Euclidean) from `behind`, or the best of ten."""
    candidates = rng.uniform(10, 245, (10, 3))
    distances = np.linalg.norm(candidates - behind, axis=1)
    far = np.flatnonzero(distances >= distance)
    return candidates[far[0] if len(far) else int(distances.argmax())]


# --- clutter: nothing that could be one of the categories ----------------------------------------


def clutter_layer(rng: Rng, height: int, width: int) -> Layer:
    """A random open stroke, or an irregular blob with several lobes."""
    side = min(height, width)
    centre = rng.uniform((0, 0), (width, height))
    if rng.random() < 0.65:
        steps = rng.normal(0, side * rng.uniform(0.05, 0.2), (int(rng.integers(2, 6)), 2))
        points = centre + np.cumsum(steps, axis=0)
        length = float(np.linalg.norm(steps[1:], axis=1).sum())
        # Thin, as a short thick line would be a rectangle.
        stroke = min(length / 12, side * rng.uniform(0.008, 0.025))
        return stroke_layer(points, stroke, height, width)
    angles = np.linspace(0, 2 * np.pi, 49)[:-1]
    radius = np.ones_like(angles)
    for harmonic in (2, 3, 5, 7):
        radius += rng.uniform(0.15, 0.4) * np.sin(harmonic * angles + rng.uniform(0, 2 * np.pi))
    radius = radius.clip(0.15) * side * rng.uniform(0.02, 0.1)
    outline = np.stack([np.cos(angles), np.sin(angles)], axis=1) * radius[:, None]
    return polygon_layer(centre + outline, height, width)
