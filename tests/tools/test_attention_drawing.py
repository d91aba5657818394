"""What pictures of attention show, and where on the sheet."""

from dataclasses import replace

import numpy as np
import torch
from matplotlib.colors import to_rgb
from tiny_views import made_view

from tools import attention_drawing as drawing
from tools.attention_views import Cells


def entry(view, query=0, size=(20, 30)):
    grey = np.full((*size, 3), 100, dtype=np.uint8)
    grey[0, 0], grey[-1, -1] = 0, 255
    return drawing.Entry(grey, "a.png", "cat 0.90", view, query)


def box_of(rectangle):
    x, y = rectangle.get_xy()
    return x, y, x + rectangle.get_width(), y + rectangle.get_height()


def heat_view():
    cells = Cells((20, 30), ((4, 6),), ((4, 6),), ((5.0, 5.0),))
    cross = torch.full((3, 2, 24), 0.001)
    cross[0, 0, 8], cross[2, 0, 23] = 0.6, 0.4  # cells (1, 2) and (3, 5)
    return made_view(cells, cross=cross)


def test_a_panel_is_brightest_at_the_highest_weight():
    figure = drawing.draw([entry(heat_view())], [0, 2], among_queries=False)
    detection, first, second, _ = figure.axes
    for axes, (row, column), text in ((first, (1, 2), "max 0.6"), (second, (3, 5), "max 0.4")):
        pixels = axes.images[0].get_array()
        brightest = divmod(int(pixels.sum(-1).argmax()), 30)
        assert (brightest[0] // 5, brightest[1] // 5) == (row, column)
        np.testing.assert_allclose(
            pixels[brightest], drawing.HEAT(1.0)[:3], atol=1e-6
        )  # its colour is the bar's upper end
        assert [note.get_text() for note in axes.texts] == [text]
        assert axes.images[0].get_extent() == [0, 30, 20, 0]
        assert [box_of(patch) for patch in axes.patches] == [(2, 3, 12, 9)]
    assert detection.get_title() == "a.png\ncat 0.90"
    assert (detection.images[0].get_array() == entry(heat_view()).picture).all()
    words = [text.get_text() for text in figure.texts]
    assert words == ["attention", "head 0", "head 2"]


def test_no_weight_leaves_the_grey_image():
    backdrop = np.full((2, 2, 3), 0.3)
    blended = drawing.blend(backdrop, np.array([[0.0, 1.0], [0.0, 0.5]]))
    assert (blended[:, 0] == 0.3).all()
    np.testing.assert_allclose(blended[0, 1], drawing.HEAT(1.0)[:3])


def test_gaussians_have_a_row_and_their_centres_a_cross():
    cells = Cells((20, 30), ((4, 6),), ((4, 6),), ((5.0, 5.0),))
    y, x = np.mgrid[:4, :6].astype(np.float32)
    prior = torch.from_numpy(-((x - 2.5) ** 2 + (y - 1) ** 2)).view(1, 1, -1).repeat(3, 2, 1)
    view = replace(heat_view(), cells=cells, gaussian=prior)
    figure = drawing.draw([entry(view)], [1], among_queries=False)
    assert [text.get_text() for text in figure.texts] == ["attention", "head 1", "Gaussian"]
    (cross,) = figure.axes[2].lines
    np.testing.assert_allclose(cross.get_xydata(), [[15, 7.5]], atol=1e-3)


def test_dots_show_level_and_weight():
    points = torch.tensor([[3.0, 4.0], [6.0, 7.0], [1.0, 2.0], [9.0, 9.0]]).view(1, 1, 2, 2, 2)
    weights = torch.tensor([0.4, 0.2, 0.1, 0.3]).view(1, 1, 2, 2)
    cells = heat_view().cells
    view = made_view(cells, points=points, weights=weights)
    figure = drawing.draw([entry(view)], None, among_queries=False)
    (dots,) = figure.axes[1].collections
    assert dots.get_offsets().tolist() == [[1, 2], [6, 7], [9, 9], [3, 4]]  # the heaviest on top
    fine, coarse = 10, 20
    assert dots.get_sizes().tolist() == [coarse, fine, coarse, fine]
    np.testing.assert_allclose(
        dots.get_facecolors(), drawing.HEAT([0.25, 0.5, 0.75, 1.0]), atol=0.01
    )


def test_other_queries_are_boxes_as_wide_as_their_weight():
    figure = drawing.draw([entry(heat_view())], [0], among_queries=True)
    own, other, marked = figure.axes[2].patches
    assert box_of(own) == box_of(marked) == (2, 3, 12, 9)
    assert box_of(other) == (0, 0, 5, 5)
    assert other.get_linewidth() > own.get_linewidth()
    assert (own.get_linestyle(), other.get_linestyle()) == ("--", "-")
    assert to_rgb(marked.get_edgecolor()) == drawing.MARK


def test_few_of_many_queries_are_drawn():
    view = heat_view()
    view = replace(view, among=torch.rand(3, 40, 40), boxes=view.boxes.repeat(20, 1))
    figure = drawing.draw([entry(view)], [0], among_queries=True)
    assert len(figure.axes[2].patches) == drawing.STRONGEST + 1


def test_blocks_of_different_kinds_and_sizes_share_a_sheet(tmp_path):
    tall = replace(heat_view(), cells=Cells((30, 1), ((6, 1),), ((6, 1),), ((5.0, 1.0),)))
    tall = replace(tall, cross=torch.rand(3, 2, 6))
    entries = [entry(heat_view()), entry(tall, query=1, size=(30, 1))]
    figure = drawing.draw(entries, None, among_queries=False)
    assert len(figure.axes) == 2 * 4 + 1
    figure.savefig(tmp_path / "sheet.png")
    boxes = [axes.get_position() for axes in figure.axes]
    assert all(0 <= box.x0 < box.x1 <= 1 and 0 <= box.y0 < box.y1 <= 1 for box in boxes)
    for i, a in enumerate(boxes):  # nothing lies on anything else
        for b in boxes[:i]:
            assert a.x1 <= b.x0 or b.x1 <= a.x0 or a.y1 <= b.y0 or b.y1 <= a.y0


def test_long_names_are_shortened():
    view = heat_view()
    long = replace(entry(view), title="x" * 50 + "end.png")
    figure = drawing.draw([long], [0], among_queries=False)
    title = figure.axes[0].get_title().split("\n")[0]
    assert title.startswith("…")
    assert title.endswith("end.png")
    assert len(title) < 30
