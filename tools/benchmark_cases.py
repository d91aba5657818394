"""What is measured: the operators on the shapes that detectors give them, each beside its peers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor

import ops
from ops.gaussian_attention import reference as augmented_attention
from tools import benchmark_peers as peers
from tools.benchmark_roofline import Work, assignment_work, deformable_work, gaussian_work

OURS = "ours"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOLERANCE = {torch.float32: 0.01, torch.bfloat16: 0.05}
"""Largest relative difference in the Euclidean norm: at a cell's border rounding decides which
gradient a location gets, so single elements may differ."""

REQUIRED = {
    "cpu": (
        ("deformable_encoder/*/forward", "grid_sample", 8.0),
        ("deformable_encoder/*/forward+backward", "grid_sample", 6.0),
        ("deformable_decoder/N300/*", "grid_sample", 3.0),
        ("gaussian/*/forward+backward", "eager bias", 3.0),
        ("gaussian/*/forward+backward", "augmented SDPA", 1.0),
        ("matcher/*", "SciPy", 3.0),
    ),
    "cuda": (
        ("deformable_*/float32/forward+backward", "detrex", 1.5),
        ("deformable_*/bfloat16/forward+backward", "detrex", 2.5),
        ("gaussian/*", "eager bias", 1.0),
        ("gaussian/*", "FlexAttention", 1.0),
    ),
}
"""Per device: cases, peer, and how many times its speed ours has to have."""


def required(device: str, case: str, peer: str) -> float | None:
    """Return the ratio that a case requires, or None."""
    for pattern, name, ratio in REQUIRED[device]:
        if name == peer and fnmatchcase(case, pattern):
            return ratio
    return None


@dataclass(frozen=True)
class Sizes:
    """Shapes of all cases; the defaults are those of detectors on 800 x 1066 pixels."""

    heads: int = 8
    channels: int = 32
    points: int = 4
    levels: tuple[tuple[int, int], ...] = ((100, 134), (50, 67), (25, 34), (13, 17))
    encoder_batches: tuple[int, ...] = (1,)
    decoder_queries: tuple[int, ...] = (300, 900)
    decoder_batches: tuple[int, ...] = (1, 2, 8)
    maps: tuple[tuple[int, int], ...] = ((25, 34), (50, 67))
    map_queries: int = 300
    map_batches: tuple[int, ...] = (1, 2)
    matched_images: int = 16
    matched_queries: int = 300
    matched_targets: tuple[int, int] = (7, 100)
    compiled_peers: bool = True


QUICK = Sizes(
    heads=2,
    channels=8,
    points=2,
    levels=((6, 8), (3, 4)),
    decoder_queries=(5,),
    decoder_batches=(2,),
    maps=((4, 5),),
    map_queries=6,
    map_batches=(2,),
    matched_images=2,
    matched_queries=6,
    matched_targets=(1, 4),
    compiled_peers=False,
)


@dataclass
class Contest:
    """Contenders on the inputs that were made for them.

    Attributes:
        work: what has to be done at least.
        tolerance: largest relative difference between ours and a peer.
        contenders: what to call, by name; ours comes first.
        unavailable: why a peer is missing, by name.
        compared: what is held against each other of a contender's result.
    """

    work: Work
    tolerance: float
    contenders: dict[str, Callable[[], Any]]
    unavailable: dict[str, str] = field(default_factory=dict)
    compared: Callable[[Any], Sequence[Tensor]] = tuple

    def admit(self, name: str, build: Callable[[], Callable[[], Any]]) -> None:
        """Let a peer take part if it can be built and called."""
        try:
            run = build()
            run()
        except peers.Unavailable as error:
            self.unavailable[name] = str(error)
        except Exception as error:  # whatever another package raises is the reason
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            self.unavailable[name] = reason
        else:
            self.contenders[name] = run


@dataclass(frozen=True)
class Case:
    """A name and how to make its contest, which takes memory and time."""

    name: str
    prepare: Callable[[], Contest]


def all_cases(sizes: Sizes, device: str) -> Iterator[Case]:
    """Yield every case that is timed."""
    for queries, batch in [
        *itertools.product((None,), sizes.encoder_batches),
        *itertools.product(sizes.decoder_queries, sizes.decoder_batches),
    ]:
        where = "encoder" if queries is None else f"decoder/N{queries}"
        contest = partial(deformable_contest, sizes, device, batch, queries)
        yield from _variants(f"deformable_{where}/B{batch}", contest)
    for shape, batch, padded in itertools.product(sizes.maps, sizes.map_batches, (False, True)):
        whole = "padded" if padded else "whole"
        contest = partial(gaussian_contest, sizes, device, batch, shape, padded)
        yield from _variants(f"gaussian/{shape[0]}x{shape[1]}/B{batch}/{whole}", contest)
    yield Case("matcher/6_layers", partial(matcher_contest, sizes, device, (6,)))
    yield Case("matcher/6_layers_x_3_groups", partial(matcher_contest, sizes, device, (6, 3)))


def _variants(name: str, contest: Callable[..., Contest]) -> Iterator[Case]:
    for kind, dtype in DTYPES.items():
        for passes in ("forward", "forward+backward"):
            prepare = partial(contest, dtype, backward=passes != "forward")
            yield Case(f"{name}/{kind}/{passes}", prepare)


# --- contests -----------------------------------------------------------------------------------


def deformable_contest(
    sizes: Sizes,
    device: str,
    batch: int,
    queries: int | None,
    dtype: torch.dtype,
    *,
    backward: bool,
) -> Contest:
    """Multi-scale deformable attention; inputs as in :func:`deformable_inputs`."""
    leaves = deformable_inputs(sizes, batch, queries, dtype, device)
    output = torch.Size((batch, leaves[1].shape[1], sizes.heads * sizes.channels))
    timed = partial(_pass, leaves=leaves, output=output, backward=backward)
    contest = Contest(
        deformable_work(*leaves, backward=backward),
        TOLERANCE[dtype],
        {
            OURS: timed(
                lambda v, x, w: ops.multi_scale_deformable_attention(v, sizes.levels, x, w)
            ),
            "grid_sample": timed(lambda v, x, w: peers.sampled_by_grid(v, sizes.levels, x, w)),
        },
    )

    def build(package: str) -> Callable[[], Any]:
        return timed(peers.compiled_deformable(package, sizes.levels, device))

    for package in ("detrex", "mmcv"):
        contest.admit(package, partial(build, package))
    return contest


def gaussian_contest(
    sizes: Sizes,
    device: str,
    batch: int,
    shape: tuple[int, int],
    padded: bool,
    dtype: torch.dtype,
    *,
    backward: bool,
) -> Contest:
    """Gaussian attention of a decoder; inputs as in :func:`gaussian_inputs`."""
    leaves, mask = gaussian_inputs(sizes, batch, shape, padded, dtype, device)
    query, key, value, centers, precision = leaves
    timed = partial(_pass, leaves=leaves, output=query.shape, backward=backward)

    def over_map(function: Callable[..., Tensor]) -> Callable[[], Any]:
        return timed(lambda q, k, v, c, p: function(q, k, v, shape, c, p, mask))

    contest = Contest(
        gaussian_work(query, key, value, (centers, precision), mask, backward=backward),
        TOLERANCE[dtype],
        {
            OURS: over_map(ops.gaussian_attention),
            "eager bias": over_map(peers.pairwise_bias),
            "separable bias": over_map(peers.separable_bias),
            "augmented SDPA": over_map(augmented_attention),
        },
    )
    if sizes.compiled_peers:
        contest.admit("FlexAttention", lambda: timed(peers.flex(shape, mask)))
    else:
        contest.unavailable["FlexAttention"] = "not compiled for a quick run"
    return contest


def matcher_contest(sizes: Sizes, device: str, layers: tuple[int, ...]) -> Contest:
    """Matching of all images and layers; inputs as in :func:`matcher_inputs`."""
    costs, targets = matcher_inputs(sizes, layers, device)

    def totals(matches: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        # several assignments may cost the same
        blocks = costs.split(targets, dim=-1)
        return [
            block.gather(-2, rows[..., None].expand(*rows.shape, block.shape[-1]))
            .gather(-1, columns[..., None])
            .sum((-2, -1))
            for block, (rows, columns) in zip(blocks, matches, strict=True)
        ]

    contenders = {
        OURS: lambda: ops.linear_sum_assignment(costs, targets),
        "SciPy": lambda: peers.scipy_matches(costs, targets),
    }
    return Contest(assignment_work(costs, targets), 1e-5, contenders, compared=totals)


def _pass(
    function: Callable[..., Tensor],
    *,
    leaves: tuple[Tensor, ...],
    output: torch.Size,
    backward: bool,
) -> Callable[[], tuple[Tensor, ...]]:
    """Make a call that returns the output, or with ``backward`` the gradients of the leaves."""

    leaves = tuple(leaf.detach().requires_grad_(backward) for leaf in leaves)
    grad_output = _random(output, leaves[0].device.type).to(leaves[0])

    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (function(*leaves),)

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(*leaves), leaves, grad_output)

    return both if backward else forward


# --- inputs -------------------------------------------------------------------------------------


def _random(shape: Sequence[int], device: str, *, seed: int = 0, uniform: bool = False) -> Tensor:
    """Numbers that depend on the seed alone, not on the device."""
    draw = torch.rand if uniform else torch.randn
    return draw(tuple(shape), generator=torch.Generator().manual_seed(seed)).to(device)


def deformable_inputs(
    sizes: Sizes, batch: int, queries: int | None, dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Values, locations and weights as a model makes them.

    Locations are offsets of some two cells on each level around a reference point: in the encoder
    (``queries`` None) the centre of a token's cell, in the decoder anywhere. Weights are a softmax.
    Both stay in float32 beside a value in bfloat16, as under autocast.

    Returns:
        value (B, S, H, D) in ``dtype``, locations (B, N, H, V, P, 2), weights (B, N, H, V, P).
    """
    tokens = sum(height * width for height, width in sizes.levels)
    value = _random((batch, tokens, sizes.heads, sizes.channels), device).to(dtype)
    if queries is None:
        points = torch.cat(
            [
                (peers.cell_coordinates((height, width), value.device) + 0.5)
                / value.new_tensor([width, height], dtype=torch.float32)
                for height, width in sizes.levels
            ]
        ).expand(batch, -1, -1)
    else:
        points = _random((batch, queries, 2), device, seed=1, uniform=True)
    extents = points.new_tensor([(width, height) for height, width in sizes.levels])
    shape = (*points.shape[:2], sizes.heads, len(sizes.levels), sizes.points)
    offsets = 2 * _random((*shape, 2), device, seed=2) / extents[:, None]
    locations = points[:, :, None, None, None] + offsets
    weights = _random(shape, device, seed=3).flatten(3).softmax(-1).view(shape)
    return value, locations, weights


