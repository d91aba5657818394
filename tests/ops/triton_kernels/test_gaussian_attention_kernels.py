"""The Triton kernels of Gaussian-modulated attention, interpreted on the CPU and compiled."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

NAMES = ("query", "key", "value", "centers", "precision")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.float16: 3e-3, torch.bfloat16: 3e-2}
SEED = torch.tensor([-0x123456789ABCDEF])  # the halves of a negative number are words without sign
Leaves = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


class Inputs(NamedTuple):
    leaves: Leaves
    width: int
    mask: Tensor | None = None
    scale: float = 0.4
    dropout_p: float = 0.0
    seed: Tensor | None = None

    def arguments(self) -> tuple[Any, ...]:
        query, key, value, centers, precision = self.leaves
        return (query, key, value, self.width, centers, precision, *self[2:])


@pytest.fixture
def kernels(interpreted) -> ModuleType:
    """Return the interpreted kernels."""
    return interpreted("gaussian_attention")


def make_inputs(
    shape: tuple[int, int] = (5, 7),
    images: int = 2,
    heads: int = 3,
    queries: int = 7,
    channels: tuple[int, int] = (8, 8),
    pair_heads: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.float32,
    pair_dtype: torch.dtype | None = None,
    **others: Any,
) -> Inputs:
    """Return random inputs with centers on the map and around it.

    ``channels`` are D and Dv, ``pair_heads`` the heads of centers and precision.
    """
    height, width = shape
    generator = torch.Generator().manual_seed(height * width + queries)
    center_heads, precision_heads = pair_heads or (heads, heads)

    def random(*sizes: int) -> Tensor:
        return torch.randn(images, *sizes, generator=generator)

    centers = (random(center_heads, queries, 2) / 2 + 0.5) * torch.tensor([width, height])
    return Inputs(
        (
            random(heads, queries, channels[0]).to(dtype),
            random(heads, height * width, channels[0]).to(dtype),
            random(heads, height * width, channels[1]).to(dtype),
            centers.to(pair_dtype or dtype),
            (random(precision_heads, queries, 2).square() / 2).to(pair_dtype or dtype),
        ),
        width,
        **others,
    )


def expected_output(inputs: Inputs, leaves: Leaves) -> Tensor:
    """Return the operator in float64, with its (N, S) tensors."""
    query, key, value, centers, precision = leaves
    s = torch.arange(key.shape[2])
    cells = torch.stack((s % inputs.width, s // inputs.width), -1)
    distances = (cells - centers[:, :, :, None]).square()
    logits = query @ key.mT * inputs.scale - (precision[:, :, :, None] * distances).sum(-1)
    if inputs.mask is not None:
        logits = logits.masked_fill(inputs.mask[:, None, None], -torch.inf)
    weights = logits.softmax(-1).nan_to_num()
    if inputs.seed is not None:
        kept = ~dropped(inputs.seed.item(), inputs.dropout_p, logits.shape)
        weights = weights * kept / (1 - inputs.dropout_p)
    return weights @ value


def dropped(seed: int, dropout_p: float, shape: tuple[int, ...]) -> Tensor:
    """Return which weights (B, H, N, S) the hash drops, from int64 arithmetic."""
    word = 2**32 - 1

    def scramble(x: Tensor) -> Tensor:
        return x ^ (x >> 16)

    def mix(x: Tensor) -> Tensor:
        x = scramble(x) * 0x7FEB352D & word
        return scramble((x ^ (x >> 15)) * 0x846CA68B & word)

    rows = torch.arange(shape[0] * shape[1] * shape[2]).view(*shape[:3], 1)
    first = mix(rows ^ (seed & word))
    second = mix(first + (seed >> 32 & word) + 0x9E3779B9 & word)
    x = (torch.arange(shape[3]) * 0x9E3779B9 & word) ^ first
    x = scramble(x) * 0x7FEB352D & word
    x = (x ^ (x >> 15)) + second & word
    return scramble(x * 0x846CA68B & word) < int(dropout_p * 2**32)


def grad_of(out: Tensor) -> Tensor:
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)


def run(kernels: ModuleType, inputs: Inputs) -> tuple[Tensor, ...]:
    """Return the output, its logsumexp and the five gradients."""
    query, key, value, *others = inputs.arguments()
    out, logsumexp = kernels.forward(query, key, value, *others)
    grads = kernels.backward(grad_of(out), query, key, value, out, logsumexp, *others)
    return out, logsumexp, *grads


def check(kernels: ModuleType, inputs: Inputs, tolerance: float | None = None) -> None:
    """Compare output and gradients with the formula's, relative to the largest number in each."""
    tolerance = tolerance or TOLERANCE[inputs.leaves[0].dtype]
    leaves: Any = tuple(leaf.double().requires_grad_() for leaf in inputs.leaves)
    expected = expected_output(inputs, leaves)
    out, _, *grads = run(kernels, inputs)
    wanted = torch.autograd.grad(expected, leaves, grad_of(out).double())
    for name, actual, correct, like in zip(
        ("out", *NAMES),
        (out, *grads),
        (expected, *wanted),
        (inputs.leaves[0], *inputs.leaves),
        strict=True,
    ):
        assert actual.dtype == like.dtype
        correct = correct.detach()
        limit = tolerance * max(1, float(correct.abs().max()))
        assert_close(actual.double(), correct, rtol=0, atol=limit, msg=f"{name}: {{}}".format)


