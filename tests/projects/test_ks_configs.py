"""KS-DETR's configs: one for each row of the paper's tables, with the released settings."""

import functools
import json
import re

import pytest
from detectron2.config import LazyConfig, instantiate
from full_size import without_storage
from omegaconf import OmegaConf
from tiny_detectors import ROOT

FOLDER = ROOT / "projects/ks_detr/configs"
TEACHERS = ("share_v", "share_a")
DENSE, DEFORMABLE = 263_168, 164_480
# trainable parameters, those of the plain detector, those that exist in training only
PARAMETERS = {
    "ks_conditional_detr_r50_50ep": (43_669_334, 43_406_166, DENSE),
    "ks_conditional_detr_r101_50ep": (62_609_238, 62_346_070, DENSE),
    "ks_dab_detr_r50_50ep": (43_922_450, 43_659_282, DENSE),
    "ks_dab_detr_r101_50ep": (62_862_354, 62_599_186, DENSE),
    "ks_dab_detr_r101_50ep_share_v": (62_796_562, 62_599_186, 197_376),
    "ks_dab_detr_r101_50ep_share_a": (62_730_770, 62_599_186, 131_584),
    "ks_dab_detr_swin_t_in22k_50ep": (47_668_620, 47_405_452, DENSE),
    "ks_dn_detr_r50_50ep": (43_943_105, 43_679_937, DENSE),
    "ks_dn_detr_r101_50ep": (62_883_009, 62_619_841, DENSE),
    "ks_dn_detr_r50_batch4_60ep": (43_943_105, 43_679_937, DENSE),
    "ks_dn_detr_r50_batch4_60ep_share_v": (43_877_313, 43_679_937, 197_376),
    "ks_dn_detr_r50_batch4_60ep_share_v_mark": (43_811_521, 43_679_937, 131_584),
    "ks_deformable_detr_r50_12ep": (40_221_910, 40_057_430, DEFORMABLE),
    "ks_deformable_detr_r50_50ep": (40_221_910, 40_057_430, DEFORMABLE),
    "ks_deformable_detr_r101_12ep": (59_161_814, 58_997_334, DEFORMABLE),
    "ks_deformable_detr_r101_24ep": (59_161_814, 58_997_334, DEFORMABLE),
    "ks_deformable_detr_r101_50ep": (59_161_814, 58_997_334, DEFORMABLE),
    "ks_dn_deformable_detr_r50_12ep": (47_564_459, 47_399_979, DEFORMABLE),
}
RELEASED = [name for name in PARAMETERS if "batch4" not in name]
KEYS = {  # of the record of parameters, by config
    "ks_conditional_detr_r50_50ep": "ks_conditional_detr_r50_triple",
    "ks_dab_detr_r50_50ep": "ks_dab_detr_r50_triple",
    "ks_dab_detr_r101_50ep": "ks_dab_detr_r101_triple",
    "ks_dab_detr_r101_50ep_share_v": "ks_dab_detr_r101_dual_share_v",
    "ks_dab_detr_r101_50ep_share_a": "ks_dab_detr_r101_dual_share_a",
    "ks_dab_detr_swin_t_in22k_50ep": "ks_dab_detr_swin_tiny_triple",
    "ks_dn_detr_r50_50ep": "ks_dn_detr_r50_triple",
    "ks_deformable_detr_r50_50ep": "ks_deformable_detr_r50_triple",
    "ks_dn_deformable_detr_r50_12ep": "ks_dn_deformable_detr_r50_triple",
}


def load(name):
    return LazyConfig.load(str(FOLDER / f"{name}.py"))


@functools.cache
def build(name):
    with without_storage():
        return instantiate(load(name).model)


def released_name(name):
    attention = "smlp_qkv_triple_attn"
    if name.endswith(TEACHERS):
        name, attention = name[: -len("_share_v")], f"smlp_dual_attn{name[-len('_share_v') :]}"
    return name.replace("swin_t_in22k", "swin_tiny") + f"_{attention}"


def values(node):
    """What a call is made with."""
    plain = OmegaConf.to_container(node, resolve=False)
    return {key: value for key, value in plain.items() if key != "_target_"}


def subset(expected, found):
    return {key: found.get(key, "absent") for key in expected}


def test_every_config_is_a_row():
    found = {path.stem for path in FOLDER.glob("*.py") if "quickstart" not in path.stem}
    assert found == PARAMETERS.keys()
    table = (FOLDER.parent / "README.md").read_text()
    assert [name for name in PARAMETERS if f"(configs/{name}.py)" not in table] == []


@pytest.fixture(scope="module")
def tables(reference_dir):
    return json.loads((reference_dir / "ks_detr/paper_tables.json").read_text())


