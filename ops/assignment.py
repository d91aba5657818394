"""Linear sum assignment: the one-to-one matching of queries and targets at least cost."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ._library import COMPILED_PATH, NAMESPACE, WAITS_FOR_HOST, library

LARGEST_COST = 1e300
"""Beyond this magnitude sums of costs could overflow; the compiled operator has the same limit."""


def linear_sum_assignment(costs: Tensor, sizes: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    r"""Match queries with targets one to one so that the sum of their costs is least.

    For image b with columns :math:`T_b` it finds :math:`\min_{\sigma} \sum_k c_{r_k, \sigma(r_k)}`
    over the injective maps between its N queries and its targets, in float64. The indices are those
    of ``scipy.optimize.linear_sum_assignment(costs[..., start:end])`` for each problem, also where
    several assignments cost the same. On CUDA the costs are copied to the host once, the indices
    back once. Nothing is differentiable.

    Args:
        costs: (..., N, T) of finite numbers up to 1e300 in magnitude: leading dimensions are
            decoder layers or groups, columns the targets of all images one after the other.
        sizes: targets of each of the B images; they add up to T.

    Returns:
        Per image (rows, columns), int64, each (..., min(N, sizes[b])): rows ascend, columns count
        from the image's first target.

    Raises:
        ValueError: if a cost is not such a number, or shapes and sizes do not belong together.
        TypeError: if ``costs`` is not floating or ``sizes`` does not hold integers.
    """
    sizes = _check(costs, sizes)
    packed = _operators.linear_sum_assignment(costs.detach(), sizes)
    matches = _matches(costs, sizes)
    rows, columns = (part.split(matches, dim=-1) for part in packed.unbind())
    return list(zip(rows, columns, strict=True))


def reference(costs: Tensor, sizes: Sequence[int]) -> Tensor:
    """The same with SciPy, one problem after the other.

    Args:
        costs: (..., N, T) on the CPU.
        sizes: as in :func:`linear_sum_assignment`.

    Returns:
        (2, ..., M), int64: rows and columns of the M matches of all images one after the other.

    Raises:
        ValueError: if a cost is not finite or larger than 1e300 in magnitude.
    """
    from scipy import optimize  # only here: the compiled operator does without it

    layers = costs.shape[:-2]
    parts = [costs.new_empty((2, *layers, 0), dtype=torch.int64)]
    for image, block in enumerate(costs.detach().double().split(list(sizes), dim=-1)):
        _check_finite(block, image)
        problems = block.reshape(layers.numel(), *block.shape[-2:]).numpy()
        count = min(block.shape[-2:])
        matches = torch.empty(2, len(problems), count, dtype=torch.int64)
        for layer, problem in enumerate(problems):
            rows, columns = optimize.linear_sum_assignment(problem)
            matches[0, layer], matches[1, layer] = torch.from_numpy(rows), torch.from_numpy(columns)
        parts.append(matches.view(2, *layers, count))
    return torch.cat(parts, dim=-1)


def _check_finite(block: Tensor, image: int) -> None:
    bad = ~(block.abs() <= LARGEST_COST)
    if bad.any():
        index = tuple(bad.nonzero()[0].tolist())
        cost = block[index].item()
        expected = "magnitudes up to 1e300" if math.isfinite(cost) else "finite numbers"
        raise ValueError(
            f"costs of image {image} hold {cost:g} at index {index}, expected {expected}"
        )


def _check(costs: Tensor, sizes: Sequence[int]) -> list[int]:
    """Refuse what does not belong together; the sizes as a list."""
    if not isinstance(costs, Tensor):
        raise TypeError(f"costs is {type(costs).__name__}, expected a tensor")
    if costs.dim() < 2:
        raise ValueError(f"costs has shape {tuple(costs.shape)}, expected (..., N, T)")
    if not costs.is_floating_point():
        found = str(costs.dtype).removeprefix("torch.")
        raise TypeError(f"costs has dtype {found}, expected a floating one")
    if not isinstance(sizes, Sequence):
        raise TypeError(f"sizes is {type(sizes).__name__}, expected a sequence of integers")
    for image, size in enumerate(sizes):
        if not isinstance(size, int | torch.SymInt):
            raise TypeError(f"sizes holds {size!r} for image {image}, expected integers")
        if size < 0:
            raise ValueError(f"sizes holds {size} for image {image}, expected sizes >= 0")
    if sum(sizes) != costs.shape[-1]:
        raise ValueError(
            f"sizes add up to {sum(sizes)}, expected T = {costs.shape[-1]} as in costs"
        )
    return list(sizes)


def _matches(costs: Tensor, sizes: Sequence[int]) -> list[int]:
    """How many matches each image has."""
    return [torch.sym_min(costs.shape[-2], size) for size in sizes]


# --- registration -------------------------------------------------------------------------------

library.define("linear_sum_assignment(Tensor costs, SymInt[] sizes) -> Tensor", tags=WAITS_FOR_HOST)
_operators = getattr(torch.ops, NAMESPACE)


def _from_cuda(costs: Tensor, sizes: list[int]) -> Tensor:
    host = torch.empty(costs.shape, dtype=costs.dtype, pin_memory=True)
    host.copy_(costs)  # waits for the costs
    packed = _operators.linear_sum_assignment(host, sizes)
    return packed.pin_memory().to(costs.device, non_blocking=True)


def _fake(costs, sizes):
    shape = (2, *costs.shape[:-2], sum(_matches(costs, sizes)))
    return costs.new_empty(shape, dtype=torch.int64)


def _register() -> None:
    torch.library.register_fake(f"{NAMESPACE}::linear_sum_assignment", _fake)
    library.impl("linear_sum_assignment", _from_cuda, "CUDA")
    if COMPILED_PATH is None:
        library.impl("linear_sum_assignment", reference, "CPU")


_register()
