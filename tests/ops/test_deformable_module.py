"""The attention layer against detrex's recorded one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from recorded_cases import close
from torch import Tensor

import ops

LEVELS = ((5, 7), (3, 4))
CASES = [
    "msda_ref2_batch_first_True",
    "msda_ref2_batch_first_False",
    "msda_ref4_batch_first_True",
    "msda_ref4_batch_first_False",
    "msda_self_value_none",
]


@pytest.fixture(params=["project first", "sample first"])
def order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the layer does first, on input of any size."""
    first = request.param == "sample first"
    monkeypatch.setattr(ops.deformable_module, "samples_first", lambda *_: first)
    return request.param


@pytest.mark.parametrize("case", CASES)
def test_recorded_outputs_and_gradients(layer_cases, backend: str, order: str, case: str) -> None:
    layer = ops.MultiScaleDeformableAttention(**layer_cases.facts[case]["constructor"])
    layer_cases.check_module(case, layer)


def test_initial_values(layer_cases) -> None:
    facts = layer_cases.facts["msda_default_init"]["constructor"]
    layer = ops.MultiScaleDeformableAttention(**facts)
    expected = layer_cases.arrays("msda_default_init", "out")["sampling_offsets_bias"]
    close(layer.sampling_offsets.bias, expected.flatten())
    for name, parameter in layer.named_parameters():
        random = name in ("value_proj.weight", "output_proj.weight")
        if name != "sampling_offsets.bias":
            assert bool((parameter != 0).any()) == random, name
    bound = (6 / (2 * 32)) ** 0.5
    for weight in (layer.value_proj.weight, layer.output_proj.weight):
        assert 0.9 * bound < float(weight.detach().abs().max()) <= bound
    assert layer.dropout.p == 0.1
    assert not layer.batch_first


def call(layer: torch.nn.Module, images=2, queries=6, **options) -> Tensor:
    """Run a batch-first layer on reproducible input."""
    generator = torch.Generator().manual_seed(0)
    dtype = layer.output_proj.weight.dtype
    defaults = {
        "query": torch.randn(images, queries, 16, generator=generator).to(dtype),
        "value": torch.randn(images, 47, 16, generator=generator).to(dtype),
        "reference_points": torch.rand(images, queries, 2, 2, generator=generator),
        "spatial_shapes": LEVELS,
    }
    return layer(**(defaults | options))


@pytest.fixture
def layer(order: str) -> ops.MultiScaleDeformableAttention:
    torch.manual_seed(0)
    layer = ops.MultiScaleDeformableAttention(16, 2, 2, 3, dropout=0.0, batch_first=True)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return layer


def test_padding_is_as_good_as_zero_values(layer) -> None:
    mask = torch.zeros(2, 47, dtype=torch.bool)
    mask[1, 20:] = True
    noise = torch.randn(2, 47, 16)
    changed = torch.where(mask[..., None], torch.nan, noise)
    output = call(layer, value=changed, key_padding_mask=mask)
    torch.testing.assert_close(output, call(layer, value=noise, key_padding_mask=mask))
    assert not torch.allclose(output, call(layer, value=noise))
    with torch.no_grad():  # the path without a graph masks in place too
        torch.testing.assert_close(output, call(layer, value=noise, key_padding_mask=mask))


def test_gradients_pass_the_padding(layer) -> None:
    layer.double()
    mask = torch.zeros(2, 47, dtype=torch.bool)
    mask[0, 30:] = True
    value = torch.randn(2, 47, 16, dtype=torch.float64, requires_grad=True)
    references = torch.rand(2, 6, 2, 4, dtype=torch.float64, requires_grad=True)

    def outputs(value: Tensor, references: Tensor) -> Tensor:
        return call(layer, value=value, reference_points=references, key_padding_mask=mask)

    assert torch.autograd.gradcheck(outputs, (value, references))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_layers_keep_precise_locations(layer, dtype: torch.dtype) -> None:
    expected = call(layer)
    output = call(layer.to(dtype))
    assert output.dtype == dtype
    torch.testing.assert_close(output.float(), expected, atol=0.1, rtol=0.1)
    query = torch.zeros(2, 6, 16, dtype=dtype)
    references = torch.full((2, 6, 2, 2), 0.123456)
    locations = layer.sampling_locations(query, references, LEVELS)
    assert locations.dtype == torch.float32


