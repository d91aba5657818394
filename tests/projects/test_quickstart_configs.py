"""Every quickstart config builds a small detector that learns from generated shapes."""

import pytest
import torch
from detectron2.config import instantiate
from tiny_detectors import ROOT, instances, pattern_image

from engine.config import load_config

CONFIGS = sorted(ROOT.glob("projects/*/configs/*_quickstart.py"))


def batch():
    size, boxes = (96, 96), [[10.0, 20.0, 50.0, 60.0], [40.0, 5.0, 90.0, 70.0]]
    return [
        {"image": pattern_image(index, *size), "instances": instances(size, boxes, [0, 7])}
        for index in range(2)
    ]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_it_is_small_and_learns(path):
    torch.manual_seed(0)
    config = load_config(str(path))
    if "teacher" in config:
        config.model.teacher = config.model.teacher.detector  # of random weights
    model = instantiate(config.model).train()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained < 7e6
    config.optimizer.params.model = model
    optimizer = instantiate(config.optimizer)
    totals = []
    for _ in range(8):
        total = sum(model(batch()).values())
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        totals.append(total.item())
    assert totals[-1] < totals[0]
    assert config.dataloader.train.dataset.names == "shapes_train"


def test_configs_are_found():
    assert len(CONFIGS) >= 11