# --- numbers, interpreted -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(5, 7), (9, 1), (1, 1)])
def test_every_dtype_and_odd_maps(kernels, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    check(kernels, make_inputs(shape, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float32_centers_beside_a_low_precision(kernels, dtype: torch.dtype) -> None:
    check(kernels, make_inputs(dtype=dtype, pair_dtype=torch.float32))


@pytest.mark.parametrize("queries", [1, 70])
def test_queries_and_keys_of_several_tiles(kernels, queries: int) -> None:
    check(kernels, make_inputs((9, 8), images=1, heads=2, queries=queries))


@pytest.mark.parametrize("channels", [(1, 1), (20, 5), (3, 33), (24, 256)])
def test_heads_of_any_size(kernels, channels: tuple[int, int]) -> None:
    check(kernels, make_inputs(images=1, heads=2, channels=channels))


@pytest.mark.parametrize("pair_heads", [(1, 1), (1, 3), (3, 1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_centers_and_precision_that_heads_share(kernels, pair_heads, dtype: torch.dtype) -> None:
    check(kernels, make_inputs(pair_heads=pair_heads, dtype=dtype))


def test_tensors_that_are_not_contiguous(kernels) -> None:
    query, key, value, centers, precision = make_inputs().leaves
    pairs = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (centers, precision))
    mask = (torch.arange(70).view(35, 2) % 4 == 0).T
    check(kernels, Inputs((query, key, value, *pairs), 7, mask))


def masks() -> dict[str, Tensor]:
    cells = torch.arange(35)
    return {
        "partial": torch.stack((cells % 7 >= 4, cells // 7 >= 2)),
        "first tile": torch.stack((cells < 33, cells < 20)),
        "whole image": torch.stack((cells >= 0, cells % 7 >= 4)),
    }


@pytest.mark.parametrize("name", masks())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_masks(kernels, name: str, dtype: torch.dtype) -> None:
    check(kernels, make_inputs(dtype=dtype, mask=masks()[name]))


def test_rows_without_keys_are_zero_and_their_logsumexp_is_infinite(kernels) -> None:
    inputs = make_inputs(mask=masks()["whole image"])
    out, logsumexp, *grads = run(kernels, inputs)
    for tensor in (out, *grads):
        assert torch.equal(tensor[0], torch.zeros_like(tensor[0]))
        assert tensor[1].any()
    assert torch.equal(logsumexp[0], torch.full((3, 7), torch.inf))
    assert logsumexp[1].isfinite().all()


def test_logsumexp(kernels) -> None:
    inputs = make_inputs(dtype=torch.float64)
    inputs.leaves[0].zero_()
    inputs.leaves[4].zero_()
    assert_close(run(kernels, inputs)[1], torch.full((2, 3, 7), 35.0).double().log())
    inputs = make_inputs(dtype=torch.bfloat16)
    assert run(kernels, inputs)[1].dtype == torch.float32


@pytest.mark.parametrize("precision", [0.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_flat_and_sharp_gaussians(kernels, precision: float, dtype: torch.dtype) -> None:
    inputs = make_inputs(dtype=dtype)
    inputs.leaves[4].fill_(precision)
    if precision:
        # close to cells, where weights are not all 0 or 1 for rounding to hide behind
        centers = inputs.leaves[3].round().clamp(0, 4) + 0.5
        inputs = inputs._replace(leaves=(*inputs.leaves[:3], centers, inputs.leaves[4]))
    # a logit of 1e4 is rounded to 1e-3, and so is, relatively, a weight
    check(kernels, inputs, 3e-3 if precision and dtype == torch.float32 else None)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-3)])
def test_centers_far_outside(kernels, dtype: torch.dtype, tolerance: float) -> None:
    inputs = make_inputs(dtype=dtype)
    query, key, value, centers, precision = inputs.leaves
    far = centers + torch.tensor([-300, 500], dtype=dtype)
    inputs = inputs._replace(leaves=(query, key, value, far, precision / 1000))
    check(kernels, inputs, tolerance)


@pytest.mark.parametrize("precision", [100.0, 1e4])
def test_a_far_center_on_one_axis_does_not_blur_the_other(kernels, precision: float) -> None:
    """What all cells near the center share, 1e8 and more, must not round their differences."""
    inputs = make_inputs()
    query, key, value, centers, spread = inputs.leaves
    far, steep = centers.clone(), spread.clone()
    far[..., 0], steep[..., 0] = -100, precision
    check(kernels, inputs._replace(leaves=(query, key, value, far, steep)))


def test_bfloat16_rounding_does_not_grow_with_the_distance_of_a_center(kernels) -> None:
    """The output's rounding leaves a sum in the logits' gradients; distances would amplify it."""
    inputs = make_inputs(dtype=torch.bfloat16, pair_dtype=torch.float32)
    query, key, value, centers, precision = inputs.leaves
    far = centers.clone()
    far[..., 0] = -1000
    precision = precision / 100
    precision[..., 0] = 1e-4
    check(kernels, inputs._replace(leaves=(query, key, value, far, precision)))


@pytest.mark.parametrize("dropout_p", [0.3, 0.8])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dropout_follows_the_hash(kernels, dropout_p: float, dtype: torch.dtype) -> None:
    # Around a center in the padding, distances would amplify bfloat16's rounding of the output.
    mask = None if dtype == torch.bfloat16 else masks()["partial"]
    check(kernels, make_inputs(dtype=dtype, mask=mask, dropout_p=dropout_p, seed=SEED))


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63 - 1])
def test_dropout_drops_the_same_weights_for_every_size(kernels, seed: int) -> None:
    """With the unit vectors as values the output is the dropped weights themselves."""
    inputs = make_inputs((9, 8), 1, 2, 70, (4, 72), dropout_p=0.3, seed=torch.tensor([seed]))
    inputs.leaves[2].copy_(torch.eye(72).expand(1, 2, 72, 72))
    inputs.leaves[4].zero_()
    weights, _ = kernels.forward(*inputs.arguments())
    expected = dropped(seed, 0.3, weights.shape)
    assert torch.equal(weights == 0, expected)
    assert abs(expected.double().mean() - 0.3) < 0.02


@pytest.mark.parametrize(
    "sizes",
    [
        {"images": 0},
        {"heads": 0},
        {"queries": 0},
        {"shape": (0, 7)},
        {"shape": (7, 0)},
        {"channels": (0, 8)},
        {"channels": (8, 0)},
    ],
)
def test_empty_inputs(kernels, sizes: dict[str, Any]) -> None:
    inputs = make_inputs(**sizes, dropout_p=0.5, seed=SEED)
    out, logsumexp, *grads = run(kernels, inputs)
    if inputs.leaves[1].shape[2] == 0:
        assert torch.equal(out, torch.zeros(2, 3, 7, 8))
        assert torch.equal(logsumexp, torch.full((2, 3, 7), torch.inf))
    for gradient, leaf in zip(grads, inputs.leaves, strict=True):
        assert gradient.shape == leaf.shape
        assert gradient.isfinite().all()
    if sizes != {"channels": (0, 8)}:
        assert not any(gradient.any() for gradient in grads)


def test_runs_are_equal_in_every_bit(kernels, monkeypatch) -> None:
    """Neither does it matter in which order the programs of a grid run."""
    inputs = make_inputs((9, 8), 1, 2, 40, pair_heads=(1, 1), dropout_p=0.3, seed=SEED)
    first = run(kernels, inputs)
    builder = pytest.importorskip("triton.runtime.interpreter").interpreter_builder
    set_index = builder.set_grid_idx
    monkeypatch.setattr(
        builder, "set_grid_idx", lambda x, y, z: set_index(builder.grid_dim[0] - 1 - x, y, z)
    )
    for one, other in zip(first, run(kernels, inputs), strict=True):
        assert torch.equal(one, other)


RECORDED = (
    "independent_5x7",
    "single_7x3",
    "fixed_9x5",
    "tiny_scales",
    "large_scales",
    "centres_outside",
    "beta_1",
    "beta_32",
    "negative_and_zero_scales",
    "head_shared",
    "one_row_4heads",
    "bigger",
)
FLOAT64_TOO = ("large_scales", "one_row_4heads")


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, torch.float32) for case in RECORDED] + [(case, torch.float64) for case in FLOAT64_TOO],
)
def test_recorded_cases(kernels, reference_dir: Path, case: str, dtype: torch.dtype) -> None:
    facts = json.loads((reference_dir / "smca" / "attention.json").read_text())[case]
    with np.load(reference_dir / "smca" / "attention.npz") as file:
        recorded = {key.rpartition("/")[2]: file[key] for key in file if key.startswith(f"{case}/")}
    arrays = {name: torch.from_numpy(array) for name, array in recorded.items()}
    query, key, value, centers = (arrays[name].to(dtype) for name in ("q", "k", "v", "centres"))
    scales = arrays.get("scales", torch.ones_like(centers)).to(dtype).requires_grad_()
    precision = (scales.square() / facts["beta"]).expand_as(centers)
    leaves = (query, key, value, centers, precision.detach())
    width, scale = facts["levels"][0][1], query.shape[-1] ** -0.5
    arguments = Inputs(leaves, width, arrays.get("key_padding_mask"), scale).arguments()
    out, logsumexp = kernels.forward(*arguments)
    grad_out = arrays["upstream_grad"].to(dtype).unflatten(2, (query.shape[1], -1)).transpose(1, 2)
    grads = kernels.backward(grad_out, *arguments[:3], out, logsumexp, *arguments[3:])
    (grad_scales,) = torch.autograd.grad(precision, scales, grads[4])
    actual = {"out": out.transpose(1, 2).flatten(2), "grad_scales": grad_scales}
    actual |= zip(("grad_q", "grad_k", "grad_v", "grad_centres"), grads, strict=False)
    checked = actual.keys() & arrays.keys()
    assert len(checked) == 6 - (facts["mode"] == "fixed")
    for name in checked:
        limit = max(1, facts["max_abs"][name]) * 1e-6
        if dtype == torch.float32:
            # Where biases are huge, so is their rounding, in the formula as well.
            limit += 8 * facts["float32_run_max_abs_diff"][name]
        assert_close(
            actual[name].double(), arrays[name], rtol=0, atol=limit, msg=f"{name}: {{}}".format
        )


# --- machine code, compiled -----------------------------------------------------------------------


def launch(kernels: ModuleType, inputs: Inputs) -> None:
    query, key, value, *others = inputs.arguments()
    out, logsumexp = kernels.forward(query, key, value, *others)
    kernels.backward(out, query, key, value, out, logsumexp, *others)


def sized(shape: tuple[int, int], images: int, queries: int, **others: Any) -> Inputs:
    return make_inputs(shape, images, 8, queries, (32, 32), **others)


@pytest.mark.parametrize("with_dropout", [False, True])
@pytest.mark.parametrize(
    ("dtype", "instruction"),
    [(torch.float32, r"fma\.rn\.f32"), (torch.bfloat16, r"wgmma\.mma_async\S*\.bf16")],
)
def test_kernels_compile(compiled, compile_only, dtype, instruction: str, with_dropout) -> None:
    """Full float32 needs ordinary arithmetic; bfloat16 goes to the tensor cores of an H100."""
    launched = compile_only(90)
    inputs = sized((25, 34), 8, 300, dtype=dtype, mask=torch.zeros(8, 850, dtype=torch.bool))
    if with_dropout:
        inputs = inputs._replace(dropout_p=0.1, seed=SEED)
    launch(compiled("gaussian_attention"), inputs)
    assert [kernel.name for kernel in launched] == [
        "forward_kernel",
        "query_kernel",
        "key_kernel",
    ]
    for kernel in launched:
        assert len(kernel.asm["cubin"]) > 1000
        assert re.search(instruction, kernel.asm["ptx"])
        assert not re.search(r"\b(?:atom|red)\.global", kernel.asm["ptx"])
        assert re.search(r"ld\.global\S*v4|cp\.async\S* .*, 0x10", kernel.asm["ptx"])


def test_float32_uses_tf32_where_the_user_allows_it(compiled, compile_only) -> None:
    launched = compile_only(90)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        launch(compiled("gaussian_attention"), sized((5, 7), 8, 300))
    finally:
        torch.set_float32_matmul_precision(before)
    assert len(launched) == 3
    for kernel in launched:
        assert "tf32" in kernel.asm["ptx"]
        assert len(kernel.asm["cubin"]) > 1000


def test_float64_compiles(compiled, compile_only) -> None:
    launched = compile_only(90)
    launch(compiled("gaussian_attention"), make_inputs(dtype=torch.float64))
    assert len(launched) == 3
    assert all(len(kernel.asm["cubin"]) > 1000 for kernel in launched)


def test_kernels_are_compiled_once_for_all_sizes(compiled, compile_only) -> None:
    launched = compile_only(90)
    kernels = compiled("gaussian_attention")
    for images, queries, shape in [(4, 301, (25, 34)), (8, 304, (16, 64)), (16, 300, (511, 1))]:
        launch(kernels, sized(shape, images, queries, dtype=torch.bfloat16))
    assert len(launched) == 9
    assert len({kernel.hash for kernel in launched}) == 3


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("channels", [16, 32, 64, 128, 256])
def test_tiles_are_small_only_where_programs_are_few(compiled, channels: int, dtype) -> None:
    tiling = compiled("gaussian_attention")._tiling
    rows = [tiling(places, 300, channels, dtype)[0] for places in (1, 8, 16, 64, 512)]
    assert rows == sorted(rows)
    if dtype != torch.float64:
        assert rows[1] == 16  # of one image with 8 heads, 300 queries: 152 programs
