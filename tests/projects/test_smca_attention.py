"""The modulated cross-attention against its formula, query by query."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from detectors.structures import AttentionMaps, Memory
from projects.smca.attention import Gaussians, ModulatedAttention, Modulation

SHAPES = ((5, 7), (3, 4), (2, 2))
STRIDES = (16, 32, 64)
FACTORS = (0.5, 1.0, 2.0)
ROWS, QUERIES, DIM, HEADS = 2, 3, 8, 2


def build(levels=3, dtype=torch.float64, seed=0, **options):
    """A modulation and an attention with random parameters, and their inputs."""
    torch.manual_seed(seed)
    modulation = Modulation(DIM, HEADS, STRIDES[:levels], FACTORS[:levels], **options).to(dtype)
    attention = ModulatedAttention(DIM, HEADS).to(dtype)
    for parameter in (*modulation.parameters(), *attention.parameters()):
        torch.nn.init.normal_(parameter, std=0.4)
    tokens = sum(h * w for h, w in SHAPES[:levels])
    padding = torch.zeros(ROWS, tokens, dtype=torch.bool)
    padding[1, 6:9] = True
    memory = Memory(
        torch.randn(ROWS, tokens, DIM, dtype=dtype),
        padding,
        torch.randn(ROWS, tokens, DIM, dtype=dtype),
        SHAPES[:levels],
        image_sizes=torch.tensor([[80.0, 112.0], [64.0, 90.0]], dtype=dtype),
    )
    content, position = torch.randn(2, ROWS, QUERIES, DIM, dtype=dtype)
    points = torch.rand(ROWS, QUERIES, 2, dtype=dtype) * memory.image_sizes.flip(-1)[:, None]
    return modulation, attention, content, position, memory, points


def scale_of(modulation, predicted, level, head):
    """s_x and s_y of a query's prediction."""
    if predicted is None:
        return 1.0, 1.0
    width = predicted.numel() // len(modulation.strides) // modulation.heads
    start = (level * modulation.heads + head) * width
    both = predicted[start : start + width].tolist()
    return both[0], both[-1]


def log_prior(modulation, observed, point, level, head, x, y, options):
    """The README's formula for one query, head and cell."""
    head = 0 if options.get("head_shared") else head
    place = [value / STRIDES[level] for value in point.tolist()]
    if modulation.offsets is not None:
        offset = modulation.offsets(observed).view(-1, HEADS, 2)[level, head].tolist()
        place = [a + b for a, b in zip(place, offset, strict=True)]
    half = 0.5 if options.get("half_cell_grid") else 0.0
    predicted = None if modulation.scales is None else modulation.scales(observed)
    squares = [s * s for s in scale_of(modulation, predicted, level, head)]
    if options.get("divide_by_scales"):
        squares = [1 / max(square, 1e-4) for square in squares]
    distances = ((x + half - place[0]) ** 2, (y + half - place[1]) ** 2)
    total = sum(a * b for a, b in zip(squares, distances, strict=True))
    return -FACTORS[level] * total / options.get("bandwidth", 8.0)


def formula(modulation, attention, content, position, memory, points, options):
    """Output without residual, weights and priors, by loops over everything."""
    weight, bias = attention.attn.in_proj_weight.chunk(3), attention.attn.in_proj_bias.chunk(3)
    inputs = content + position, memory.tokens + memory.positions, memory.tokens
    query, key, value = (x @ w.T + b for x, w, b in zip(inputs, weight, bias, strict=True))
    levels = len(memory.spatial_shapes)
    width = DIM // HEADS
    output = torch.zeros(ROWS, QUERIES, DIM, dtype=content.dtype)
    weights = torch.zeros(ROWS, HEADS, QUERIES, memory.tokens.shape[1], dtype=content.dtype)
    priors = torch.zeros_like(weights)
    for row in range(ROWS):
        for n in range(QUERIES):
            observed = modulation.norm(content[row, n] + position[row, n])
            alpha = [1.0] * levels
            if modulation.selection is not None:
                alpha = modulation.selection(observed).softmax(0)
            for head in range(HEADS):
                part, start = slice(head * width, (head + 1) * width), 0
                for level, (height, wide) in enumerate(memory.spatial_shapes):
                    cells = range(start, start + height * wide)
                    logits = torch.full((height * wide,), -math.inf, dtype=content.dtype)
                    for s in cells:
                        y, x = divmod(s - start, wide)
                        prior = log_prior(
                            modulation, observed, points[row, n], level, head, x, y, options
                        )
                        priors[row, head, n, s] = prior
                        if not memory.padding_mask[row, s]:
                            product = query[row, n, part] @ key[row, s, part] / width**0.5
                            logits[s - start] = product + prior
                    found = logits.softmax(0) * alpha[level]
                    weights[row, head, n, start : cells.stop] = found
                    output[row, n, part] += found @ value[row, start : cells.stop, part]
                    start = cells.stop
    return attention.attn.out_proj(output), weights, priors


