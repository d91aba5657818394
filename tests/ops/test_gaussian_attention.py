"""Gaussian-modulated attention against its dense formula and recorded numbers."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from gaussian_cases import LEAVES, dense, example, in_double, with_gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ops
from ops.gaussian_attention import reference

# --- values and gradients -----------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_output_and_gradients_are_the_formula(backend: str, padded, shared, scale) -> None:
    arguments = example(padded=padded, shared=shared)
    found = with_gradients(ops.gaussian_attention, arguments, scale=scale)
    torch.testing.assert_close(found, with_gradients(dense, arguments, scale=scale))


@pytest.mark.parametrize(
    "sizes",
    [
        {"shape": (13, 20), "queries": 70, "channels": 32, "value_channels": 32},
        {"shape": (9, 1), "queries": 1, "channels": 1, "value_channels": 1},
        {"shape": (1, 300), "queries": 33, "channels": 40, "value_channels": 17},
        {"shape": (1, 1)},
    ],
)
def test_blocks_of_any_size_add_up(backend: str, sizes: dict) -> None:
    arguments = example(**sizes, padded=sizes["shape"] != (1, 1))
    found = with_gradients(ops.gaussian_attention, arguments)
    torch.testing.assert_close(found, with_gradients(dense, arguments))
    single = example(**sizes, dtype=torch.float32)
    wanted = with_gradients(dense, in_double(single))
    digits = 2e-5 if backend != "PyTorch" else 5e-3  # of its expanded quadratic, on 300 cells
    for ours, exact in zip(with_gradients(ops.gaussian_attention, single), wanted, strict=True):
        tolerance = digits * max(1.0, float(exact.detach().abs().max()))
        torch.testing.assert_close(ours.double(), exact, atol=tolerance, rtol=digits)


@settings(max_examples=30, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    images=st.integers(1, 2),
    heads=st.integers(1, 3),
    queries=st.integers(1, 9),
    channels=st.integers(1, 20),
    value_channels=st.integers(1, 20),
    shared=st.booleans(),
    strength=st.sampled_from([0.0, 0.1, 30.0]),
    seed=st.integers(0, 99),
)
def test_kernels_and_reference_agree(**sizes) -> None:
    arguments = example(**sizes, padded=sizes["shape"][1] > 1)
    found = with_gradients(ops.gaussian_attention, arguments)
    torch.testing.assert_close(found, with_gradients(reference, arguments))


@pytest.mark.parametrize("shared", [False, True])
def test_gradients_are_finite_differences(backend: str, shared: bool) -> None:
    arguments = example(images=1, heads=2, queries=3, shape=(3, 4), shared=shared, padded=True)
    leaves = [arguments[name].requires_grad_() for name in LEAVES]

    def call(*tensors: Tensor) -> Tensor:
        return ops.gaussian_attention(**{**arguments, **dict(zip(LEAVES, tensors, strict=True))})

    assert torch.autograd.gradcheck(call, leaves)


RECORDED = ("q", "k", "v", "centres", "scales", "scale_logits")


def smca(leaves: dict[str, Tensor], fact: dict, mask: Tensor | None) -> Tensor:
    """SMCA's attention: a call per level, weighted by the selection."""
    q, k, v, centers = (leaves[name] for name in RECORDED[:4])
    if not fact["multi_level"]:
        centers = centers.unsqueeze(3)
    scales = leaves.get("scales", torch.ones(*centers.shape[:4], 1, dtype=q.dtype))
    scales = scales if fact["multi_level"] or scales.dim() == 5 else scales.unsqueeze(3)
    selection = leaves["scale_logits"].softmax(-1) if fact["scale_selection"] else None
    output, start = torch.zeros((), dtype=q.dtype), 0
    for level, (height, width) in enumerate(fact["levels"]):
        keys = slice(start, start + height * width)
        start += height * width
        factor = (fact["level_factors"] or [1])[level] / fact["beta"]
        precision = scales[:, :, :, level].square().expand(*centers.shape[:3], 2) * factor
        part = ops.gaussian_attention(
            q,
            k[:, :, keys],
            v[:, :, keys],
            (height, width),
            centers[:, :, :, level],
            precision,
            None if mask is None else mask[:, keys],
        )
        output = output + (part if selection is None else part * selection[:, None, :, level, None])
    return output.transpose(1, 2).flatten(2)


