"""What others run instead of the operators."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from scipy import optimize
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

Shapes = Sequence[tuple[int, int]]


class Unavailable(Exception):
    """A peer cannot run here; the message says why."""


# --- deformable attention -----------------------------------------------------------------------


def sampled_by_grid(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """Deformable attention with one ``grid_sample`` a level, the usual way without a kernel.

    Samples in float32 whatever the type of ``value``: a grid has the type of what it samples, and
    in bfloat16 a location on a large level is off by a quarter of a cell.

    Args:
        value: (B, S, H, D).
        shapes: (h, w) of each level.
        locations: (B, N, H, V, P, 2).
        weights: (B, N, H, V, P).

    Returns:
        (B, N, H * D) in the type of ``value``.
    """
    batch, _, heads, channels = value.shape
    _, queries, _, levels, points, _ = locations.shape
    grids = (2 * locations - 1).transpose(1, 2).flatten(0, 1)  # (B * H, N, V, P, 2)
    maps = value.float().split([height * width for height, width in shapes], dim=1)
    samples = [
        F.grid_sample(
            maps[level].flatten(2).transpose(1, 2).reshape(batch * heads, channels, height, width),
            grids[:, :, level],
            mode="bilinear",
            padding_mode="zeros",
            align_corners=False,
        )
        for level, (height, width) in enumerate(shapes)
    ]
    weights = weights.transpose(1, 2).reshape(batch * heads, 1, queries, levels * points)
    output = (torch.stack(samples, dim=-2).flatten(-2) * weights).sum(-1)
    return output.view(batch, heads * channels, queries).transpose(1, 2).contiguous().to(value)


def compiled_deformable(
    package: str, shapes: Shapes, device: str
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Take the kernel of an installed package; it works in float32, as that package's layer does.

    Args:
        package: ``"detrex"`` or ``"mmcv"``.
        shapes: (h, w) of each level.
        device: where the level sizes are to be.

    Raises:
        Unavailable: if the package or its compiled part is not installed.
    """
    compiled, module = {
        "detrex": ("detrex._C", "detrex.layers.multi_scale_deform_attn"),
        "mmcv": ("mmcv._ext", "mmcv.ops.multi_scale_deform_attn"),
    }[package]
    try:
        importlib.import_module(compiled)
        apply = importlib.import_module(module).MultiScaleDeformableAttnFunction.apply
    except (ImportError, AttributeError):
        raise Unavailable("not installed") from None
    areas = [height * width for height, width in shapes]
    sizes = torch.tensor(shapes, device=device)
    starts = torch.tensor([0, *itertools.accumulate(areas[:-1])], device=device)

    def run(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return apply(value.float(), sizes, starts, locations, weights, 64).to(value)

    return run


# --- Gaussian attention -------------------------------------------------------------------------


def cell_coordinates(shape: tuple[int, int], device: torch.device) -> Tensor:
    """Integer (x, y) of the cells of a map (h, w), row-major, (S, 2) in float32."""
    y, x = torch.meshgrid(*(torch.arange(size, device=device) for size in shape), indexing="ij")
    return torch.stack([x, y], dim=-1).flatten(0, 1).float()


def pairwise_bias(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    shape: tuple[int, int],
    centers: Tensor,
    precision: Tensor,
    mask: Tensor | None,
) -> Tensor:
    """Gaussian attention with a bias from the distance of every pair of a query and a cell.

    Arguments and result as in :func:`ops.gaussian_attention`.
    """
    cells = cell_coordinates(shape, query.device)
    bias = ((cells - centers[..., None, :]).square() * precision[..., None, :]).sum(-1).neg()
    return _biased(query, key, value, bias, mask)


def separable_bias(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    shape: tuple[int, int],
    centers: Tensor,
    precision: Tensor,
    mask: Tensor | None,
) -> Tensor:
    """The same bias from the distances of rows and of columns: one addition a pair.

    Arguments and result as in :func:`ops.gaussian_attention`.
    """
    y, x = (torch.arange(size, device=query.device) for size in shape)
    columns = precision[..., :1] * (x - centers[..., :1]).square()
    rows = precision[..., 1:] * (y - centers[..., 1:]).square()
    bias = (rows[..., :, None] + columns[..., None, :]).flatten(-2).neg()
    return _biased(query, key, value, bias, mask)


def _biased(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
    """Attention with a bias (B, H, N, S), which autograd keeps."""
    if mask is not None:
        bias = bias.masked_fill(mask[:, None, None, :], float("-inf"))
    return F.scaled_dot_product_attention(query, key, value, bias.to(query))


def flex(shape: tuple[int, int], mask: Tensor | None) -> Callable[..., Tensor]:
    """Gaussian attention as a compiled FlexAttention whose ``score_mod`` computes the bias.

    Args:
        shape: (h, w) of the map.
        mask: (B, S), True on padding.
    """
    width = shape[1]

    def attention(
        query: Tensor, key: Tensor, value: Tensor, centers: Tensor, precision: Tensor
    ) -> Tensor:
        def modify(score: Tensor, b: Tensor, h: Tensor, n: Tensor, s: Tensor) -> Tensor:
            x = s % width - centers[b, h, n, 0]
            y = s // width - centers[b, h, n, 1]
            score = score - precision[b, h, n, 0] * x * x - precision[b, h, n, 1] * y * y
            return score if mask is None else torch.where(mask[b, s], -float("inf"), score)

        return flex_attention(query, key, value, score_mod=modify)

    torch.compiler.reset()  # another case's compilation counts against the limit of this code
    return torch.compile(attention, dynamic=False)


# --- matching -----------------------------------------------------------------------------------


def scipy_matches(costs: Tensor, sizes: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """Match with SciPy, one layer and image after the other, as matchers in detectors do.

    Arguments and result as in :func:`ops.linear_sum_assignment`.
    """
    leading = costs.shape[:-2]
    matches = []
    for block in costs.cpu().split(list(sizes), dim=-1):
        problems = block.reshape(-1, *block.shape[-2:]).numpy()
        pairs = [optimize.linear_sum_assignment(problem) for problem in problems]
        rows, columns = (
            torch.stack([torch.from_numpy(indices) for indices in part]).unflatten(0, leading)
            for part in zip(*pairs, strict=True)
        )
        matches.append((rows.to(costs.device), columns.to(costs.device)))
    return matches
