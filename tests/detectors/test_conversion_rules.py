"""What becomes of keys, rows and shared weights, and what is refused."""

import json

import pytest
import torch
from conversion_cases import ROWS, read_facts, recipe, tiny_config
from detectron2.config import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from detectors.conversion.convert import convert
from detectors.conversion.layout import ConversionError, Layout, Rule, joined, recognise
from detectors.conversion.resnet import to_detectron2
from tools.convert_checkpoint import LAYOUTS

OFFICIAL = read_facts("official")


@pytest.fixture(scope="module")
def detr():
    return instantiate(tiny_config("detr_r50_300ep"))


@pytest.fixture
def weights():
    facts = OFFICIAL["detr"]
    return recipe(facts["shapes"], facts["aliases"])


def converted(weights, model, layout="detr"):
    return convert(weights, LAYOUTS[layout], model)


# --- recognition --------------------------------------------------------------------------------


@pytest.mark.parametrize("case", OFFICIAL)
def test_official_keys_are_in_one_layout_alone(case: str) -> None:
    facts = OFFICIAL[case]
    keys = [*facts["shapes"], *facts["aliases"]]
    assert [name for name, x in LAYOUTS.items() if x.recognise(keys)] == [facts["layout"]]


def test_what_detrex_writes_stays_as_it_is(reference_dir) -> None:
    for record in sorted((reference_dir / "detrex/checkpoint_keys").glob("*.json")):
        keys = json.loads(record.read_text())["keys"]
        layout = recognise(keys, LAYOUTS.values())
        assert layout.name == "detrex", record.name
        assert all(layout.target(key).key == key for key in keys)


@pytest.mark.parametrize("config", ["conditional_detr_r50_50ep", "deformable_detr_r50_50ep"])
def test_our_own_weights_pass_unchanged(config: str) -> None:
    model = instantiate(tiny_config(config))
    state = model.state_dict()
    layout = recognise(state, LAYOUTS.values())
    assert layout.name == "detrex"
    found = convert(state, layout, model)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], value) for key, value in state.items())


def test_unknown_files_are_refused_with_the_layouts_that_there_are() -> None:
    with pytest.raises(ConversionError, match=r"layer\.weight.*none of the layouts detrex, detr, "):
        recognise(["layer.weight"], LAYOUTS.values())
    two = [Layout(name, "", ("a",), ()) for name in ("first", "second")]
    with pytest.raises(ConversionError, match=r"several layouts \(first, second\)"):
        recognise(["a"], two)


# --- keys ---------------------------------------------------------------------------------------


def test_keys_that_are_not_understood_are_listed(detr, weights) -> None:
    weights |= {"mask_head.lay1.weight": torch.zeros(1), "bbox_attention.q": torch.zeros(1)}
    with pytest.raises(ConversionError) as error:
        converted(weights, detr)
    assert "2 keys are not understood as detr: mask_head.lay1.weight, bbox_attention.q" in str(
        error.value
    )


@settings(max_examples=15, deadline=None)
@given(dropped=st.sampled_from(sorted(OFFICIAL["detr"]["shapes"])))
def test_any_missing_key_is_named(detr, dropped: str) -> None:
    shapes = {key: value for key, value in OFFICIAL["detr"]["shapes"].items() if key != dropped}
    ours = to_detectron2(LAYOUTS["detr"].target(dropped).key)
    with pytest.raises(ConversionError) as error:
        converted(recipe(shapes), detr)
    assert str(error.value) == f"1 of the model's weights are missing: {ours}"


def test_long_lists_end_with_their_number(detr) -> None:
    with pytest.raises(ConversionError, match=r"30 keys .*: k0, .*, k19 and 10 more"):
        converted({f"k{index}": torch.zeros(1) for index in range(30)}, detr)


def test_other_numbers_of_things_are_named(detr, weights) -> None:
    weights["query_embed.weight"] = torch.zeros(9, 256)
    with pytest.raises(ConversionError, match=r"query_embed.weight is \(9, 256\), .* \(7, 256\)"):
        converted(weights, detr)


def test_more_layers_than_the_model_has_are_named(weights) -> None:
    config = tiny_config("detr_r50_300ep")
    config.transformer.decoder.num_layers = 1
    with pytest.raises(ConversionError, match=r"18 .* unknown to the model: .*decoder.layers.1\."):
        converted(weights, instantiate(config))


def test_precision_is_the_models(detr, weights) -> None:
    half = {key: value.half() for key, value in weights.items()}
    found = converted(half, detr)
    assert {value.dtype for value in found.values()} == {torch.float32}
    assert torch.equal(found["query_embed.weight"], half["query_embed.weight"].float())


def test_results_are_no_views_of_something_larger(detr, weights) -> None:
    one = torch.cat([value.flatten() for value in weights.values()])
    parts = one.split([value.numel() for value in weights.values()])
    views = {key: part.view_as(weights[key]) for key, part in zip(weights, parts, strict=True)}
    found = converted(views, detr)
    assert all(value.untyped_storage().nbytes() == value.nbytes for value in found.values())


def test_counters_of_batches_are_dropped(detr, weights) -> None:
    expected = converted(weights, detr)
    weights["backbone.0.body.bn1.num_batches_tracked"] = torch.tensor(3)
    assert converted(weights, detr).keys() == expected.keys()