def test_recorded_outputs_and_gradients(reference_dir, backend: str) -> None:
    facts = json.loads((reference_dir / "smca" / "attention.json").read_text())
    arrays = np.load(reference_dir / "smca" / "attention.npz")
    cases = [name for name, fact in facts.items() if "levels" in fact]
    assert len(cases) == 17
    for name in cases:
        stored = {
            key.split("/", 1)[1]: torch.from_numpy(arrays[key])
            for key in arrays.files
            if key.startswith(name + "/")
        }
        leaves = {key: stored[key].double().requires_grad_() for key in RECORDED if key in stored}
        output = smca(leaves, facts[name], stored.get("key_padding_mask"))
        # huge logits keep fewer digits of their differences in the quadratic's expanded form
        digits = 1e-6 if backend != "PyTorch" else 1e-5
        torch.testing.assert_close(output, stored["out"].double(), atol=digits, rtol=digits)
        (output * stored["upstream_grad"]).sum().backward()
        assert sum(f"grad_{key}" in stored for key in leaves) >= 4
        for key, leaf in leaves.items():
            if f"grad_{key}" in stored:
                expected = stored[f"grad_{key}"].double()
                bound = digits * max(1.0, float(expected.abs().max()))
                torch.testing.assert_close(leaf.grad, expected, atol=bound, rtol=digits)


# --- extremes -----------------------------------------------------------------------------------


def test_a_query_without_keys_gives_zeros(backend: str) -> None:
    arguments = example(padded=True)
    mask = torch.zeros_like(arguments["key_padding_mask"])
    mask[1] = True
    output, *grads = with_gradients(ops.gaussian_attention, arguments | {"key_padding_mask": mask})
    assert (output[1] == 0).all()
    assert (output[0] != 0).any()
    assert all((grad[1] == 0).all() for grad in grads)
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_steep_gaussians_keep_their_precision(compiled: str, dtype: torch.dtype) -> None:
    """A precision of 1e4 leaves one cell; its expanded form would cancel away."""
    arguments = example(shape=(25, 34), queries=20, dtype=dtype)
    arguments["centers"] = arguments["centers"].float() + 100.0 * (torch.arange(20) == 7)[:, None]
    arguments["precision"] = torch.full_like(arguments["centers"], 1e4)
    found = with_gradients(ops.gaussian_attention, arguments)
    wanted = with_gradients(dense, in_double(arguments))
    epsilon = max(torch.finfo(dtype).eps, 1e-5)  # logits of 1e4 have few digits behind the point
    for ours, exact in zip(found[:4], wanted[:4], strict=True):
        tolerance = 4 * epsilon * max(1.0, float(exact.detach().abs().max()))
        torch.testing.assert_close(ours.double(), exact, atol=tolerance, rtol=4 * epsilon)
    assert all(part.isfinite().all() for part in found)


def test_gradients_of_far_centers_do_not_cancel(compiled: str) -> None:
    arguments = example(shape=(9, 12), queries=20, strength=0.05)
    arguments["centers"] = arguments["centers"] + 300.0 * (torch.arange(20) % 3)[:, None]
    single = {
        name: item.float() if isinstance(item, Tensor) and item.is_floating_point() else item
        for name, item in arguments.items()
    }
    wanted = with_gradients(dense, in_double(single))
    for ours, exact in zip(with_gradients(ops.gaussian_attention, single), wanted, strict=True):
        bound = 1e-4 * float(exact.detach().abs().max())
        torch.testing.assert_close(ours.double(), exact, atol=bound, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("low_places", [False, True])
def test_low_precision_rounds_only_inputs_and_outputs(
    backend: str, dtype: torch.dtype, low_places: bool
) -> None:
    arguments = example(shape=(9, 20), queries=40, channels=32, padded=True, dtype=dtype)
    if not low_places:
        for name in ("centers", "precision"):
            arguments[name] = arguments[name].float() * 1.001
    found = with_gradients(ops.gaussian_attention, arguments)
    assert [part.dtype for part in found[1:]] == [arguments[name].dtype for name in LEAVES]
    for ours, exact in zip(found, with_gradients(dense, in_double(arguments)), strict=True):
        tolerance = 4 * torch.finfo(dtype).eps * float(exact.detach().abs().max())
        torch.testing.assert_close(ours.double(), exact, atol=tolerance, rtol=0.02)


@pytest.mark.parametrize(
    "sizes",
    [
        {"queries": 0},
        {"images": 0},
        {"heads": 0},
        {"shape": (0, 0)},
        {"shape": (0, 4)},
        {"channels": 0},
        {"value_channels": 0},
    ],
)
def test_nothing_in_nothing_out(backend: str, sizes: dict) -> None:
    arguments = example(**sizes)
    found = with_gradients(ops.gaussian_attention, arguments, scale=1.0)
    wanted = with_gradients(dense, arguments, scale=1.0)
    for ours, exact in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, exact)


