"""default_argument_parser, default_setup, default_writers and create_ddp_model."""

import argparse
import itertools
import json
import logging
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import LazyConfig
from detectron2.engine import (
    create_ddp_model,
    default_argument_parser,
    default_setup,
    default_writers,
)
from detectron2.utils import comm
from detectron2.utils.events import CommonMetricPrinter, JSONWriter, TensorboardXWriter
from omegaconf import OmegaConf
from recorded_cases import embedded_only
from torch import nn


def test_parser_has_the_recorded_arguments(reference_dir):
    recorded = json.loads((reference_dir / "detrex" / "api.json").read_text())
    actions = []
    for action in default_argument_parser()._actions:
        actions.append(
            {
                "flags": list(action.option_strings) or [action.dest],
                "dest": action.dest,
                "default": action.default,
                "nargs": action.nargs,
                "type": getattr(action.type, "__name__", None),
                "kind": type(action).__name__.strip("_").removesuffix("Action") + "Action",
            }
        )
    expected = recorded["default_argument_parser"]
    assert len(actions) == len(expected)
    for ours, theirs in zip(actions, expected, strict=True):
        if theirs["dest"] == "dist_url":
            assert ours.pop("default").startswith("tcp://127.0.0.1:")
            theirs = {k: v for k, v in theirs.items() if k != "default"}
        assert ours == theirs


def test_parser_reads_the_recorded_command_line(reference_dir):
    runtime = json.loads((reference_dir / "detrex" / "runtime.json").read_text())
    recorded = runtime["misc"]["default_argument_parser"]
    parsed = vars(default_argument_parser().parse_args(recorded["argv"]))
    del parsed["dist_url"]
    assert parsed == recorded["parsed"]


def test_port_follows_the_user(monkeypatch):
    def port(user):
        monkeypatch.setattr(os, "getuid", lambda: user)
        return int(default_argument_parser().get_default("dist_url").rsplit(":", 1)[1])

    assert port(0) == 49152
    assert port(1000) == 50152
    assert port(16384 + 7) == 49159
    assert 49152 <= port(2**31) <= 65535


def test_epilog_replaces_the_examples():
    assert "my own words" in default_argument_parser("my own words").format_help()
    assert "--dist-url" in default_argument_parser().epilog


@pytest.fixture
def restore_globals():
    """Undo what default_setup changes in the process."""
    benchmark = torch.backends.cudnn.benchmark
    loggers = [logging.getLogger(name) for name in ("detectron2", "fvcore")]
    before = [(log.handlers[:], log.propagate, log.level) for log in loggers]
    random_state = torch.get_rng_state(), np.random.get_state(), random.getstate()
    yield
    torch.backends.cudnn.benchmark = benchmark
    for log, (handlers, propagate, level) in zip(loggers, before, strict=True):
        for handler in set(log.handlers) - set(handlers):
            log.removeHandler(handler)
        log.propagate = propagate
        log.setLevel(level)
    torch.set_rng_state(random_state[0])
    np.random.set_state(random_state[1])
    random.setstate(random_state[2])


def _config(folder, **train):
    return OmegaConf.create({"train": {"output_dir": str(folder), "max_iter": 3, **train}})


def test_setup_leaves_a_record_of_the_run(tmp_path, restore_globals):
    config_file = tmp_path / "my_config.py"
    config_file.write_text("answer = 42  # a comment to be kept\n")
    output = tmp_path / "a" / "b"
    args = argparse.Namespace(config_file=str(config_file), opts=["train.max_iter=3"])
    default_setup(_config(output, seed=1), args)

    for handler in logging.getLogger("detectron2").handlers:
        handler.flush()
    log = (output / "log.txt").read_text()
    assert "train.max_iter=3" in log
    assert "answer" in log
    assert "comment to be kept" in log
    assert torch.__version__ in log
    saved = LazyConfig.load(str(output / "config.yaml"))
    assert saved == _config(output, seed=1)


@embedded_only  # the real one then logs into the working directory
def test_setup_without_output_folder_writes_nothing(tmp_path, restore_globals, monkeypatch):
    monkeypatch.chdir(tmp_path)
    default_setup(_config("", seed=1), argparse.Namespace())
    default_setup(OmegaConf.create({"model": 1}), argparse.Namespace())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("rank", [0, 2])
def test_setup_seeds_every_process_differently(tmp_path, restore_globals, monkeypatch, rank):
    monkeypatch.setattr(comm, "get_rank", lambda: rank)
    default_setup(_config(tmp_path, seed=40), argparse.Namespace())
    drawn = random.random(), np.random.rand(), torch.rand(1).item()
    seed = 40 + rank
    expected = (
        random.Random(seed).random(),
        np.random.RandomState(seed).rand(),
        torch.rand(1, generator=torch.Generator().manual_seed(seed)).item(),
    )
    assert drawn == expected
    assert (tmp_path / "config.yaml").exists() == (rank == 0)


def test_setup_without_seed_draws_one(tmp_path, restore_globals):
    torch.manual_seed(0)
    expected_if_untouched = torch.rand(4)
    torch.manual_seed(0)
    default_setup(_config(tmp_path, seed=-1), argparse.Namespace())
    assert not torch.equal(torch.rand(4), expected_if_untouched)


@pytest.mark.parametrize(
    ("train", "eval_only", "before", "expected"),
    [
        ({"cudnn_benchmark": True}, False, False, True),
        ({}, False, True, False),
        ({"cudnn_benchmark": True}, True, False, False),
    ],
)
def test_cudnn_benchmark(tmp_path, restore_globals, train, eval_only, before, expected):
    torch.backends.cudnn.benchmark = before
    default_setup(_config(tmp_path, **train), argparse.Namespace(eval_only=eval_only))
    assert torch.backends.cudnn.benchmark is expected


def test_writers(tmp_path):
    writers = default_writers(str(tmp_path / "new"), 10)
    kinds = [CommonMetricPrinter, JSONWriter, TensorboardXWriter]
    assert [type(writer) for writer in writers] == kinds
    for writer in writers:
        writer.close()
    assert Path(tmp_path / "new" / "metrics.json").exists()


def test_one_process_needs_no_ddp():
    model = nn.Linear(1, 1)
    assert create_ddp_model(model, fp16_compression=True, find_unused_parameters=True) is model


@pytest.fixture
def one_process_group(tmp_path, monkeypatch):
    """A gloo group of this process alone, which pretends to be one of two."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1
    )
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("compress", [False, True])
def test_ddp_options(one_process_group, compress):
    model = nn.Linear(4, 1, bias=False)
    x = torch.tensor([[1.0, 1 / 3, 1e-3, 2049.0]])
    ddp = create_ddp_model(
        model, fp16_compression=compress, device_ids=None, find_unused_parameters=True
    )
    assert ddp.find_unused_parameters
    ddp(x).sum().backward()
    expected = x.half().float() if compress else x
    assert torch.equal(model.weight.grad, expected)
    assert next(itertools.chain(ddp.parameters())) is model.weight