def printed(pattern):
    """What the README's tables hold: the groups of a pattern for a row's beginning, and the AP."""
    table = (FOLDER.parent / "README.md").read_text()
    return {
        tuple(groups): float(ap)
        for *groups, ap in re.findall(rf"^\| {pattern} \| ([\d.]+) \| \|$", table, re.M)
    }


def test_table_1_has_the_papers_figures(tables):
    rows = tables["table1"]["rows"]
    assert printed(r"(\S+) \| (\d+) \| \S+") == {
        (row["model"], str(row["epochs"])): row["AP"] for row in rows
    }


def test_table_2_has_the_papers_figures(tables):
    shared = {(False, False): "", (True, False): "share_v", (False, True): "share_a"}
    names = {"": "dab_detr_r101_50ep", "both": "ks_dab_detr_r101_50ep"}
    expected = {}
    for row in tables["table2"]["rows"]:
        kind = shared.get((row["sharing_V"], row["sharing_A"]), "both")
        expected[(names.get(kind, f"{names['both']}_{kind}"),)] = row["AP"]
    assert printed(r"[a-z][^|]*? \| \[(\w*dab_\w+)\]\S+") == expected


def test_table_3_has_the_papers_figures(tables):
    expected = {}
    for row in tables["table3"]["rows"]:
        name = "ks_dn_detr_r50_batch4_60ep"
        name += "" if row["experiment"].startswith("triple") else "_share_v"
        name += "_mark" if row["teacher_feature"] == "concat" else ""
        expected[(name,)] = row["AP"]
    assert printed(r"[a-z][^|]*? \| \[(\w+batch4\w+)\]\S+") == expected


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters(name):
    model = build(name)
    trained = {key: p.numel() for key, p in model.named_parameters() if p.requires_grad}
    extra = sum(count for key, count in trained.items() if ".teacher." in key)
    total = sum(trained.values())
    assert (total, total - extra, extra) == PARAMETERS[name]


@pytest.mark.parametrize("name", KEYS)
def test_parameters_are_the_released_ones(name, reference_dir):
    path = reference_dir / f"ks_detr/checkpoint_keys/{KEYS[name]}.json"
    record = json.loads(path.read_text())
    kinds = ("trainable", "plain_detector_trainable", "extra_training_only")
    assert PARAMETERS[name] == tuple(record[f"{kind}_parameters"] for kind in kinds)


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_last_layer_alone_shares_knowledge(name):
    model = build(name)
    layers = [layer.attentions[0] for layer in model.transformer.encoder.layers]
    assert [hasattr(layer, "teacher") for layer in layers] == [False] * 5 + [True]
    wanted = [branch for branch in TEACHERS if f"_{branch}" in name] or TEACHERS
    assert model.branch_names == ("student", *wanted)
    teacher = layers[-1].teacher
    assert teacher.box_padding == 0
    assert not any(branch.aux_loss for branch in layers[-1].teacher_branches)
    assert type(teacher.features).__name__ == f"Foreground{'Mark' if 'mark' in name else 'MLP'}"


def test_a_config_changes_nothing_but_the_encoder_and_what_is_kept():
    for name in PARAMETERS:
        base = name.removeprefix("ks_").removesuffix("_share_v").removesuffix("_share_a")
        base = base.replace("in22k", "in1k")
        path = ROOT / f"projects/baselines/configs/{base}.py"
        if not path.is_file():
            continue  # only the rows of Table 3 have no baseline
        ours, theirs = load(name), LazyConfig.load(str(path))
        ours.model.transformer.encoder = ours.model.transformer.encoder.encoder
        kept = ours.model.transformer.decoder.pop("checkpoint_layers", None)
        assert kept == (None if name.startswith("ks_conditional") else "wide")
        masked = ours.model.transformer.decoder.pop("mask_padding_in_training", False)
        assert masked == ("deformable" not in name)
        for config in (ours, theirs):
            config.train.output_dir = config.train.init_checkpoint = ""
        for part in ("model", "dataloader", "optimizer", "lr_multiplier", "train"):
            assert ours[part] == theirs[part], (name, part)


def test_decoders_mask_padding_that_could_see_it():
    names = [path.stem for path in FOLDER.glob("*.py")]
    students = {name: load(name).model for name in names}
    student = (
        ROOT / "projects/detr_distill/configs/detrdistill_ks_conditional_detr_r101_r50_50ep.py"
    )
    students["distilled"] = LazyConfig.load(str(student)).model.student
    seeing = {name for name in students if "deformable" not in name}
    masking = {
        name
        for name, model in students.items()
        if model.transformer.decoder.get("mask_padding_in_training", False)
    }
    assert seeing - masking == {"ks_conditional_detr_quickstart_overfit"}  # says the README
    assert masking < seeing


