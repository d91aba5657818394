"""The masks of dropout: the documented hash, its statistics, and what they depend on."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from dropout_masks import SEED, drawn_seed, mask_of, random_bits, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import ops
from ops import dropout

OPERATORS = torch.ops.detr_methods


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**63 - 1), st.integers(1, 300), st.floats(0.0, 1.0, exclude_max=True))
def test_mask_is_the_documented_hash(seed: int, count: int, p: float) -> None:
    expected = mask_of((count,), p, seed)
    assert torch.equal(dropout.kept((count,), p, torch.tensor([seed])), expected)
    found = OPERATORS.dropout_add(torch.ones(count), None, p, torch.tensor([seed]))
    assert torch.equal(found > 0, expected)


def test_bits_behind_the_first_four_billion_elements_are_others() -> None:
    number = dropout._scrambled(SEED)
    first, second = (dropout._random_bits(number, row, 4096) for row in (0, 1))
    for row, bits in enumerate((first, second)):
        expected = random_bits(SEED, 4096, row).astype(np.int64)
        assert torch.equal(bits, torch.from_numpy(expected))
    assert (first == second).sum() < 3


def test_every_bit_is_fair() -> None:
    """One count in 32 lies five deviations off with a probability of 2e-5; the seed is fixed."""
    count = 2**20
    bits = torch.from_numpy(random_bits(SEED, count).astype(np.int64))
    ones = torch.stack([(bits >> position & 1).sum() for position in range(32)])
    assert (ones - count / 2).abs().max() < 5 * (count / 4) ** 0.5


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9])
def test_shares_of_dropped_elements(p: float) -> None:
    """Overall, and in each of 1,000 rows: their squared deviations add up as they should."""
    rows, columns = 1000, 2000
    for seed in (0, 1, SEED):
        kept = ops.dropout_add(torch.ones(rows, columns), p=p, seed=seeded(seed)) > 0
        dropped = (~kept).double()
        variance = p * (1 - p)
        assert abs(dropped.mean() - p) < 5 * (variance / kept.numel()) ** 0.5
        for axis, length in ((1, columns), (0, rows)):
            deviations = (dropped.mean(axis) - p).square() * length / variance
            expected, spread = len(deviations), (len(deviations) * (2 + 1 / (length * p))) ** 0.5
            assert abs(deviations.sum() - expected) < 5 * spread


def correlation(first: Tensor, second: Tensor) -> float:
    """In deviations of the coefficient of independent elements."""
    first, second = (x.double() - x.double().mean() for x in (first, second))
    both = (first * second).mean() / (first.std() * second.std())
    return float(both) * first.numel() ** 0.5


def test_neighbours_are_independent() -> None:
    kept = dropout.kept((2**20,), 0.3, seeded())
    for distance in (*range(1, 65), 128, 255, 256, 257, 1024, 4096, 65536, 2**19):
        assert abs(correlation(kept[distance:], kept[:-distance])) < 5, distance


def test_seeds_are_independent() -> None:
    """Of neighbouring numbers, of single bits, and those that the generator draws."""
    torch.manual_seed(0)
    drawn = [int(dropout.draw_seed()) for _ in range(8)]
    seeds = [0, 1, 2, 3, 1 << 16, 1 << 31, 1 << 32, 3 << 32, 1 << 62, 2**63 - 1, *drawn]
    masks = [dropout.kept((2**17,), 0.3, seeded(seed)) for seed in seeds]
    for first, second in itertools.combinations(masks, 2):
        assert abs(correlation(first, second)) < 5.5  # of 153 pairs
        assert abs(correlation(first[1:], second[:-1])) < 5.5


def test_pairs_and_triples_of_neighbours_are_as_frequent_as_they_should_be() -> None:
    bits = random_bits(SEED, 3 * 2**19) >> np.uint32(28)  # the four that decide most
    triples = bits.reshape(-1, 3).astype(np.int64)
    for columns in ((0, 1), (1, 2), (0, 2), (0, 1, 2)):
        cells = np.zeros(len(triples), dtype=np.int64)
        for column in columns:
            cells = cells * 16 + triples[:, column]
        counts = np.bincount(cells, minlength=16 ** len(columns))
        expected = len(triples) / len(counts)
        freedom = len(counts) - 1
        chi_square = float(((counts - expected) ** 2 / expected).sum())
        assert abs(chi_square - freedom) < 5 * (2 * freedom) ** 0.5, columns


def test_manual_seed_repeats_a_run_and_calls_differ() -> None:
    values = torch.ones(1000)
    torch.manual_seed(5)
    first, second = ops.dropout_add(values, p=0.5), ops.relu_dropout(values, 0.5)
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    assert torch.equal(ops.dropout_add(values, p=0.5), first)
    assert torch.equal(ops.relu_dropout(values, 0.5), second)
    assert torch.equal(first > 0, mask_of((1000,), 0.5, drawn_seed(5)))


@pytest.mark.parametrize("inplace", [False, True])
def test_a_seed_that_is_given_decides_and_the_generator_rests(inplace: bool) -> None:
    values = torch.randn(5, 40)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    found = [ops.relu_dropout(values.clone(), 0.3, True, inplace, seeded()) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(*found)
    expected = values.relu() * mask_of(values.shape, 0.3) / (1 - 0.3)
    torch.testing.assert_close(found[0], expected)
    for p, training in ((0.3, False), (0.0, True)):
        rectified = ops.relu_dropout(values.clone(), p, training, inplace, seeded())
        assert torch.equal(rectified, values.relu())


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_a_checkpoint_computes_again_has_the_same_mask(reentrant: bool) -> None:
    weight = torch.randn(16, 16)

    def layer(x: Tensor) -> Tensor:
        hidden = ops.relu_dropout(x @ weight, 0.5, inplace=True)
        return ops.dropout_add(hidden @ weight, x, 0.5).square()

    values = torch.randn(8, 16, requires_grad=True)
    grads = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=reentrant)):
        torch.manual_seed(0)
        output = run(values)
        torch.rand(3)  # the generator has gone on
        output.sum().backward()
        grads.append(values.grad)
        values.grad = None
    assert torch.equal(*grads)


def test_bits_do_not_depend_on_threads(compiled: str, threads: None) -> None:
    torch.manual_seed(0)
    values, residual = torch.randn(7, 30011), torch.randn(7, 30011)
    results = []
    for count in (1, 2, 3, 4):
        torch.set_num_threads(count)
        found = ops.dropout_add(values, residual, 0.1, seed=seeded())
        rectified = OPERATORS.relu_dropout(values, 0.1, seeded())
        gradient = OPERATORS.relu_dropout_backward(residual, rectified, 0.1)
        results.append((found, rectified, gradient))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(("p", "training"), [(0.0, True), (0.4, False), (0.0, False)])
def test_without_dropout_the_generator_rests(p: float, training: bool) -> None:
    values, residual = torch.randn(40), torch.randn(40)
    state = torch.get_rng_state()
    assert torch.equal(ops.dropout_add(values, residual, p, training), values + residual)
    assert torch.equal(ops.dropout_add(values, None, p, training), values)
    assert torch.equal(ops.relu_dropout(values, p, training), values.clamp(min=0))
    assert torch.equal(ops.relu_dropout(values.clone(), p, training, True), values.clamp(min=0))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(OPERATORS.dropout_add(values, residual, 0.0, seeded()), values + residual)


def test_off_the_cpu_it_is_the_device_s_own_dropout() -> None:
    values = torch.randn(3, 4, device="meta", dtype=torch.bfloat16)
    state = torch.get_rng_state()
    for found in (ops.dropout_add(values, values, 0.5), ops.relu_dropout(values, 0.5)):
        assert (found.shape, found.dtype, found.device.type) == ((3, 4), torch.bfloat16, "meta")
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match="values are on meta, expected the cpu beside a seed"):
        ops.dropout_add(values, p=0.5, seed=seeded())
    with pytest.raises(ValueError, match="values are on meta, expected the cpu beside a seed"):
        ops.relu_dropout(torch.ones(3, device="meta"), 0.1, seed=seeded())