def gaussian_inputs(
    sizes: Sizes,
    batch: int,
    shape: tuple[int, int],
    padded: bool,
    dtype: torch.dtype,
    device: str,
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor | None]:
    """Inputs as SMCA starts with: Gaussians of two to three cells, a head's centre near a query's.

    Centers and precision stay in float32 beside bfloat16, as under autocast.

    Returns:
        query (B, H, N, D), key and value (B, H, S, D), centers and precision (B, H, N, 2); the mask
        (B, S) of the right fifth of the map if ``padded``, else None.
    """
    height, width = shape
    heads, queries, channels = sizes.heads, sizes.map_queries, sizes.channels
    query = _random((batch, heads, queries, channels), device).to(dtype)
    key, value = (
        _random((batch, heads, height * width, channels), device, seed=seed).to(dtype)
        for seed in (1, 2)
    )
    extent = torch.tensor([width, height], device=device)
    centers = _random((batch, 1, queries, 2), device, seed=3, uniform=True) * extent
    centers = centers + _random((batch, heads, queries, 2), device, seed=4)
    sigma = 2 + _random((batch, heads, queries, 2), device, seed=5, uniform=True)
    mask = None
    if padded:
        x = peers.cell_coordinates(shape, query.device)[:, 0]
        mask = (x >= width - width // 5).expand(batch, -1).contiguous()
    return (query, key, value, centers, 1 / (2 * sigma.square())), mask


def matcher_inputs(sizes: Sizes, layers: tuple[int, ...], device: str) -> tuple[Tensor, list[int]]:
    """Costs of class and boxes where half of the queries lie near some target.

    Returns:
        costs (*layers, N, T) and the targets of each image.
    """
    low, high = sizes.matched_targets
    draw = _random((sizes.matched_images,), "cpu", uniform=True)
    targets = (low + draw * (high + 1 - low)).long().tolist()
    queries = sizes.matched_queries
    blocks = []
    for image, count in enumerate(targets):
        seed = 10 * image
        boxes = _random((count, 4), "cpu", seed=seed, uniform=True)
        found = _random((*layers, queries, 4), "cpu", seed=seed + 1, uniform=True)
        near = boxes[torch.arange(queries // 2) % count]
        noise = _random((*layers, queries // 2, 4), "cpu", seed=seed + 2)
        found[..., : queries // 2, :] = near + 0.05 * noise
        classes = _random((*layers, queries, count), "cpu", seed=seed + 3, uniform=True)
        blocks.append(5 * (found[..., None, :] - boxes).abs().sum(-1) - 2 * classes)
    return torch.cat(blocks, dim=-1).to(device), targets
