"""The released key layout, full size: every released configuration becomes ours."""

import json

import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig, instantiate
from tiny_detectors import ROOT, SETTINGS, build_conditional

from projects.ks_detr.checkpoint import from_released, plain_state_dict
from projects.ks_detr.encoder import share_knowledge

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


@pytest.mark.parametrize("name", RELEASED)
def test_every_released_key_is_one_of_ours(name, reference_dir):
    baseline, branches = RELEASED[name]
    config = LazyConfig.load(str(ROOT / f"projects/baselines/configs/{baseline}.py"))
    options = {} if branches is None else {"branches": branches}
    encoder = config.model.transformer.encoder
    config.model.transformer.encoder = L(share_knowledge)(encoder=encoder, **options)
    with torch.device("meta"):
        model = instantiate(config.model)
    record = json.loads((reference_dir / f"ks_detr/checkpoint_keys/{name}.json").read_text())
    shapes = record["state_dict"]
    released = {key: torch.empty(shape, device="meta") for key, (shape, _) in shapes.items()}
    ours = {key: value.shape for key, value in model.state_dict().items()}
    assert {key: value.shape for key, value in from_released(released).items()} == ours
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == record["trainable_parameters"]
    teachers = ours.keys() - plain_state_dict(ours).keys()
    extra = sum(ours[key].numel() for key in teachers)
    assert extra == record["extra_training_only_parameters"]


def test_a_plain_state_dict_stays_as_it_is():
    state = build_conditional(SETTINGS, {}).state_dict()
    converted = from_released(state)
    assert converted.keys() == state.keys()
    assert all(torch.equal(converted[key], value) for key, value in state.items())
