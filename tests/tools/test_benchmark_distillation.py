"""The distillation benchmark: its cases, tables and errors."""

import re

import pytest
import torch
from tiny_detectors import ROOT

from engine.config import load_config
from engine.errors import UserError
from tools import benchmark_distillation as bench

CONFIG = str(ROOT / "projects/detr_distill/configs/detrdistill_conditional_detr_quickstart.py")
D3ETR = "projects.detr_distill.attention_maps.CrossAttentionDistillation"


@pytest.fixture(scope="module")
def cases():
    torch.manual_seed(0)
    config = load_config(CONFIG, ["model.student.num_queries=4"])
    config.model.objectives = [
        {"_target_": D3ETR, "group": group} for group in ("adaptive", "fixed")
    ]
    return bench.Bench(config, 1, (32, 48), "cpu")


def test_every_case_runs(cases):
    names = cases.names(each=True)
    assert names == [
        "student",
        "teacher",
        "distillation",
        "0: CrossAttentionDistillation",
        "1: CrossAttentionDistillation (fixed)",
        "maps kept",
    ]
    grads = {}
    for name in names:
        cases.student.zero_grad()
        cases.case(name)()
        weight = cases.student.transformer.decoder.layers[0].attentions[1].key_pos_proj.weight
        grads[name] = weight.grad
    assert grads["teacher"] is None
    torch.testing.assert_close(grads["distillation"], grads["maps kept"], rtol=1e-3, atol=1e-6)
    assert not torch.allclose(grads["student"], grads["distillation"])
    assert not torch.allclose(grads["0: CrossAttentionDistillation"], grads["distillation"])


def test_what_others_are_compared_with_computes_no_layer_twice(cases, monkeypatch):
    monkeypatch.setattr(cases, "checkpoint_layers", True)
    calls = []
    layers = cases.decoder.layers
    hooks = [layer.register_forward_pre_hook(lambda *_: calls.append(1)) for layer in layers]
    count = {}
    for name in ("student", "distillation", "maps kept"):
        run = cases.case(name)
        calls.clear()
        run()
        count[name] = len(calls) / len(layers)
    for hook in hooks:
        hook.remove()
    assert count == {"student": 1, "distillation": 4, "maps kept": 2}  # of two groups


def test_tables():
    times = {
        "student": [1.0, 2.0, 1.0],
        "teacher": [1.0, 2.0, 1.0],
        "distillation": [3.0, 6.0, 3.0],
    }
    assert re.search(r"\| distillation \| +3 \| 1.500 \(1.500 to 1.500\)", bench.time_table(times))
    peaks = {"student": 2**30, "distillation": 2**30 + 2**28, "maps kept": 2**30 + 2**29}
    (line,) = (x for x in bench.memory_table(peaks).splitlines() if "distillation" in x)
    assert [part.strip() for part in line.split("|")[2:6]] == ["1280", "256", "0.83", "0.5"]
    assert "student" not in bench.memory_table({"teacher": 1}).splitlines()[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config-file", CONFIG, "--cases", "techer"], "there is no case 'techer', expected one"),
        (
            [
                "--config-file",
                CONFIG.replace("detr_distill", "baselines").replace("detrdistill_", ""),
            ],
            "trains no student: its model has no objectives",
        ),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(UserError, match=message):
        bench.main(bench.parse(arguments))
