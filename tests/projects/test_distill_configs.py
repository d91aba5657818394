"""What the names of the distillation configs say is what they hold."""

import re

import pytest
import torch
from detectron2.config import instantiate
from full_size import batch, calm
from tiny_detectors import ROOT

from engine.config import load_config

CONFIGS = sorted(
    path
    for path in ROOT.glob("projects/detr_distill/configs/*.py")
    if "quickstart" not in path.stem
)
NAME = re.compile(
    r"(?P<method>.+?)_(?P<detector>(ks_|smca_)?(adamixer|(conditional|dab|deformable)_detr|r50))_"
    r"(?P<teacher>r\d+)_(?P<student>r\d+)(_enc(?P<encoder>\d)_dec(?P<decoder>\d))?"
    r"_(?P<epochs>\d+)ep(_.+)?"
)
D3ETR = {"SelfAttentionDistillation", "CrossAttentionDistillation", "PredictionDistillation"}
OBJECTIVES = {
    "detrdistill_d3etr": {
        "LogitsDistillation",
        "TargetAwareDistillation",
        "QueryPriorAssignment",
        *D3ETR,
    },
    "detrdistill": {"LogitsDistillation", "TargetAwareDistillation", "QueryPriorAssignment"},
    "fitnet": {"FitNet"},
    "fgd": {"FGD"},
    "mgd": {"MGD"},
    "fkd": {"FKD"},
    "fgfi": {"FGFI"},
    "logits_target_aware": {"LogitsDistillation", "TargetAwareDistillation"},
    "logits": {"LogitsDistillation"},
    "target_aware": {"TargetAwareDistillation"},
    "query_prior": {"QueryPriorAssignment"},
    "d3etr_adaptive": D3ETR,
    "d3etr_fixed": D3ETR | {"QueryPriorAssignment"},
    "d3etr_self_attention": {"SelfAttentionDistillation", "QueryPriorAssignment"},
    "d3etr_cross_attention": {"CrossAttentionDistillation", "QueryPriorAssignment"},
    "d3etr_prediction": {"PredictionDistillation", "QueryPriorAssignment"},
    "d3etr": D3ETR | {"QueryPriorAssignment"},
}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_name(path):
    name = NAME.fullmatch(path.stem)
    assert name, "not <method>_<detector>_<teacher>_<student>_<epochs>"
    config = load_config(str(path), ["teacher.init_checkpoint=weights.pth"])
    student, teacher = config.model.student, config.model.teacher
    assert teacher.init_checkpoint == "weights.pth"
    assert student.backbone.stages.depth == int(name["student"][1:])
    assert teacher.detector.backbone.stages.depth == int(name["teacher"][1:])
    assert config.train.max_iter == 7500 * int(name["epochs"])
    assert config.train.output_dir == f"./output/{path.stem}"
    if name["decoder"]:
        assert student.transformer.decoder.num_layers == int(name["decoder"])
        assert student.transformer.encoder.num_layers == int(name["encoder"])
    checkpointed = student.transformer.decoder.get("checkpoint_layers", False)
    assert checkpointed == ("d3etr" in name["method"])
    objectives = [instantiate(objective) for objective in config.model.objectives]
    methods = [method for method in OBJECTIVES if name["method"].startswith(method)]
    if methods:
        assert {type(objective).__name__ for objective in objectives} == OBJECTIVES[methods[0]]
    places = {objective.place for objective in objectives if hasattr(objective, "place")}
    assert places <= {"memory" if "conditional" in name["detector"] else "neck"}


def test_switches_of_table_6():
    expected = {
        "positive_class": (["class"], []),
        "positive_boxes": (["bbox", "giou"], []),
        "negative_boxes": ([], ["bbox", "giou"]),
        "positives": (["class", "bbox", "giou"], []),
        "boxes": (["bbox", "giou"], ["bbox", "giou"]),
    }
    for name, kinds in expected.items():
        path = ROOT / f"projects/detr_distill/configs/logits_{name}_adamixer_r101_r50_12ep.py"
        objective = instantiate(load_config(str(path)).model.objectives[0])
        assert (objective.positive_kinds, objective.negative_kinds) == kinds


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_two_iterations(path):
    torch.manual_seed(0)
    config = load_config(str(path))
    config.model.teacher = config.model.teacher.detector  # of random weights
    model = instantiate(config.model).train()
    for detector in (model.student, model.teacher):
        calm(detector.backbone)
    config.optimizer.params.model = model
    optimizer = instantiate(config.optimizer)
    for _ in range(2):
        losses = model(batch())
        optimizer.zero_grad()
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        for name, value in losses.items():
            assert value.isfinite(), name
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