@pytest.fixture(scope="module")
def settings(reference_dir):
    return json.loads((reference_dir / "ks_detr/training_settings.json").read_text())


@pytest.mark.parametrize("name", RELEASED)
def test_model_settings(name, settings):
    config, expected = load(name), settings["configs"][released_name(name)]
    model = config.model
    assert values(model.position_embedding) == expected["position_embedding"]
    assert subset(expected["loss_weights"], model.criterion.weight_dict) == expected["loss_weights"]
    options = dict(expected["detector_options"])
    if "freeze_anchor_box_centers" in options:
        options["uniform_anchor_centers"] = options.pop("freeze_anchor_box_centers")
    if "dn_deformable" in name:
        assert options.pop("as_two_stage") is False  # the only way that there is here
    assert subset(options, model) == options
    encoder, decoder = model.transformer.encoder.encoder, model.transformer.decoder
    assert encoder.num_layers == decoder.num_layers == 6
    attention = encoder.layer.attention
    found = {
        **values(decoder),
        "encoder": {**values(attention), "attn_dropout": attention.dropout, **encoder.layer},
    }
    for key in ("embed_dim", "num_heads", "feedforward_dim", "attn_dropout", "ffn_dropout"):
        assert found[key] == expected["decoder"][key], key
        assert found["encoder"][key] == expected["encoder"][key], key
    assert ("activation" in encoder.layer) == (expected["activation"] == "PReLU")


@pytest.mark.parametrize("name", RELEASED)
def test_backbone(name, settings):
    config, expected = load(name), settings["configs"][released_name(name)]
    backbone, wanted = config.model.backbone, dict(expected["backbone"])
    assert backbone._target_.__name__ == wanted.pop("type")
    if "depth" in wanted:
        found = {**values(backbone.stages), "frozen_stages": backbone.freeze_at}
        found["out_features"] = backbone.out_features
    else:
        found = values(backbone)
    assert json.loads(json.dumps(subset(wanted, found), default=list)) == wanted
    file_name = expected["init_checkpoint"].rpartition("/")[2]
    assert config.train.init_checkpoint.rpartition("/")[2] == file_name


@pytest.mark.parametrize("name", RELEASED)
def test_schedule(name, settings):
    config, expected = load(name), settings["configs"][released_name(name)]["schedule"]
    assert config.train.max_iter == expected["max_iter"]
    drop = expected["multistep_milestones_iterations"][0] / expected["max_iter"]
    multiplier = instantiate(config.lr_multiplier)
    factors = [multiplier(where) for where in (0.0, 0.999 * drop, drop, 0.999)]
    assert factors == pytest.approx([1.0, 1.0, 0.1, 0.1])


@pytest.mark.parametrize("name", PARAMETERS)
def test_common_settings(name, settings):
    config, common = load(name), settings["common"]
    batch = 4 if "batch4" in name else common["total_batch_size"]
    assert config.dataloader.train.total_batch_size == batch
    assert config.dataloader.train.dataset.names == common["train_dataset"]
    assert config.dataloader.test.dataset.names == common["test_dataset"]
    optimizer, wanted = config.optimizer, common["optimizer"]
    assert optimizer._target_.__name__ == wanted["type"]
    assert [optimizer.lr, list(optimizer.betas)] == [wanted["lr"], wanted["betas"]]
    assert optimizer.weight_decay == wanted["weight_decay"]
    assert optimizer.params.weight_decay_norm == wanted["weight_decay_norm_layers"]
    factors = [
        optimizer.params.lr_factor_func(key)
        for key in ("backbone.stem.weight", "transformer.sampling_offsets", "reference_points")
    ]
    assert factors == [wanted["lr_factor"]["backbone"], 1, 1]
    clip, wanted = config.train.clip_grad, common["clip_grad"]
    assert {"enabled": clip.enabled, **clip.params} == wanted
    assert config.train.amp.enabled == common["amp"]
    assert config.train.eval_period == common["eval_period"]
    assert config.train.checkpointer.period == common["checkpoint_period"]
    matcher = common["matcher"]
    assert subset(matcher, config.model.criterion.matcher) == matcher
    assert config.model.num_queries == common["num_queries"]


def test_table_3_trains_sixty_epochs_of_batches_of_four():
    config = load("ks_dn_detr_r50_batch4_60ep_share_v_mark")
    images = config.train.max_iter * config.dataloader.train.total_batch_size
    assert images == 60 * 7500 * 16  # an epoch of the released settings
    multiplier = instantiate(config.lr_multiplier)
    assert [multiplier(epoch / 60) for epoch in (47.9, 48.1)] == pytest.approx([1.0, 0.1])