def test_autocast(layer) -> None:
    expected = call(layer)
    with torch.autocast("cpu", torch.bfloat16):
        output = call(layer)
    torch.testing.assert_close(output.float(), expected, atol=0.1, rtol=0.1)


def test_dropout_acts_on_the_output_before_the_sum(layer) -> None:
    layer.double().dropout.p = 0.5
    identity = torch.randn(2, 6, 16, dtype=torch.float64)
    torch.manual_seed(0)
    dropped, whole = (
        call(layer.train(mode), identity=identity) - identity for mode in (True, False)
    )
    kept = dropped != 0
    assert 0.4 < kept.double().mean() < 0.6
    torch.testing.assert_close(dropped[kept], 2 * whole[kept])


def test_a_value_that_is_projected_again_is_the_same(layer) -> None:
    layer.double()
    value = torch.randn(2, 47, 16, dtype=torch.float64, requires_grad=True)
    mask = torch.zeros(2, 47, dtype=torch.bool)
    mask[1, 20:] = True
    results, kept = [], []
    for layer.checkpoint_value in (False, True):
        with kept_bytes(value) as count:
            output = call(layer, value=value, key_padding_mask=mask)
        kept.append(count())
        inputs = [value, *layer.parameters()]
        results.append([output, *torch.autograd.grad(output.square().sum(), inputs)])
    torch.testing.assert_close(*results, rtol=1e-14, atol=1e-14)
    assert kept[0] - kept[1] >= value.untyped_storage().nbytes()
    assert torch.equal(call(layer.eval(), value=value, key_padding_mask=mask), results[0][0])


@contextmanager
def kept_bytes(known: Tensor) -> Iterator[Callable[[], int]]:
    """Yield what tells how much memory the block kept for its backward pass beside ``known``."""
    kept: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield lambda: sum(
            tensor.untyped_storage().nbytes()
            for place, tensor in kept.items()
            if place != known.untyped_storage().data_ptr()
        )


