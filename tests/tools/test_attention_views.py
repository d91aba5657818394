"""Where weights, samples and Gaussians lie in the image."""

import math

import numpy as np
import pytest
import tiny_adamixer
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_dab import tiny_detector
from tiny_deformable import SETTINGS as DEFORMABLE
from tiny_deformable import PyramidBackbone, build_deformable
from tiny_detectors import pattern_image
from tiny_views import images, made_view

from detectors.adamixer_layer import Pyramid
from engine.errors import UserError
from tools.attention_views import Cells, look


def tiny_deformable():
    torch.manual_seed(0)
    model = build_deformable(DEFORMABLE, {}, refine=True)
    model.backbone = PyramidBackbone()
    for layer in model.transformer.decoder.layers:
        torch.nn.init.normal_(layer.attentions[1].sampling_offsets.weight, std=0.3)
    return model


@settings(max_examples=25, deadline=None)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.integers(1, 3),
    st.integers(0, 2),
    st.integers(0, 2**32 - 1),
)
def test_pictures_hold_all_the_weight(size, num_levels, padding, seed):
    """Levels with cells of 3, 6 and 12 pixels become one picture that sums to one finest cell."""
    height, width = 12 * size[0], 12 * size[1]
    sides = [3 * 2**level for level in range(num_levels)]
    unpadded = [(height // side, width // side) for side in sides]
    padded = [(h + padding, w + 2 * padding) for h, w in unpadded]
    torch.manual_seed(seed)
    maps = []
    for (h, w), whole in zip(unpadded, padded, strict=True):
        weights = torch.zeros(2, 1, *whole, dtype=torch.float64)
        weights[..., :h, :w] = torch.rand(2, 1, h, w)
        maps.append(weights.flatten(2))
    cross = torch.cat(maps, dim=-1)
    cells = Cells((height, width), tuple(padded), tuple(unpadded), tuple((s, s) for s in sides))
    picture = made_view(cells, cross=cross / cross.sum(-1, keepdim=True)).attention(0)
    assert picture.shape == (2, height, width)
    torch.testing.assert_close(picture.sum((1, 2)) / 9, torch.ones(2, dtype=torch.float64))


def test_a_cell_is_drawn_at_its_centre():
    cells = Cells((10, 15), ((3, 4),), ((2, 3),), ((5.0, 5.0),))
    cross = torch.rand(1, 1, 12)
    picture = made_view(cells, cross=cross).attention(0)
    expected = cross.view(3, 4)[:2, :3]
    torch.testing.assert_close(picture[0, 2::5, 2::5], expected)
    between = (expected[0, 0] * 3 + expected[0, 1] * 2) / 5  # two pixels from one, three from next
    torch.testing.assert_close(picture[0, 2, 4], between)


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(st.integers(3, 12), st.integers(3, 12)),
    st.tuples(st.floats(-6, 18), st.floats(-6, 18)),
    st.tuples(st.floats(0.05, 3), st.floats(0.05, 3)),
)
def test_centres_are_those_of_the_formula(size, center, scale):
    y, x = np.mgrid[: size[0], : size[1]].astype(np.float32)
    prior = -((scale[0] * (x - center[0])) ** 2 + (scale[1] * (y - center[1])) ** 2) / 8
    cells = Cells((size[0] * 16, size[1] * 16), (size,), (size,), ((16.0, 16.0),))
    gaussian = torch.from_numpy(prior.reshape(1, 1, -1))
    view = made_view(cells, gaussian=gaussian)
    found = view.centers(0)[0, 0] / 16 - 0.5
    # three neighbours of float32 precision, whose curvature may be small beside their values
    largest = float(abs(prior).max()) + 1e-3
    error = [largest * 1e-6 / (s * s / 8) + 1e-3 for s in scale]
    assert abs(float(found[0]) - center[0]) < error[0]
    assert abs(float(found[1]) - center[1]) < error[1]
    highest = view.prior(0)[0].argmax()
    row, column = divmod(int(highest), size[1] * 16)
    expected = [min(max(round(c), 0), n - 1) for c, n in zip(center, size[::-1], strict=True)]
    assert abs(column / 16 - 0.5 - expected[0]) <= 1
    assert abs(row / 16 - 0.5 - expected[1]) <= 1


@pytest.mark.parametrize("values", [[[0.0]], [[-1.0, 0.0]], [[-math.inf, 0.0, -math.inf]]])
def test_a_centre_without_neighbours_is_the_highest_cell(values):
    level = torch.tensor(values)
    size = tuple(level.shape)
    cells = Cells(size, (size,), (size,), ((1.0, 1.0),))
    view = made_view(cells, gaussian=level.view(1, 1, -1))
    assert view.centers(0).tolist() == [[[int(level.argmax()) + 0.5, 0.5]]]


def test_one_view_whatever_the_batch():
    """Padding changes nothing, neither weights nor where they are drawn."""
    model = tiny_detector().eval()
    for size, view in zip(
        [(64, 96), (96, 80)], look(model, images((64, 96), (96, 80))), strict=True
    ):
        index = int(size == (96, 80))
        (alone,) = look(model, [{"image": pattern_image(index, *size)}])
        assert view.cells.size == size
        assert view.cells.sides == alone.cells.sides == ((16.0, 16.0),)
        for query in (0, 5):
            torch.testing.assert_close(
                view.attention(query), alone.attention(query), rtol=1e-4, atol=1e-5
            )
        torch.testing.assert_close(view.boxes, alone.boxes, rtol=1e-4, atol=1e-2)


def test_unmasked_padding_is_cut_off():
    model = tiny_detector(mask_padding_at_inference=False).eval()
    first, second = look(model, images((64, 96), (96, 80)))
    assert first.cells.unpadded == first.cells.padded == ((6, 6),)
    assert first.attention(0).shape == (4, 64, 96)
    assert second.attention(0).shape == (4, 96, 80)
    whole = first.cross[:, 0].sum(-1)
    assert (first.attention(0).sum((1, 2)) / 256 < whole - 0.05).all()


def test_deformable_samples_are_where_the_references_say():
    """Without offsets every sample lies on its reference point, in pixels of the image."""
    model = tiny_deformable().eval()
    for layer in model.transformer.decoder.layers:
        for parameter in layer.attentions[1].sampling_offsets.parameters():
            torch.nn.init.zeros_(parameter)
    sizes = [(64, 96), (128, 80)]
    views = look(model, images(*sizes), layer=0)
    position = model.query_embedding.weight[:, : DEFORMABLE["embed_dim"]]
    for (height, width), view in zip(sizes, views, strict=True):
        points = model.transformer.reference_points(position).sigmoid()
        expected = points * torch.tensor([width, height])
        torch.testing.assert_close(
            view.points, expected[:, None, None, None].expand_as(view.points), rtol=1e-5, atol=1e-3
        )
        torch.testing.assert_close(
            view.weights.sum((2, 3)), torch.ones_like(view.weights[..., 0, 0])
        )


def test_adamixer_samples_are_in_pixels(monkeypatch):
    """They are the points that the layer asks its pyramid for, whatever the padding."""
    model = tiny_adamixer.build_adamixer().eval()
    asked = []
    sample = Pyramid.sample

    def recorded(self, points, sampling=None):
        asked.append(points)
        return sample(self, points, sampling)

    monkeypatch.setattr(Pyramid, "sample", recorded)
    views = look(model, images((96, 100), (50, 70)))
    for row, view in enumerate(views):
        points = asked[-1][row, ..., None, :, :2].expand_as(view.points)
        torch.testing.assert_close(view.points, points, rtol=1e-4, atol=1e-2)


def test_a_detector_that_says_nothing(monkeypatch):
    model = tiny_detector().eval()
    decode = model.decode
    monkeypatch.setattr(model, "decode", lambda memory, queries, attention: decode(memory, queries))
    with pytest.raises(UserError, match="DABDecoder of DABDETR collects no attention maps"):
        look(model, images((32, 32)))


def test_layers_do_not_count_from_the_end():
    with pytest.raises(UserError, match="there is no layer -1: the decoder has 0 to 1"):
        look(tiny_detector().eval(), images((32, 32)), layer=-1)