def test_any_layout_will_do(backend: str) -> None:
    arguments = example(padded=True)
    wanted = with_gradients(dense, arguments)
    strided = dict(arguments)
    for name in ("query", "key", "value"):
        strided[name] = arguments[name].transpose(1, 2).contiguous().transpose(1, 2)
    strided["centers"] = arguments["centers"].flip(-1).contiguous().flip(-1)
    strided["key_padding_mask"] = arguments["key_padding_mask"].T.contiguous().T
    torch.testing.assert_close(with_gradients(ops.gaussian_attention, strided), wanted)


def test_autocast_lowers_tokens_and_keeps_places(backend: str) -> None:
    arguments = example(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output = ops.gaussian_attention(**arguments)
    assert output.dtype == torch.bfloat16
    lowered = {name: arguments[name].bfloat16() for name in ("query", "key", "value")}
    expected = ops.gaussian_attention(**(arguments | lowered))
    torch.testing.assert_close(output, expected, atol=0, rtol=0)


# --- dropout ------------------------------------------------------------------------------------


def mixed(x: int) -> int:
    x ^= x >> 16
    x = x * 0x7FEB352D % 2**32
    x ^= x >> 15
    x = x * 0x846CA68B % 2**32
    return x ^ x >> 16


def kept_factors(seed: int, rows: int, keys: int, probability: float) -> Tensor:
    """The documented mask, in Python integers: (rows, keys)."""
    factors = torch.full((rows, keys), 1 / (1 - probability), dtype=torch.float64)
    for row in range(rows):
        first = mixed(row ^ seed % 2**32)
        second = mixed((first + seed // 2**32 + 0x9E3779B9) % 2**32)
        for key in range(keys):
            x = key * 0x9E3779B9 % 2**32 ^ first
            x ^= x >> 16
            x = x * 0x7FEB352D % 2**32
            x ^= x >> 15
            x = (x + second) * 0x846CA68B % 2**32
            if x ^ x >> 16 < int(probability * 2**32):
                factors[row, key] = 0
    return factors


def test_dropout_is_the_documented_mask(compiled: str) -> None:
    arguments = example(shape=(6, 30), padded=True)
    torch.manual_seed(5)
    seed = int(torch.randint(2**63 - 1, (1,)))
    factors = kept_factors(seed, 2 * 3 * 6, 180, 0.3).view(2, 3, 6, 180)
    assert 0.25 < float((factors == 0).double().mean()) < 0.35
    wanted = with_gradients(dense, arguments, kept=factors)
    torch.manual_seed(5)
    found = with_gradients(ops.gaussian_attention, arguments, dropout_p=0.3)
    torch.testing.assert_close(found, wanted)


def test_dropout_follows_the_seed_and_keeps_the_mean(backend: str) -> None:
    arguments = example(shape=(10, 10), queries=50, channels=8, strength=0.01)
    arguments["value"] = torch.ones_like(arguments["value"])
    torch.manual_seed(0)
    first = ops.gaussian_attention(**arguments, dropout_p=0.5)
    second = ops.gaussian_attention(**arguments, dropout_p=0.5)
    torch.manual_seed(0)
    assert torch.equal(ops.gaussian_attention(**arguments, dropout_p=0.5), first)
    assert not torch.equal(first, second)
    assert abs(float(first.mean()) - 1) < 0.02
    assert torch.allclose(ops.gaussian_attention(**arguments), torch.ones_like(first))
