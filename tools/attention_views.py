"""What the queries of a detector attend to, in pixels of the image that the detector has seen.

Several feature maps become one picture: weights per area, added up. A weight of the picture is that
of a cell of the finest map, so with one map it is the attention weight itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from detectron2.structures import ImageList
from detrex.layers import box_cxcywh_to_xyxy
from torch import Tensor

from detectors.detector import Detector
from detectors.structures import AttentionMaps, Memory
from engine.errors import UserError

Size = tuple[int, int]


@dataclass(frozen=True)
class Cells:
    """The cells of one image that are not padding.

    Attributes:
        size: (h, w) of the image in pixels.
        padded: (h, w) of every level, padding included.
        unpadded: (h, w) of every level without.
        sides: (h, w) in pixels of a cell of every level.
    """

    size: Size
    padded: tuple[Size, ...]
    unpadded: tuple[Size, ...]
    sides: tuple[tuple[float, float], ...]

    def maps(self, tokens: Tensor) -> list[Tensor]:
        """Split what belongs to tokens (..., S) into levels (..., h, w) without padding."""
        parts = tokens.split([height * width for height, width in self.padded], dim=-1)
        return [
            part.unflatten(-1, whole)[..., :height, :width]
            for part, whole, (height, width) in zip(parts, self.padded, self.unpadded, strict=True)
        ]

    def pictures(self, levels: list[Tensor]) -> Tensor:
        """Enlarge levels (H, h, w) to the image's pixels, (V, H, h, w), linearly between cells."""
        pictures = []
        for level, sides in zip(levels, self.sides, strict=True):
            covered = [
                round(count * side) for count, side in zip(level.shape[-2:], sides, strict=True)
            ]
            pixels = F.interpolate(level[None], covered, mode="bilinear", align_corners=False)[0]
            pictures.append(pixels[:, : self.size[0], : self.size[1]])
        return torch.stack(pictures)

    def sides_xy(self, like: Tensor) -> Tensor:
        """``sides`` as (x, y), (V, 2)."""
        return like.new_tensor(self.sides).flip(-1)

    def to_pixels(self, locations: Tensor) -> Tensor:
        """Places (..., V, P, 2) as (x, y) in [0, 1] within padded levels, in pixels."""
        counts = locations.new_tensor(self.padded).flip(-1)
        return locations * (counts * self.sides_xy(locations))[:, None]


@dataclass(frozen=True)
class View:
    """What the queries of one image attend to in one decoder layer, and what they find in the end.

    Attributes:
        cells: where the levels' cells lie.
        scores: (N,) of each query's best class, after the last layer.
        classes: (N,) that class.
        boxes: (N, 4) as (x0, y0, x1, y1) in pixels.
        among: (H, N, N) attention of queries to queries.
        cross: (H, N, S) attention to the memory; None if it is sampled.
        gaussian: (H, N, S) log priors where Gaussians modulate the cross-attention.
        points: (N, H, V, P, 2) sampled places as (x, y) in pixels; None if nothing is sampled.
        weights: (N, H, V, P) their weights.
    """

    cells: Cells
    scores: Tensor
    classes: Tensor
    boxes: Tensor
    among: Tensor
    cross: Tensor | None = None
    gaussian: Tensor | None = None
    points: Tensor | None = None
    weights: Tensor | None = None

    @property
    def num_heads(self) -> int:
        """H of the cross-attention."""
        if self.cross is not None:
            return self.cross.shape[0]
        assert self.weights is not None  # one of both is there
        return self.weights.shape[1]

    def best_queries(self, count: int) -> list[int]:
        """The queries with the highest scores, the best first."""
        return self.scores.argsort(descending=True, stable=True)[:count].tolist()

    def attention(self, query: int) -> Tensor:
        """Weights of the cross-attention (H, h, w) at every pixel of the image."""
        assert self.cross is not None
        areas = [height * width for height, width in self.cells.sides]
        levels = self.cells.maps(self.cross[:, query])
        finest = [level * (areas[0] / area) for level, area in zip(levels, areas, strict=True)]
        return self.cells.pictures(finest).sum(0)

    def prior(self, query: int) -> Tensor:
        """Gaussians (H, h, w) at every pixel, each level's highest cell 1, averaged over levels."""
        assert self.gaussian is not None
        levels = self.cells.maps(self.gaussian[:, query])
        gaussians = [(level - level.amax((-2, -1), keepdim=True)).exp() for level in levels]
        return self.cells.pictures(gaussians).mean(0)

    def centers(self, query: int) -> Tensor:
        """Centres of the Gaussians (H, V, 2) as (x, y) in pixels, wherever they lie."""
        assert self.gaussian is not None
        levels = self.cells.maps(self.gaussian[:, query].double())
        places = torch.stack(
            [torch.stack([_vertex(head) for head in level]) for level in levels], 1
        )
        return (places + 0.5) * self.cells.sides_xy(places)


