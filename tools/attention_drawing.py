"""Figures of what queries attend to: a detection beside its heads, as papers show them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import AbstractPathEffect, withStroke
from torch import Tensor

from tools.attention_views import View

HEAT = matplotlib.colormaps["inferno"]
MARK = (0.3, 0.85, 1.0)
"""Colour of the detection and of centres, which is none of the map's."""
EDGE: list[AbstractPathEffect] = [withStroke(linewidth=1.6, foreground="black")]
"""What keeps a mark or text legible on any colour."""
DIMMED = 0.45
"""Brightness that is left of an image under what is drawn on it."""
PANEL, GAP, MARGIN = 1.45, 0.06, 0.12
"""Width of a head's panel, between panels and around all, in inches."""
HEAD, SIDE, BAR = 0.42, 0.2, 0.75
"""For the titles over a block, the label beside a row and the colour bar, in inches."""
STRONGEST = 12
"""Queries drawn of those that one attends to."""


@dataclass(frozen=True)
class Entry:
    """One query of one image.

    Attributes:
        picture: RGB (h, w, 3), uint8, as the detector has seen it.
        title: what the image is.
        caption: what the query has found.
        view: what the queries of the image attend to.
        query: index of this one.
    """

    picture: np.ndarray
    title: str
    caption: str
    view: View
    query: int


@dataclass(frozen=True)
class Row:
    """Panels of one kind: ``paint`` draws a head's."""

    label: str
    heads: Sequence[int]
    paint: Callable[[Axes, int], None]


def draw(entries: Sequence[Entry], heads: Sequence[int] | None, among_queries: bool) -> Figure:
    """Draw a block of every entry: the detection, and beside it one to three rows of heads.

    Args:
        entries: at least one.
        heads: the heads drawn; None for all.
        among_queries: also draw which other queries each of them attends to.
    """
    blocks = [list(_rows(entry, heads, among_queries)) for entry in entries]
    columns = max(len(row.heads) for rows in blocks for row in rows)
    lead = PANEL * max(len(rows) for rows in blocks)
    sizes = [PANEL * np.clip(_ratio(entry), 0.35, 1.6) for entry in entries]
    heights = [HEAD + len(rows) * (size + GAP) for rows, size in zip(blocks, sizes, strict=True)]
    right = MARGIN + lead + SIDE + columns * (PANEL + GAP)
    sheet = _Sheet(right + BAR, sum(heights) + 2 * MARGIN)
    top = MARGIN
    for entry, rows, size, height in zip(entries, blocks, sizes, heights, strict=True):
        axes = sheet.place(MARGIN, top + HEAD, lead, height - HEAD - GAP)
        _detection(axes, entry, lead)
        _draw_rows(sheet, entry, rows, (MARGIN + lead + SIDE, top + HEAD), size)
        top += height
    _draw_bar(sheet, right + 0.1, MARGIN + HEAD, heights[0] - HEAD - GAP)
    return sheet.figure


def _draw_rows(
    sheet: _Sheet, entry: Entry, rows: list[Row], corner: tuple[float, float], size: float
) -> None:
    """Draw the panels of a block, ``size`` inches high, from their upper left corner on."""
    left, top = corner
    named = 0
    for row in rows:
        sheet.write(left - SIDE / 2, top + size / 2, row.label, rotation=90)
        for column, head in enumerate(row.heads):
            x = left + column * (PANEL + GAP)
            axes = sheet.place(x, top, PANEL, size)
            row.paint(axes, head)
            outline(axes, entry.view.boxes[entry.query], MARK, 0.9)
            if column >= named:  # the rows may have different numbers of heads
                sheet.write(x + PANEL / 2, top - 0.09, f"head {head}")
        named = max(named, len(row.heads))
        top += size + GAP


class _Sheet:
    """A white figure on which things lie at inches from the left and the top."""

    def __init__(self, width: float, height: float):
        self.width, self.height = width, height
        self.figure = Figure(figsize=(width, height))

    def place(self, left: float, top: float, width: float, height: float) -> Axes:
        """Add axes without frame."""
        bottom = 1 - (top + height) / self.height
        shares = (left / self.width, bottom, width / self.width, height / self.height)
        axes = self.figure.add_axes(shares)
        axes.set_axis_off()
        return axes

    def write(self, x: float, y: float, text: str, rotation: float = 0) -> None:
        """Write a line centred at a place."""
        place = (x / self.width, 1 - y / self.height)
        self.figure.text(*place, text, ha="center", va="center", fontsize=8, rotation=rotation)


def _ratio(entry: Entry) -> float:
    return entry.picture.shape[0] / entry.picture.shape[1]


def _rows(entry: Entry, heads: Sequence[int] | None, among_queries: bool) -> Iterator[Row]:
    """The kinds of attention that there are to draw."""
    view, query = entry.view, entry.query
    chosen = range(view.num_heads) if heads is None else heads
    if view.points is not None and view.weights is not None:
        yield Row(
            "samples", chosen, partial(_points, entry, view.points[query], view.weights[query])
        )
    else:
        yield Row("attention", chosen, partial(_heat, entry, view.attention(query)))
    if view.gaussian is not None:
        gaussians = view.prior(query), view.centers(query)
        yield Row("Gaussian", chosen, partial(_gaussian, entry, *gaussians))
    if among_queries:
        among = view.among[:, query]
        chosen = range(len(among)) if heads is None else heads
        yield Row("self-attention", chosen, partial(_queries, entry, among))