VARIANTS = st.fixed_dictionaries(
    {
        "scales": st.sampled_from(["fixed", "single", "independent"]),
        "head_shared": st.booleans(),
        "divide_by_scales": st.booleans(),
        "half_cell_grid": st.booleans(),
        "query_norm": st.booleans(),
        "level_selection": st.booleans(),
        "bandwidth": st.sampled_from([1.0, 8.0]),
    }
)


@settings(max_examples=12, deadline=None)
@given(options=VARIANTS, levels=st.sampled_from([1, 3]), seed=st.integers(0, 1000))
def test_every_variant_is_the_formula(options, levels, seed):
    modulation, attention, content, position, memory, points = build(levels, seed=seed, **options)
    with torch.no_grad():
        gaussians = modulation(modulation.observe(content, position), points)
        arguments = content, position, memory, memory.padding_mask, gaussians
        found = attention(*arguments)
        maps = AttentionMaps()
        seen = attention(*arguments, maps)
        expected, weights, priors = formula(
            modulation, attention, content, position, memory, points, options
        )
    close = {"rtol": 1e-9, "atol": 1e-10}
    torch.testing.assert_close(found - content, expected, **close)
    torch.testing.assert_close(seen - content, expected, **close)
    torch.testing.assert_close(maps.cross_attention[0], weights, **close)
    torch.testing.assert_close(maps.gaussian[0], priors, **close)


@pytest.mark.parametrize("scales", ["fixed", "single", "independent"])
@pytest.mark.parametrize("levels", [1, 3])
def test_gradients_are_those_of_finite_differences(scales, levels):
    modulation, attention, content, position, memory, points = build(levels, scales=scales)
    leaves = [
        tensor.requires_grad_()
        for tensor in (content, points, *modulation.parameters(), attention.attn.in_proj_weight)
    ]

    def output(*_):
        gaussians = modulation(modulation.observe(content, position), points)
        return attention(content, position, memory, memory.padding_mask, gaussians)

    assert torch.autograd.gradcheck(output, leaves, fast_mode=True)


def test_dropout_acts_on_the_attention_weights():
    modulation, attention, content, position, memory, points = build()
    attention.dropout = 0.5
    gaussians = modulation(modulation.observe(content, position), points)
    arguments = content, position, memory, memory.padding_mask, gaussians
    with torch.no_grad():
        mean = torch.stack([attention(*arguments) for _ in range(800)]).mean(0)
        assert not torch.equal(attention(*arguments), attention(*arguments))
        expected = attention.eval()(*arguments)
        torch.testing.assert_close(mean, expected, rtol=0, atol=0.1)
        torch.testing.assert_close(attention(*arguments), expected, rtol=0, atol=0)


def test_gaussians_start_with_a_width_of_two_cells():
    modulation = Modulation(DIM, HEADS, STRIDES, FACTORS)
    modulation.init_weights()
    gaussians = modulation(torch.randn(1, 4, DIM), torch.rand(1, 4, 2))
    sigma = (2 * gaussians.precision).rsqrt()[0, :, 0, 0, 0]
    torch.testing.assert_close(sigma, torch.tensor([8**0.5, 2.0, 2**0.5]))
    prior = gaussians.log_prior(1, (3, 3))
    assert prior.shape == (1, HEADS, 4, 9)
    assert (prior <= 0).all()


@pytest.mark.parametrize("head_shared", [False, True])
def test_gaussians_of_all_heads_can_start_at_the_query_s_centre(head_shared):
    given, points = torch.randn(1, 4, DIM), 64 * torch.rand(1, 4, 2)
    expected = torch.stack([points / stride for stride in STRIDES], dim=1)[:, :, None]
    for zero_offsets in (False, True):
        options = {"head_shared": head_shared, "zero_offsets": zero_offsets}
        modulation = Modulation(DIM, HEADS, STRIDES, FACTORS, **options)
        modulation.init_weights()
        centers = modulation(given, points).centers
        assert torch.equal(centers, expected.expand_as(centers)) == (head_shared or zero_offsets)


def test_a_scale_near_zero_that_divides_is_one_cell():
    center = torch.full((1, 1, 1, 1, 2), 2.0)
    modulation = Modulation(DIM, HEADS, (32,), (1.0,), divide_by_scales=True)
    torch.nn.init.zeros_(modulation.scales.weight)
    torch.nn.init.zeros_(modulation.scales.bias)
    precision = modulation(torch.randn(1, 1, DIM), torch.rand(1, 1, 2)).precision
    assert precision.isfinite().all()
    weights = Gaussians(center, precision[:, :, :1]).log_prior(0, (5, 5)).softmax(-1)
    assert weights[0, 0, 0].argmax() == 2 * 5 + 2
    assert weights.max() > 0.999


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scales": "both"}, "scales is 'both', expected one of"),
        ({"level_factors": (1.0, 2.0)}, "1 strides, but 2 level_factors"),
        ({"num_heads": 3}, "num_heads 3 does not divide embed_dim 256"),
    ],
)
def test_contradictions_are_refused_in_one_line(options, message):
    with pytest.raises(ValueError, match=message):
        Modulation(**options)
