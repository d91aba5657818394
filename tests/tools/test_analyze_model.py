"""Counting parameters and multiply-adds."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from detectron2.config import LazyConfig, instantiate
from detectron2.structures import Boxes, Instances
from torch import nn

import ops
from tools.analyze_model import count_multiply_adds, parameters, table

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "projects/baselines/configs/conditional_detr_quickstart.py"


class Whole(nn.Module):
    """A model whose only work is one call, with detectron2's input and output."""

    def __init__(self, call):
        super().__init__()
        self.call = call

    def forward(self, batched_inputs):
        instances = Instances((4, 4))
        instances.pred_boxes = Boxes(self.call().flatten()[:4].view(1, 4))
        instances.scores = instances.pred_classes = instances.pred_boxes.tensor
        return [{"instances": instances}]


def deformable():
    value = torch.rand(2, 12, 3, 5)
    weights = torch.rand(2, 7, 3, 1, 4)
    return ops.multi_scale_deformable_attention(
        value, [(3, 4)], torch.rand(2, 7, 3, 1, 4, 2), weights
    )


def deformable_on_a_traced_map():
    """Level sizes that tracing has made tensors of."""
    level = torch.rand(1, 1, 3, 4).flatten(0, 1)
    value = level.flatten(1).view(1, -1, 1, 1).expand(-1, -1, -1, 5)
    return ops.multi_scale_deformable_attention(
        value, [level.shape[-2:]], torch.rand(1, 7, 1, 1, 4, 2), torch.rand(1, 7, 1, 1, 4)
    )


def gaussian():
    places = torch.rand(2, 3, 7, 2)
    key, value = torch.rand(2, 3, 12, 6), torch.rand(2, 3, 12, 8)
    return ops.gaussian_attention(torch.rand(2, 3, 7, 6), key, value, (3, 4), places, places)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda: F.linear(torch.rand(5, 3), torch.rand(7, 3)), 5 * 3 * 7),
        (
            lambda: F.scaled_dot_product_attention(
                torch.rand(2, 3, 7, 6), torch.rand(2, 3, 12, 6), torch.rand(2, 3, 12, 6)
            ),
            2 * 3 * 7 * 12 * (6 + 6),
        ),
        (gaussian, 2 * 3 * 7 * 12 * (6 + 8 + 5)),
        (deformable, 2 * 7 * 3 * 4 * 4 * 5),
        (deformable_on_a_traced_map, 7 * 4 * 4 * 5),
    ],
)
def test_multiply_adds_are_those_counted_by_hand(call, expected: int) -> None:
    flops = count_multiply_adds(Whole(call), (4, 4))
    assert flops.total() == expected
    assert not [name for name in flops.unsupported_ops() if "attention" in name]


def test_shared_and_frozen_parameters() -> None:
    layer = nn.Linear(3, 4)
    layer.bias.requires_grad_(False)
    model = nn.ModuleList([layer, layer])
    assert parameters(model.parameters()) == (16, 12)


def test_the_table_goes_as_deep_as_asked() -> None:
    model = Whole(deformable)
    model.add_module("block", nn.Sequential(nn.Linear(2, 500), nn.Linear(500, 2)))
    flops = count_multiply_adds(model, (4, 4))
    rows = table(model, flops, 1).splitlines()[2:]
    assert [row.split()[0] for row in rows] == ["Whole", "block"]
    assert rows[0].split()[1:3] == ["0.003", "0.003"]
    assert len(table(model, flops, 2).splitlines()) == 2 + 4


class Scaled(nn.Module):
    """A detector whose boxes are those of an image of the size that its record states."""

    def __init__(self) -> None:
        super().__init__()
        self.boxes = nn.Linear(3, 4)

    def forward(self, batch: list[dict]) -> list[dict]:
        boxes = self.boxes(batch[0]["image"].mean((1, 2))[None])
        size = (batch[0]["height"], batch[0]["width"])
        found = Instances(size, pred_boxes=Boxes(boxes * size[0]))
        found.scores, found.pred_classes = boxes[:, 0], boxes[:, 1]
        return [{"instances": found}]


def test_the_record_has_the_image_s_size() -> None:
    assert count_multiply_adds(Scaled().eval(), (4, 6)).total() == 12


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "millions", "giga", "tolerance"),
    [
        # the paper counts elementwise operations as well, which the dilated maps have most of
        ("detr_r50_300ep", 41, 86, 0.02),
        ("detr_r50_dc5_300ep", 41, 187, 0.025),
        ("deformable_detr_r50_50ep", 40, 173, 0.005),
    ],
)
def test_what_the_papers_count(name: str, millions: int, giga: int, tolerance: float) -> None:
    config = LazyConfig.load(str(ROOT / f"projects/baselines/configs/{name}.py"))
    model = instantiate(config.model).eval()
    total, _ = parameters(model.parameters())
    assert int(total / 1e6) == millions
    # about the mean size of the images that DETR's authors count on
    flops = count_multiply_adds(model, (800, 1120))
    assert flops.total() / 1e9 == pytest.approx(giga, rel=tolerance)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/analyze_model.py", "--config-file", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_the_command_prints_a_table() -> None:
    result = run(CONFIG, "--size", "96", "96", "--depth", "1", "model.num_queries=10")
    assert result.returncode == 0, result.stderr
    rows = {line.split()[0]: line.split()[1:] for line in result.stdout.splitlines()[2:]}
    assert float(rows["ConditionalDETR"][0]) == pytest.approx(1.9, abs=0.2)
    assert float(rows["backbone"][2]) > 0
    assert rows["query_embed"] == ["0.001", "0.001", "0.00"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nothing.py",), "error: config file nothing.py not found"),
        ((CONFIG, "--size", "0", "96"), "error: --size is 0 96, expected two positive numbers"),
        ((CONFIG, "model.num_querys=3"), "did you mean"),
    ],
)
def test_bad_input_is_one_line(arguments: tuple[str, ...], message: str) -> None:
    result = run(*arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
