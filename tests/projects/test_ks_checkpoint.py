"""The released key layout, full size: every released configuration becomes ours."""

import json

import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig, instantiate
from full_size import without_storage
from tiny_detectors import ROOT, SETTINGS, build_conditional

from detectors.conversion.convert import convert
from detectors.conversion.layout import ConversionError
from projects.ks_detr.checkpoint import KS_DETR, from_released, plain_state_dict
from projects.ks_detr.encoder import share_knowledge
from tools.convert_checkpoint import LAYOUTS

RELEASED = {
    "ks_conditional_detr_r50_triple": ("conditional_detr_r50_50ep", None),
    "ks_dab_detr_r50_triple": ("dab_detr_r50_50ep", None),
    "ks_dab_detr_r101_triple": ("dab_detr_r101_50ep", None),
    "ks_dab_detr_r101_dual_share_v": ("dab_detr_r101_50ep", ["share_v"]),
    "ks_dab_detr_r101_dual_share_a": ("dab_detr_r101_50ep", ["share_a"]),
    "ks_dab_detr_swin_tiny_triple": ("dab_detr_swin_t_in1k_50ep", None),
    "ks_dn_detr_r50_triple": ("dn_detr_r50_50ep", None),
    "ks_deformable_detr_r50_triple": ("deformable_detr_r50_50ep", None),
    "ks_dn_deformable_detr_r50_triple": ("dn_deformable_detr_r50_12ep", None),
}
"""By record: our baseline and the branches of a dual attention."""


class Release:
    """A record of keys and shapes, and our config for it, with teachers and without."""

    def __init__(self, folder, name):
        self.record = json.loads((folder / f"ks_detr/checkpoint_keys/{name}.json").read_text())
        self.shapes = {key: shape for key, (shape, _) in self.record["state_dict"].items()}
        baseline, self.branches = RELEASED[name]
        self.path = str(ROOT / f"projects/baselines/configs/{baseline}.py")

    def model(self, teachers=True):
        """The detector without storage."""
        node = LazyConfig.load(self.path).model
        if teachers:
            options = {} if self.branches is None else {"branches": self.branches}
            encoder = node.transformer.encoder
            node.transformer.encoder = L(share_knowledge)(encoder=encoder, **options)
        with without_storage():
            return instantiate(node)

    def weights(self):
        """One number for all of a weight, another one for the rows of a packed teacher."""
        values = {
            key: torch.full((1,), float(index)).expand(shape)
            for index, (key, shape) in enumerate(self.shapes.items(), start=1)
        }
        for key, about in self.record["sliced_keys"].items():
            values[key] = values[key].clone()
            values[key][about["keep_rows"][1] :] *= -1
        for alias, *others in self.record["tied_groups"]:
            values |= dict.fromkeys(others, values[alias])
        return values


@pytest.fixture(scope="module", params=RELEASED)
def release(request):
    return Release(request.getfixturevalue("reference_dir"), request.param)


def test_every_released_key_is_one_of_ours(release):
    model, record = release.model(), release.record
    released = {key: torch.empty(shape, device="meta") for key, shape in release.shapes.items()}
    ours = {key: value.shape for key, value in model.state_dict().items()}
    assert {key: value.shape for key, value in from_released(released).items()} == ours
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == record["trainable_parameters"]
    teachers = ours.keys() - plain_state_dict(ours).keys()
    extra = sum(ours[key].numel() for key in teachers)
    assert extra == record["extra_training_only_parameters"]


def test_released_keys_are_in_this_layout_alone(release):
    assert [name for name, x in LAYOUTS.items() if x.recognise(release.shapes)] == ["ks-detr"]


def test_released_weights_become_the_training_and_the_plain_detector(release):
    weights, lines = release.weights(), []
    full = convert(weights, KS_DETR, release.model(), report=lines.append)
    assert not lines
    plain = convert(weights, KS_DETR, release.model(teachers=False), report=lines.append)
    teachers = full.keys() - plain.keys()
    extra = sum(full[key].numel() for key in teachers)
    assert extra == release.record["extra_training_only_parameters"]
    (line,) = lines
    assert line.startswith(f"{len(teachers)} weights only training uses are left out: ")
    assert all(key in line for key in teachers)
    sliced = release.record["sliced_keys"]
    for key, value in plain.items():
        assert torch.equal(full[key], value), key
        expected = weights[key][: sliced[key]["keep_rows"][1]] if key in sliced else weights[key]
        assert torch.equal(value, expected), key
    values = {full[key].unique().item() for key in teachers}
    rest = release.record["training_only_keys"]
    assert values == {weights[key].unique().item() for key in rest} | {
        weights[key].min().item() for key in sliced
    }


def test_other_branches_than_the_models_are_refused(reference_dir):
    weights = Release(reference_dir, "ks_dab_detr_r101_dual_share_a").weights()
    model = Release(reference_dir, "ks_dab_detr_r101_dual_share_v").model()
    with pytest.raises(
        ConversionError, match=r"2 weights are of another shape .*\(256, 256\), exp"
    ):
        convert(weights, KS_DETR, model)


def test_teacher_features_that_the_model_lacks_are_no_surplus_to_be_dropped():
    model = build_conditional(SETTINGS, {})
    share_knowledge(model.transformer.encoder, teacher_features="mark")
    state = model.state_dict()
    features = {f"ksgt.smlp_module.token_split_conv.linear.0.{x}": torch.ones(1) for x in "wb"}
    with pytest.raises(ConversionError, match=r"2 .* unknown to the model: .*features\.linear\.w,"):
        convert(state | features, KS_DETR, model)


def test_files_of_something_else_are_refused_in_one_line():
    model = build_conditional(SETTINGS, {})
    packed = "transformer.encoder.layers.0.attentions.0.attn.in_proj_weight"
    with pytest.raises(ConversionError, match="of the model's weights are missing: "):
        convert({packed: model.state_dict()[packed]}, KS_DETR, model)
    with pytest.raises(ConversionError, match=r"1 .* unknown to the model: layer\.weight$"):
        convert({"layer.weight": torch.ones(1)}, KS_DETR, model)


def test_a_plain_state_dict_stays_as_it_is():
    state = build_conditional(SETTINGS, {}).state_dict()
    converted = from_released(state)
    assert converted.keys() == state.keys()
    assert all(torch.equal(converted[key], value) for key, value in state.items())