# --- what a panel shows -------------------------------------------------------------------------


def _detection(axes: Axes, entry: Entry, width: float) -> None:
    """The image, ``width`` inches wide, and what the query has found."""
    show(axes, entry.picture)
    outline(axes, entry.view.boxes[entry.query], MARK, 1.6).set_path_effects(EDGE)
    most = int(width * 16)  # letters
    title = entry.title if len(entry.title) <= most else f"…{entry.title[1 - most :]}"
    axes.set_title(f"{title}\n{entry.caption}", fontsize=8, pad=3)


def show(axes: Axes, picture: np.ndarray) -> None:
    """Draw a picture whose pixels are the axes' units, and nothing beyond it."""
    height, width = picture.shape[:2]
    axes.imshow(picture, extent=(0, width, height, 0), interpolation="nearest")
    axes.set(xlim=(0, width), ylim=(height, 0))


def backdrop_of(picture: np.ndarray) -> np.ndarray:
    """The image in dim grey of full contrast, (h, w, 3) in [0, 1]."""
    grey = picture @ np.array([0.299, 0.587, 0.114])
    grey = (grey - grey.min()) / max(np.ptp(grey), 1) * DIMMED
    return np.repeat(grey[..., None], 3, axis=-1)


def blend(backdrop: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Colour a backdrop (..., 3) by shares (...) in [0, 1]; where they are 0 it stays as it is."""
    opacity = np.sqrt(shares)[..., None]
    return backdrop * (1 - opacity) + HEAT(shares)[..., :3] * opacity


def shares_of(weights: Tensor) -> np.ndarray:
    """Weights as shares of the highest."""
    return (weights / weights.max().clamp(min=1e-12)).clamp(0, 1).double().cpu().numpy()


def _heat(entry: Entry, weights: Tensor, axes: Axes, head: int) -> None:
    """Weights (H, h, w) over the image."""
    show(axes, blend(backdrop_of(entry.picture), shares_of(weights[head])))
    _note(axes, weights[head])


def _gaussian(entry: Entry, prior: Tensor, centers: Tensor, axes: Axes, head: int) -> None:
    """Gaussians (H, h, w) and their centres (H, V, 2), the larger the coarser the level."""
    show(axes, blend(backdrop_of(entry.picture), shares_of(prior[head])))
    for level, (x, y) in enumerate(centers[head].tolist()):
        axes.plot(x, y, "+", color=MARK, markersize=6 + 2 * level, path_effects=EDGE)


def _points(entry: Entry, points: Tensor, weights: Tensor, axes: Axes, head: int) -> None:
    """Places (H, V, P, 2) as dots, the larger the coarser the level, the heaviest on top."""
    show(axes, backdrop_of(entry.picture))
    levels = np.arange(weights.shape[1]).repeat(weights.shape[2])
    shares = shares_of(weights[head]).flatten()
    order = shares.argsort(kind="stable")
    x, y = points[head].double().cpu().flatten(0, 1).numpy()[order].T
    sizes, colours = 10.0 + 10 * levels[order], HEAT(shares[order])
    axes.scatter(x, y, s=sizes, c=colours, edgecolors="grey", linewidths=0.5)
    _note(axes, weights[head])


def _queries(entry: Entry, weights: Tensor, axes: Axes, head: int) -> None:
    """Boxes of the queries of the highest weights (H, N), the higher the wider; its own dashed."""
    show(axes, backdrop_of(entry.picture))
    shares = shares_of(weights[head])
    for query in shares.argsort()[-STRONGEST:]:
        share = shares[query]
        style = "--" if query == entry.query else "-"
        colour = (*HEAT(share)[:3], share)
        outline(axes, entry.view.boxes[query], colour, 0.3 + 2.5 * share, linestyle=style)
    _note(axes, weights[head])


def outline(
    axes: Axes, box: Tensor, colour: tuple | str, width: float, linestyle: str = "-"
) -> Rectangle:
    """Draw a box (x0, y0, x1, y1) in pixels."""
    left, top, right, bottom = box.tolist()
    rectangle = Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=colour)
    rectangle.set(linewidth=width, linestyle=linestyle)
    axes.add_patch(rectangle)
    return rectangle


def _note(axes: Axes, weights: Tensor) -> None:
    """Write the highest weight into the lower right corner."""
    axes.text(
        0.97, 0.04, f"max {float(weights.max()):.2g}", transform=axes.transAxes, color="white",
        path_effects=EDGE, fontsize=6.5, ha="right", va="bottom",
    )  # fmt: skip


def _draw_bar(sheet: _Sheet, left: float, top: float, height: float) -> None:
    axes = sheet.place(left, top, 0.1, height)
    shares = np.linspace(0, 1, 256)[:, None]
    backdrop = np.full((256, 1, 3), DIMMED / 2)
    axes.imshow(blend(backdrop, shares), aspect="auto", origin="lower", extent=(0, 1, 0, 1))
    axes.set_axis_on()
    axes.set_xticks([])
    axes.yaxis.tick_right()
    axes.tick_params(labelsize=7)
    axes.set_ylabel("share of the maximum", fontsize=7)
    axes.yaxis.set_label_position("right")
