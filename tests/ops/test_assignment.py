"""Linear sum assignment: SciPy's indices, brute force, errors, and every backend."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ops import _library, assignment
from ops.assignment import linear_sum_assignment

quick = settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150
)
operator = torch.ops.detr_methods.linear_sum_assignment.default


@pytest.fixture(params=["operator", "SciPy"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test on what serves the CPU here, and on the path without compiled operators."""
    if request.param == "SciPy":
        functions = SimpleNamespace(linear_sum_assignment=assignment.reference)
        monkeypatch.setattr(assignment, "_operators", functions)
    return request.param


def draw_costs(kind: str, shape: Sequence[int], seed: int) -> Tensor:
    generator = np.random.default_rng(seed)
    rows, columns = (*shape[:-1], 1), (*shape[:-2], 1, shape[-1])
    if kind == "normal":
        costs = generator.normal(size=shape)
    elif kind == "ranked":  # everyone likes the same ones: long paths
        costs = generator.normal(size=rows) + generator.normal(size=columns)
    elif kind == "rounded":  # ties that rounding may break or make
        costs = generator.integers(0, 3, rows) * 0.1 + generator.integers(0, 3, columns) * 0.3
    elif kind == "integer":
        costs = generator.integers(-3, 3, shape).astype(np.float64)
    elif kind == "fractions":
        costs = generator.integers(0, 50, shape) * 0.1
    elif kind == "constant":
        costs = np.full(shape, generator.normal())
    else:
        costs = generator.normal(size=shape) * generator.choice([1e30, 1.0, 1e-300], shape)
    return torch.from_numpy(costs)


KINDS = ["normal", "ranked", "rounded", "integer", "fractions", "constant", "magnitudes"]


def problems(costs: Tensor, sizes: Sequence[int]) -> Iterator[tuple[int, tuple[int, ...], Tensor]]:
    for image, block in enumerate(costs.split(list(sizes), dim=-1)):
        for layer in itertools.product(*map(range, costs.shape[:-2])):
            yield image, layer, block[layer]


def assert_as_scipy(costs: Tensor, sizes: Sequence[int]) -> None:
    matches = linear_sum_assignment(costs, sizes)
    assert len(matches) == len(sizes)
    for (rows, columns), size in zip(matches, sizes, strict=True):
        assert rows.shape == columns.shape == (*costs.shape[:-2], min(costs.shape[-2], size))
        assert rows.dtype == columns.dtype == torch.int64
    for image, layer, problem in problems(costs.double(), sizes):
        expected = scipy.optimize.linear_sum_assignment(problem)
        found = [part[layer].tolist() for part in matches[image]]
        assert found == [part.tolist() for part in expected]


@quick
@given(
    kind=st.sampled_from(KINDS),
    layers=st.lists(st.integers(0, 3), max_size=2),
    queries=st.integers(0, 24),
    sizes=st.lists(st.integers(0, 30), max_size=4),
    seed=st.integers(0, 2**32 - 1),
)
def test_indices_are_those_of_scipy(backend, kind, layers, queries, sizes, seed) -> None:
    assert_as_scipy(draw_costs(kind, (*layers, queries, sum(sizes)), seed), sizes)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("queries", [40, 150])
def test_large_problems_tie_as_in_scipy(kind: str, queries: int) -> None:
    sizes = [7, 100, 0, 40, 1, 63]
    assert_as_scipy(draw_costs(kind, (2, queries, sum(sizes)), 1), sizes)


@quick
@given(
    kind=st.sampled_from(KINDS),
    queries=st.integers(1, 5),
    targets=st.integers(1, 5),
    seed=st.integers(0, 2**32 - 1),
)
def test_no_other_matching_costs_less(kind, queries, targets, seed) -> None:
    costs = draw_costs(kind, (queries, targets), seed)
    ((rows, columns),) = linear_sum_assignment(costs, [targets])
    count = min(queries, targets)
    assert len(set(rows.tolist())) == len(set(columns.tolist())) == count
    tall = costs if queries >= targets else costs.T
    totals = [
        math.fsum(tall[list(order), range(count)].tolist())
        for order in itertools.permutations(range(len(tall)), count)
    ]
    total = math.fsum(costs[rows, columns].tolist())
    assert total == pytest.approx(min(totals), rel=1e-12, abs=1e-12 * costs.abs().max().item())


def test_leading_dimensions_are_independent() -> None:
    costs = draw_costs("normal", (2, 3, 9, 11), 0)
    order = torch.tensor([2, 0, 1])
    straight = linear_sum_assignment(costs, [4, 7])
    permuted = linear_sum_assignment(costs[:, order].transpose(0, 1), [4, 7])
    for pair, other in zip(straight, permuted, strict=True):
        for part, expected in zip(other, pair, strict=True):
            assert torch.equal(part, expected[:, order].transpose(0, 1))


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2]
)
def test_every_floating_type(backend: str, dtype: torch.dtype) -> None:
    assert_as_scipy(draw_costs("normal", (2, 12, 9), 0).to(dtype), [2, 7])


def test_costs_of_any_layout(backend: str) -> None:
    costs = draw_costs("normal", (3, 20, 18), 0)
    assert_as_scipy(costs.transpose(-1, -2), [13, 7])
    assert_as_scipy(costs[:, ::2, 1::3], [4, 2])
    assert_as_scipy(costs[:1].expand(4, -1, -1), [9, 9])


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        ((0, 4), [4]),
        ((4, 0), [0, 0]),
        ((4, 0), []),
        ((2, 0, 0), []),
        ((0, 4, 3), [3]),
        ((2, 4, 3), [0, 3, 0]),
        ((1, 1), [1]),
    ],
)
def test_empty_and_single(backend: str, shape: tuple[int, ...], sizes: list[int]) -> None:
    assert_as_scipy(torch.zeros(shape), sizes)


