"""The command line: what it writes, prints and refuses."""

import argparse
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conversion_cases import batch, read_facts, recipe
from detectron2.config import instantiate

from engine.config import load_config
from tools.convert_checkpoint import main

ROOT = Path(__file__).resolve().parents[2]
FACTS = read_facts("official")["conditional_detr"]
CONFIG = str(ROOT / "tests/conversion_config.py")


@pytest.fixture
def source(tmp_path) -> Path:
    path = tmp_path / "official.pth"
    weights = recipe(FACTS["shapes"], FACTS["aliases"])
    torch.save({"model": weights, "epoch": 49, "args": argparse.Namespace(lr=1e-4)}, path)
    return path


def test_the_result_evaluates(source, tmp_path, capsys) -> None:
    target = tmp_path / "ours.pth"
    assert main([str(source), str(target), "--config-file", CONFIG]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("conditional-detr (Atten4Vis/ConditionalDETR), 200 weights")
    stored = torch.load(target, weights_only=True)
    assert stored.keys() == {"model"}
    model = instantiate(load_config(CONFIG).model)
    model.load_state_dict(stored["model"], strict=True)
    assert len(model.eval()(batch())) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["official.pth", "ours.pth"]


def test_nothing_is_replaced_unless_asked(source, tmp_path, capsys) -> None:
    target = tmp_path / "ours.pth"
    target.write_text("mine")
    command = [str(source), str(target), "--config-file", CONFIG]
    assert main(command) == 2
    assert "ours.pth exists: use --overwrite to replace it" in capsys.readouterr().err
    assert target.read_text() == "mine"
    assert main([*command, "--overwrite"]) == 0
    assert "model" in torch.load(target, weights_only=True)


def test_overrides_come_before_or_after_options(source, tmp_path) -> None:
    target = tmp_path / "ours.pth"
    arguments = ["--config-file", CONFIG, "model.num_classes=91"]
    assert main([str(source), str(target), *arguments]) == 0
    assert len(torch.load(target, weights_only=True)["model"]["class_embed.bias"]) == 91


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--from", "detr"], "keys are not understood as detr: transformer.decoder.layers.0.sa_"),
        (["model.num_queries=9"], "query_embed.weight is (7, 256), expected (9, 256)"),
        (["model.num_querys=9"], "did you mean"),
        (["model.transformer.decoder.num_layers=3"], "of the model's weights are missing: "),
    ],
)
def test_what_does_not_fit_is_one_line(source, tmp_path, capsys, arguments, message) -> None:
    target = tmp_path / "ours.pth"
    assert main([str(source), str(target), "--config-file", CONFIG, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not target.exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [("ours.safetensors", "expected a .pth file"), ("nowhere/ours.pth", "nowhere not found")],
)
def test_outputs_that_cannot_be(source, tmp_path, capsys, name: str, message: str) -> None:
    assert main([str(source), str(tmp_path / name), "--config-file", CONFIG]) == 2
    assert message in capsys.readouterr().err


def test_inputs_that_cannot_be(tmp_path, capsys) -> None:
    command = [str(tmp_path / "nothing.pth"), str(tmp_path / "ours.pth"), "--config-file", CONFIG]
    assert main(command) == 2
    assert "nothing.pth not found" in capsys.readouterr().err


def test_the_help_names_the_layouts() -> None:
    command = [sys.executable, str(ROOT / "tools/convert_checkpoint.py"), "--help"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0
    assert "hf-deformable-detr (transformers'" in " ".join(result.stdout.split())