def _vertex(level: Tensor) -> Tensor:
    """Where a log prior (h, w) is highest, (2,) as (x, y) in cells; it may lie between or outside.

    A Gaussian's logarithm is a parabola along either axis, so three cells say where its vertex is.
    """
    row, column = divmod(int(level.argmax()), level.shape[-1])
    return torch.stack(
        [_parabola_vertex(level[row], column), _parabola_vertex(level[:, column], row)]
    )


def _parabola_vertex(values: Tensor, highest: int) -> Tensor:
    """Vertex of the parabola through three neighbours among values (n,), one of them the highest.

    Where there are no three, or they are on a line, it is the highest one.
    """
    middle = min(max(highest, 1), len(values) - 2)
    if middle >= 1:
        before, here, after = values[middle - 1 : middle + 2].unbind()
        curvature = before - 2 * here + after
        if curvature.isfinite() and curvature < 0:
            return middle + (before - after) / (2 * curvature)
    return values.new_tensor(float(highest))


@torch.no_grad()
def look(detector: Detector, inputs: list[dict], layer: int | None = None) -> list[View]:
    """Run a detector in evaluation mode and keep what one decoder layer has attended to.

    Args:
        detector: any that collects attention maps or sampling locations.
        inputs: images as the detector's ``forward`` takes them.
        layer: index of the decoder layer; None for the last one.

    Returns:
        A view of every image, of the student's branch.

    Raises:
        UserError: the decoder says nothing about its cross-attention, or has no such layer.
    """
    attention = AttentionMaps()
    images = detector.preprocess(inputs)
    memory = detector.encode(detector.extract(images))
    output = detector.decode(memory, detector.queries(memory), attention)
    found = detector.predict(output).of_branch(0)
    layers = len(attention.cross_attention or attention.sampling)
    if not layers:
        decoder = type(detector.transformer.decoder).__name__
        raise UserError(f"{decoder} of {type(detector).__name__} collects no attention maps")
    layer = layers - 1 if layer is None else layer
    if not 0 <= layer < layers:
        raise UserError(f"there is no layer {layer}: the decoder has 0 to {layers - 1}")
    scores, classes = best_classes(detector, found.logits[-1], found.boxes[-1])
    views = []
    for row, cells in enumerate(cells_of(detector, images, memory)):
        height, width = cells.size
        boxes = box_cxcywh_to_xyxy(found.boxes[-1, row])
        view = View(
            cells,
            scores[row],
            classes[row],
            boxes * boxes.new_tensor([width, height, width, height]),
            attention.self_attention[layer][row],
        )
        if attention.cross_attention:
            view = replace(view, cross=attention.cross_attention[layer][row])
        else:
            locations, weights = (part[row] for part in attention.sampling[layer])
            view = replace(view, points=cells.to_pixels(locations), weights=weights)
        if attention.gaussian:
            view = replace(view, gaussian=attention.gaussian[layer][row])
        views.append(view)
    return views


def best_classes(detector: Detector, logits: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Scores and classes (B, N): what the detector would select of each query alone."""
    scores, classes, _ = detector.select(
        logits.flatten(0, 1)[:, None], boxes.flatten(0, 1)[:, None]
    )
    shape = logits.shape[:2]
    return scores[:, 0].unflatten(0, shape), classes[:, 0].unflatten(0, shape)


def cells_of(detector: Detector, images: ImageList, memory: Memory) -> Iterator[Cells]:
    """The cells of every image.

    Some decoders know how many pixels a cell has. To the others, the cells that are not padding
    are the image, whether or not their number divides it.
    """
    strides: Sequence[int] | None = getattr(detector.transformer.decoder, "strides", None)
    batch = images.tensor.shape[-2:]
    for size, levels in zip(images.image_sizes, memory.grid.unpadded_sizes.tolist(), strict=True):
        unpadded = tuple((int(height), int(width)) for width, height in levels)
        covered = batch if memory.padding_mask is None else size
        if strides is None:
            sides = tuple((covered[0] / height, covered[1] / width) for height, width in unpadded)
        else:
            sides = tuple((float(stride), float(stride)) for stride in strides)
        yield Cells((int(size[0]), int(size[1])), memory.spatial_shapes, unpadded, sides)