def test_results_carry_no_gradient(backend: str) -> None:
    costs = draw_costs("normal", (5, 3), 0).requires_grad_()
    ((rows, columns),) = linear_sum_assignment(costs, [3])
    assert not rows.requires_grad
    assert not columns.requires_grad
    assert not operator(costs, [3]).requires_grad


@pytest.mark.usefixtures("threads")
def test_threads_do_not_change_the_result() -> None:
    sizes = [30, 1, 0, 55, 14]
    costs = draw_costs("integer", (4, 60, 100), 0)
    assert costs.numel() > 16384  # fewer are not worth a second thread
    results = []
    for count in (1, 2, 4):
        torch.set_num_threads(count)
        results.append(operator(costs, sizes))
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize(
    ("value", "found", "expected"),
    [
        (math.nan, "nan", "finite numbers"),
        (math.inf, "inf", "finite numbers"),
        (-math.inf, "-inf", "finite numbers"),
        (-2.5e301, "-2.5e+301", "magnitudes up to 1e300"),
    ],
)
@pytest.mark.parametrize("sizes", [[3, 1, 5], [1, 0, 8]])  # 5 is tall, 8 wide
def test_bad_costs_are_named(backend, value, found, expected, sizes) -> None:
    costs = draw_costs("normal", (2, 3, 7, 9), 0)
    first = sizes[0] + sizes[1]
    costs[1, 0, 6, first + 3] = costs[1, 2, 0, first] = value
    with pytest.raises(ValueError, match=r"^costs of image 2") as raised:
        linear_sum_assignment(costs, sizes)
    message = f"costs of image 2 hold {found} at index (1, 0, 6, 3), expected {expected}"
    assert str(raised.value) == message


def test_the_first_bad_image_is_named(backend: str) -> None:
    costs = torch.tensor([[0.0, math.nan, math.inf]])
    with pytest.raises(ValueError, match=r"^costs of image 1 hold nan at index \(0, 0\), expected"):
        linear_sum_assignment(costs, [1, 1, 1])


def test_the_largest_costs_do_not_overflow(backend: str) -> None:
    assert_as_scipy(draw_costs("integer", (12, 9), 0).sign() * 1e300, [9])


@pytest.mark.parametrize(
    ("costs", "sizes", "error", "message"),
    [
        ([[1.0]], [1], TypeError, "costs is list, expected a tensor"),
        (torch.zeros(4), [4], ValueError, "costs has shape (4,), expected (..., N, T)"),
        (
            torch.zeros(2, 3, dtype=torch.int64),
            [3],
            TypeError,
            "costs has dtype int64, expected a floating one",
        ),
        (
            torch.zeros(2, 3),
            torch.tensor([3]),
            TypeError,
            "sizes is Tensor, expected a sequence of integers",
        ),
        (
            torch.zeros(2, 3),
            [1, 2.0],
            TypeError,
            "sizes holds 2.0 for image 1, expected integers",
        ),
        (
            torch.zeros(2, 3),
            [4, -1],
            ValueError,
            "sizes holds -1 for image 1, expected sizes >= 0",
        ),
        (
            torch.zeros(2, 3),
            [1, 1],
            ValueError,
            "sizes add up to 2, expected T = 3 as in costs",
        ),
        (torch.zeros(2, 3), [], ValueError, "sizes add up to 0, expected T = 3 as in costs"),
    ],
)
def test_bad_arguments_are_one_line(backend, costs, sizes, error, message) -> None:
    with pytest.raises(error) as raised:
        linear_sum_assignment(costs, sizes)
    assert str(raised.value) == message


@pytest.mark.skipif(_library.COMPILED_PATH is None, reason="the operator is not built")
@pytest.mark.parametrize("sizes", [[4], [-1, 4], [2], [], [2**62, 2**62, 2**62, 2**62 + 3]])
def test_the_compiled_operator_checks_sizes_itself(sizes: list[int]) -> None:
    with pytest.raises(ValueError, match="sizes"):
        operator(torch.zeros(2, 3), sizes)


@pytest.mark.parametrize(("shape", "sizes"), [((2, 6, 5), [2, 3]), ((3, 4), [0, 4]), ((2, 0), [])])
def test_registration(shape: tuple[int, ...], sizes: list[int]) -> None:
    for requires_grad in (False, True):
        costs = draw_costs("normal", shape, 0).requires_grad_(requires_grad)
        torch.library.opcheck(operator, (costs, sizes))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_into_one_graph(dynamic: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        linear_sum_assignment, fullgraph=True, dynamic=dynamic, backend="aot_eager"
    )
    for queries in (6, 9):
        costs = draw_costs("normal", (2, queries, 11), 0)
        for pair, expected in zip(
            compiled(costs, [3, 8]), linear_sum_assignment(costs, [3, 8]), strict=True
        ):
            assert all(map(torch.equal, pair, expected))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_what_the_cpu_gives() -> None:
    costs = draw_costs("normal", (2, 30, 20), 0)
    found = linear_sum_assignment(costs.cuda(), [15, 5])
    for pair, expected in zip(found, linear_sum_assignment(costs, [15, 5]), strict=True):
        for part, other in zip(pair, expected, strict=True):
            assert part.device.type == "cuda"
            assert torch.equal(part.cpu(), other)
