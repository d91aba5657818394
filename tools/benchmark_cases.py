"""What is measured: the operators on the shapes that detectors give them, each beside its peers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import ops
from ops.gaussian_attention import reference as augmented_attention
from tools import benchmark_peers as peers
from tools.benchmark_inputs import (
    Sizes,
    convolution_inputs,
    deformable_inputs,
    gaussian_inputs,
    linear_inputs,
    matcher_inputs,
    random_tensor,
)
from tools.benchmark_roofline import (
    Work,
    assignment_work,
    convolution_work,
    deformable_work,
    gaussian_work,
    linear_work,
)

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
    if device == "cpu":  # elsewhere it is PyTorch's
        for (inputs, outputs), backward in itertools.product(sizes.linear, (False, True)):
            passes = "forward+backward" if backward else "forward"
            linear = partial(linear_contest, sizes, inputs, outputs, backward=backward)
            yield Case(f"linear/{inputs}x{outputs}/{passes}", linear)
        for channels, hidden in sizes.feed_forward:
            network = partial(feed_forward_contest, sizes, channels, hidden)
            yield Case(f"feed_forward/{channels}x{hidden}/forward+backward", network)
        for (channels, height, width), backward in itertools.product(
            sizes.convolved, (False, True)
        ):
            passes = "forward+backward" if backward else "forward"
            convolution = partial(convolution_contest, channels, height, width, backward=backward)
            yield Case(f"convolution/{channels}x{height}x{width}/{passes}", convolution)
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


def linear_contest(sizes: Sizes, inputs: int, outputs: int, *, backward: bool) -> Contest:
    """A linear layer of an encoder; inputs as in :func:`linear_inputs`."""
    leaves = linear_inputs(sizes, 1, inputs, outputs)
    output = torch.Size((*leaves[0].shape[:2], outputs))
    timed = partial(_pass, leaves=leaves, output=output, backward=backward)
    contenders = {OURS: timed(ops.linear), "F.linear": timed(F.linear)}
    return Contest(linear_work(*leaves, backward=backward), 1e-5, contenders)


def feed_forward_contest(sizes: Sizes, channels: int, hidden: int) -> Contest:
    """A feed-forward network of an encoder without dropout; inputs as in :func:`linear_inputs`."""
    tokens, *first = linear_inputs(sizes, 1, channels, hidden)
    between, *second = linear_inputs(sizes, 1, hidden, channels)
    layers = (
        linear_work(tokens, *first, backward=True),
        linear_work(between, *second, backward=True),
    )
    work = Work(sum(x.moved for x in layers), sum(x.flops for x in layers))

    def one(tokens: Tensor, w: Tensor, b: Tensor, w_out: Tensor, b_out: Tensor) -> Tensor:
        return ops.relu_feed_forward(tokens, (w, b), (w_out, b_out), p=0)

    def composed(linear: Callable[..., Tensor], tokens: Tensor, *weights: Tensor) -> Tensor:
        return linear(F.relu(linear(tokens, *weights[:2]), inplace=True), *weights[2:])

    leaves = tokens, *first, *second
    timed = partial(_pass, leaves=leaves, output=tokens.shape, backward=True)
    contenders = {
        OURS: timed(one),
        "three operators": timed(partial(composed, ops.linear)),
        "PyTorch": timed(partial(composed, F.linear)),
    }
    # where ReLU begins rounding decides as well
    return Contest(work, TOLERANCE[torch.float32], contenders)


def convolution_contest(channels: int, height: int, width: int, *, backward: bool) -> Contest:
    """A convolution of a ResNet's bottleneck; inputs as in :func:`convolution_inputs`."""
    leaves = convolution_inputs(channels, height, width)
    timed = partial(_pass, leaves=leaves, output=leaves[0].shape, backward=backward)
    direct = partial(F.conv2d, padding=1)
    contenders = {OURS: timed(ops.convolution_3x3), "F.conv2d": timed(direct)}
    return Contest(convolution_work(*leaves, backward=backward), 2e-5, contenders)


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
    grad_output = random_tensor(output, leaves[0].device.type).to(leaves[0])

    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (function(*leaves),)

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(*leaves), leaves, grad_output)

    return both if backward else forward