@pytest.mark.parametrize("masked", [False, True])
def test_few_queries_sample_first(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order is chosen by size alone, and results do not tell which one it was."""
    torch.manual_seed(0)
    layer = ops.MultiScaleDeformableAttention(32, 4, 2, 2, dropout=0.0, batch_first=True).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    value = torch.randn(2, 400, 32, dtype=torch.float64, requires_grad=True)
    queries = torch.randn(2, 51, 32, dtype=torch.float64, requires_grad=True)
    references = torch.rand(2, 51, 2, 2, dtype=torch.float64) * 1.2 - 0.1
    padding = {"key_padding_mask": torch.rand(2, 400) < 0.3} if masked else {}
    outputs, projected = [], []
    project = layer.project_value
    monkeypatch.setattr(
        layer, "project_value", lambda *tensors: projected.append(len(outputs)) or project(*tensors)
    )
    for count in (50, 51):
        outputs.append(
            layer(
                queries[:, :count],
                value=value,
                reference_points=references[:, :count],
                spatial_shapes=((16, 20), (8, 10)),
                **padding,
            )
        )
    assert projected == [1]  # all tokens, for the second output alone
    # a query has 16 points of 4 corners each: 50 * 64 is a quarter of 400 * 32
    locations = torch.empty(2, 51, 4, 2, 2, 2)
    assert ops.deformable_module.samples_first(value, locations[:, :50])
    assert not ops.deformable_module.samples_first(value, locations)
    torch.testing.assert_close(outputs[0], outputs[1][:, :50], rtol=1e-12, atol=1e-12)
    inputs = [queries, value, *layer.parameters()]
    grads = [torch.autograd.grad(o[:, :50].square().sum(), inputs) for o in outputs]
    torch.testing.assert_close(*grads, rtol=1e-11, atol=1e-11)


class Adapted(torch.nn.Module):
    """A layer with something added, which passes on its weights."""

    def __init__(self, layer: torch.nn.Linear) -> None:
        super().__init__()
        self.layer, self.extra = layer, torch.nn.Linear(16, layer.out_features)
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, tokens: Tensor) -> Tensor:
        return self.layer(tokens) + self.extra(tokens)


@pytest.mark.parametrize("name", ["value_proj", "sampling_offsets"])
def test_what_stands_in_for_a_layer_is_called(layer, name: str) -> None:
    before = call(layer)
    plain = getattr(layer, name)
    setattr(layer, name, Adapted(plain))
    output = call(layer)
    assert not torch.allclose(output, before)
    output.sum().backward()
    assert getattr(layer, name).extra.weight.grad.any()
    setattr(layer, name, plain)
    handle = plain.register_forward_hook(lambda module, inputs, found: found * 0)
    assert not torch.allclose(call(layer), before)
    handle.remove()
    assert torch.equal(call(layer), before)
    setattr(layer, name, torch.nn.Linear(16, plain.out_features, bias=False))
    assert call(layer).isfinite().all()


def test_the_value_is_not_overwritten_where_nothing_projects_it(layer) -> None:
    layer.value_proj = torch.nn.Identity()
    value, mask = torch.randn(2, 47, 16), torch.ones(2, 47, dtype=torch.bool)
    given = value.clone()
    call(layer, value=value, key_padding_mask=mask)
    assert torch.equal(value, given)


def test_masks_can_be_mapped(layer) -> None:
    masks = torch.rand(3, 2, 47) < 0.5
    mapped_call = torch.func.vmap(
        lambda mask: call(layer, key_padding_mask=mask), randomness="same"
    )
    found = mapped_call(masks)
    for mapped, mask in zip(found, masks, strict=True):
        torch.testing.assert_close(mapped, call(layer, key_padding_mask=mask))


@pytest.mark.parametrize("coordinates", [2, 4])
def test_a_level_without_cells_leaves_gradients_finite(layer, coordinates: int) -> None:
    references = torch.full((2, 6, 2, coordinates), 0.4)
    shapes = ((47, 1), (0, 0))
    call(layer, reference_points=references, spatial_shapes=shapes).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad.isfinite().all(), name


def test_exports_with_any_number_of_queries() -> None:
    layer = ops.MultiScaleDeformableAttention(16, 2, 2, 3, dropout=0.0, batch_first=True)
    values = torch.randn(1, 47, 16)

    class Attention(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, query: Tensor, references: Tensor) -> Tensor:
            return self.layer(
                query, value=values, reference_points=references, spatial_shapes=LEVELS
            )

    def inputs(count: int) -> tuple[Tensor, Tensor]:
        return torch.randn(1, count, 16), torch.rand(1, count, 2, 2)

    count = torch.export.Dim("count", min=2, max=2000)
    exported = torch.export.export(Attention(), inputs(600), dynamic_shapes=({1: count},) * 2)
    for queries in (2, 500):
        given = inputs(queries)
        torch.testing.assert_close(exported.module()(*given), Attention()(*given))


def test_compiles_without_a_graph_break(layer) -> None:
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for images, queries in ((1, 4), (3, 6), (2, 9)):
        torch.testing.assert_close(call(compiled, images, queries), call(layer, images, queries))


def test_bad_input_is_one_line(layer) -> None:
    with pytest.raises(ValueError, match="num_heads 3 does not divide embed_dim 16"):
        ops.MultiScaleDeformableAttention(16, 3)
    with pytest.raises(ValueError, match="reference_points is None"):
        call(layer, reference_points=None)
    with pytest.raises(ValueError, match="spatial_shapes is None"):
        call(layer, spatial_shapes=None)
    with pytest.raises(ValueError, match=r"reference_points has shape \(2, 6, 3, 2\), expected"):
        call(layer, reference_points=torch.rand(2, 6, 3, 2))
    with pytest.raises(ValueError, match=r"reference_points has shape .*, expected \(B, N, V, 2\)"):
        call(layer, reference_points=torch.rand(2, 6, 2, 3))
    with pytest.raises(ValueError, match=r"key_padding_mask has shape \(2, 46\), expected"):
        call(layer, key_padding_mask=torch.zeros(2, 46, dtype=torch.bool))
    with pytest.raises(ValueError, match="spatial_shapes has 48 cells in all, expected S = 47"):
        call(layer, spatial_shapes=((6, 6), (3, 4)))
