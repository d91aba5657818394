"""The cells of both studies: what they compare, and that they are what they say."""

import re

import pytest
import torch
from detectron2.config import instantiate
from tiny_detectors import instances, pattern_image

from projects.detr_distill.distiller import Distiller
from projects.study.presets import PRESETS
from tools.study_plan import check_preset

CELLS = {
    (preset.name, cell.name): cell
    for preset in PRESETS.values()
    for cell in (preset.backbone, *preset.cells)
}

HEAD = re.compile(r"class_embed(\.\d+)?(\.3)?\.weight")  # AdaMixer's end after three layers


def encoder_classes(detector):
    return {type(module).__name__ for module in detector.transformer.encoder.modules()}


def build(cell):
    """The model, without weights; teachers have none to load."""
    config = cell.build()
    if cell.teacher is not None:
        config.model = config.model.student
    with torch.device("meta"):
        return instantiate(config.model)


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_presets_are_consistent(preset):
    check_preset(preset)
    assert len(preset.seeds) >= 3
    teachers = {cell.teacher for cell in preset.cells} - {None}
    configs = {cell.name: cell.build() for cell in preset.cells}
    longest = max(config.train.max_iter for config in configs.values())
    for cell in preset.cells:
        config = configs[cell.name]
        assert (config.train.max_iter == longest) == (cell.name in teachers), cell.name
        # a detector is compared with what has trained for as long, on the same images
        if cell.baseline is not None:
            other = configs[cell.baseline]
            assert other.train.max_iter == config.train.max_iter
            assert other.dataloader == config.dataloader
            assert other.optimizer == config.optimizer


@pytest.mark.parametrize("key", CELLS, ids="-".join)
def test_every_cell_builds_and_shares_the_backbone(key):
    model = build(CELLS[key])
    reference = build(PRESETS[key[0]].backbone)
    shapes = {name: value.shape for name, value in reference.backbone.state_dict().items()}
    found = {name: value.shape for name, value in model.backbone.state_dict().items()}
    assert found == shapes
    classes = PRESETS[key[0]].shapes.get("categories", 10)
    weights = model.state_dict().items()
    heads = [value for name, value in weights if HEAD.fullmatch(name)]
    assert heads
    assert all(len(head) == classes for head in heads)


@pytest.mark.parametrize("preset", PRESETS)
def test_cells_differ_in_what_their_names_say(preset):
    def encoder_of(name):
        return encoder_classes(build(CELLS[preset, name]))

    for name in ("ks_conditional_detr", "ks_dn_detr", "ks_smca", "detrdistill_ks", "ks_teacher"):
        assert "ForegroundMLP" in encoder_of(name), name
    assert "ForegroundMark" in encoder_of("ks_conditional_detr_mark")
    for name in ("conditional_detr", "teacher", "detrdistill", "detrdistill_of_ks"):
        assert not encoder_of(name) & {"ForegroundMLP", "ForegroundMark"}, name
    for name, branches in {"share_v": ["share_v"], "share_a": ["share_a"]}.items():
        config = CELLS[preset, f"ks_conditional_detr_{name}"].build()
        assert config.model.transformer.encoder.branches == branches
        assert config.evaluation.branch == ["student", *branches]
    modulations = {
        name: CELLS[preset, f"smca_{name}"].build().model.transformer.decoder.modulation
        for name in ("head_shared", "fixed", "single", "independent")
    }
    assert [m.head_shared for m in modulations.values()] == [True, False, False, False]
    scales = [m.scales for m in modulations.values()]
    assert scales == ["independent", "fixed", "single", "independent"]
    selects = [
        CELLS[preset, name].build().model.transformer.decoder.modulation.level_selection
        for name in ("smca", "smca_without_selection")
    ]
    assert selects == [True, False]


def test_students_have_the_objectives_of_their_method():
    def names(cell):
        model = CELLS["cpu", cell].build().model
        assert model._target_ in (Distiller, f"{Distiller.__module__}.Distiller")
        return [instantiate(one).__class__.__name__ for one in model.objectives]

    d3etr = ["SelfAttentionDistillation", "CrossAttentionDistillation", "PredictionDistillation"]
    detrdistill = ["LogitsDistillation", "TargetAwareDistillation", "QueryPriorAssignment"]
    assert names("fgfi") == ["FGFI"]
    assert names("logits") == detrdistill[:1]
    assert names("target_aware") == detrdistill[1:2]
    assert names("query_prior") == detrdistill[2:]
    assert names("detrdistill") == names("detrdistill_smca") == detrdistill
    assert names("adaptive") == d3etr
    assert names("fixed") == [*d3etr, "QueryPriorAssignment"]
    assert names("d3etr") == [*d3etr, *d3etr, "QueryPriorAssignment"]
    assert names("detrdistill_d3etr") == [*detrdistill[:2], *names("d3etr")]
    groups = [one.get("group") for one in CELLS["cpu", "fixed"].build().model.objectives]
    assert groups[:3] == ["fixed"] * 3


@pytest.mark.slow
@pytest.mark.parametrize("key", [key for key in CELLS if key[0] == "gpu"], ids="-".join)
def test_cells_of_the_large_study_train_in_mixed_precision(key):
    """Two steps and an evaluation of each, which the preset leaves to a GPU."""
    torch.manual_seed(0)
    config = CELLS[key].build()
    assert config.train.amp.enabled
    if CELLS[key].teacher is not None:
        config.model.teacher = config.model.teacher.detector  # of random weights
    model = instantiate(config.model).train()
    config.optimizer.params.model = model
    optimizer = instantiate(config.optimizer)
    size = (320, 320)
    items = [{"image": pattern_image(index, *size)} for index in range(2)]
    boxes = [[20.0, 30.0, 120.0, 200.0], [5.0, 5.0, 6.0, 6.0], [90.0, 10.0, 250.0, 150.0]]
    items[0]["instances"] = instances(size, boxes, [0, 9, 4])
    items[1]["instances"] = instances(size, [], [])
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            losses = model(items)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), **config.train.clip_grad.params)
        optimizer.step()
        for name, value in losses.items():
            assert value.isfinite(), name
        assert 0 < norm < float("inf")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        results = model.eval()(items)
    assert all(result["instances"].scores.isfinite().all() for result in results)


def test_a_config_can_be_changed_without_changing_the_next():
    cell = CELLS["cpu", "detrdistill"]
    first = cell.build()
    first.model.student.num_classes = 77
    first.model.objectives[0].weight = 55.0
    first.teacher.init_checkpoint = "elsewhere.pth"
    second = cell.build()
    assert second.model.student.num_classes == 6
    assert "weight" not in second.model.objectives[0]
    assert second.teacher.init_checkpoint == ""