def test_the_model_is_not_changed(detr, weights) -> None:
    before = {key: value.clone() for key, value in detr.state_dict().items()}
    converted(weights, detr)
    assert all(torch.equal(before[key], value) for key, value in detr.state_dict().items())


# --- tensors ------------------------------------------------------------------------------------


def test_the_background_stays_last(detr, weights) -> None:
    weights["class_embed.bias"] = torch.arange(92.0)
    assert converted(weights, detr)["class_embed.bias"].tolist() == [*ROWS, 91]


def test_a_head_with_background_is_none_without(detr, weights, monkeypatch) -> None:
    monkeypatch.setitem(detr._modules, "class_embed", nn.Linear(256, 80))
    assert len(weights["class_embed.bias"]) == 92
    with pytest.raises(ConversionError, match=r"class_embed\.bias is \(92,\), expected \(80,\)"):
        converted(weights, detr)


def test_a_head_of_contiguous_classes_passes_unchanged(detr, weights) -> None:
    weights["class_embed.bias"] = torch.arange(81.0)
    weights["class_embed.weight"] = weights["class_embed.weight"][:81]
    assert converted(weights, detr)["class_embed.bias"].tolist() == [*range(81)]


def test_what_only_training_uses_is_left_out_where_the_model_has_none() -> None:
    layout = Layout("aided", "", (), (Rule("(.*)", r"\1"),), training_only=(r"aid\..+",))
    lines: list[str] = []
    weights = nn.ModuleDict({"aid": nn.Linear(2, 3), "body": nn.Linear(2, 2)}).state_dict()
    whole = convert(weights, layout, nn.ModuleDict({"body": nn.Linear(2, 2)}), lines.append)
    assert [*whole] == ["body.weight", "body.bias"]
    assert lines == ["2 weights only training uses are left out: aid.weight, aid.bias"]
    narrow = nn.Module()
    narrow.body, narrow.aid = nn.Linear(2, 2), nn.Linear(2, 3, bias=False)
    with pytest.raises(ConversionError, match=r"1 converted weights are unknown .*: aid\.bias$"):
        convert(weights, layout, narrow)


def test_all_weights_are_unpacked_before_the_rules() -> None:
    def unpack(weights):
        first, second = weights["both"]
        return {"body.weight": first, "body.bias": second}

    layout = Layout("packed", "", ("both",), (Rule(r"body\.(.*)", r"\1"),), unpack=unpack)
    packed = {"both": torch.arange(4.0).view(2, 2)}
    assert recognise(packed, [layout]) is layout
    state = convert(packed, layout, nn.LayerNorm(2))
    assert {key: value.tolist() for key, value in state.items()} == {
        "weight": [0, 1],
        "bias": [2, 3],
    }


def test_parts_are_joined_in_the_order_of_query_key_value() -> None:
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.MultiheadAttention(2, 1)])

    rules = joined("their", "layers", {"attention": "0"})
    rules = tuple(Rule(x.pattern, x.replacement.replace(r"\1.0", "0"), x.part) for x in rules)
    layout = Layout("parts", "", (), (*rules, Rule(r"(layers\..*)", r"\1")))
    weights = {
        "layers.0.out_proj.weight": torch.zeros(2, 2),
        "layers.0.out_proj.bias": torch.ones(2),
    }
    for value, name in ((2.0, "k"), (3.0, "v"), (1.0, "q")):
        weights[f"their.0.attention.{name}_proj.weight"] = torch.full((2, 2), value)
        weights[f"their.0.attention.{name}_proj.bias"] = torch.full((2,), value)
    state = convert(weights, layout, Packed())
    assert state["layers.0.in_proj_bias"].tolist() == [1, 1, 2, 2, 3, 3]
    del weights["their.0.attention.k_proj.bias"]
    with pytest.raises(ConversionError, match=r"in_proj_bias is \(4,\), expected \(6,\)"):
        convert(weights, layout, Packed())


def test_shared_heads_must_be_equal() -> None:
    facts = OFFICIAL["deformable_detr_box_refine"]
    weights = recipe(facts["shapes"], facts["aliases"])
    model = instantiate(tiny_config("deformable_detr_r50_50ep"))
    for key in [*weights]:  # which only the refining decoder knows
        if key.startswith("transformer.decoder.bbox_embed."):
            del weights[key]
    with pytest.raises(
        ConversionError, match=r"(class|bbox)_embed\.0\..* differ .* another variant"
    ):
        converted(weights, model, "deformable-detr")


def test_one_class_head_stands_for_all_only_if_it_is_alone() -> None:
    tied = Layout(
        "tied", "", (), (Rule("(.*)", r"\1"),), tied=(Rule(r"\d\.(weight|bias)", r"0.\1"),)
    )
    model = nn.ModuleList(nn.Linear(2, 3) for _ in range(3))
    state = model.state_dict()
    first = {key: state[key] for key in ("0.weight", "0.bias")}
    found = convert(first, tied, model)
    assert all(torch.equal(found[f"{n}.weight"], first["0.weight"]) for n in range(3))
    with pytest.raises(ConversionError, match=r"missing: 1\.weight$"):
        convert({key: value for key, value in state.items() if key != "1.weight"}, tied, model)
