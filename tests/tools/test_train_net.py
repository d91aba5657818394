"""The command line itself: what it prints, leaves behind and exits with."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from detectron2.config import LazyConfig

ROOT = Path(__file__).resolve().parents[2]
ENGINE_TESTS = ROOT / "tests" / "engine"
COMMAND = [sys.executable, str(ROOT / "tools" / "train_net.py")]
CONFIG = ["--config-file", str(ENGINE_TESTS / "tiny_config.py")]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    sys.path.insert(0, str(ENGINE_TESTS))
    from tiny_detector import write_tiny_data

    folder = tmp_path_factory.mktemp("data")
    write_tiny_data(folder)
    return {
        **os.environ,
        "TINY_DATA": str(folder),
        "PYTHONPATH": str(ENGINE_TESTS),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }


def run(environment, cwd, *arguments, command=COMMAND):
    return subprocess.run(
        [*command, *arguments],
        env=environment,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
    )


def losses(output):
    lines = map(json.loads, (output / "metrics.json").read_text().splitlines())
    return {r["iteration"]: r["total_loss"] for r in lines if "total_loss" in r}


# Without a schedule, max_iter does not change the losses.
STEADY = [
    "train.output_dir=out",
    "train.eval_period=0",
    "model.dropout=0.0",
    "lr_multiplier.warmup_length=0.0",
    "lr_multiplier.scheduler.values=[1.0,1.0]",
]


@pytest.fixture(scope="module")
def trained(environment, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    return folder / "out", run(environment, folder, *CONFIG, *STEADY)


def test_training_leaves_everything(trained):
    output, done = trained
    assert (done.returncode, done.stderr) == (0, "")
    names = {path.name for path in output.iterdir()}
    assert {"config.yaml", "metrics.json", "log.txt", "model_final.pth", "last_checkpoint"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert "Runtime: detectron2" in done.stdout
    assert "AP50" in done.stdout
    assert f"are in {output}" in done.stdout
    saved = LazyConfig.load(str(output / "config.yaml"))
    assert saved.train.output_dir == "out"
    assert saved.model._target_ == "tiny_detector.TinyDetector"


def test_an_error_is_one_line(environment, tmp_path):
    done = run(environment, tmp_path, *CONFIG, "train.max_itr=3")
    assert done.returncode == 2
    assert done.stderr == "error: unknown key 'train.max_itr' (did you mean 'train.max_iter'?)\n"
    assert os.listdir(tmp_path) == []


def test_torchrun(trained, environment, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc-per-node", "2", COMMAND[1]]
    done = run(environment, tmp_path, *CONFIG, *STEADY, command=command)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "out") == pytest.approx(losses(trained[0]), rel=1e-5)


def test_two_processes_until_a_signal_to_their_launcher(trained, environment, tmp_path):
    options = ["--num-gpus", "2", "--dist-url", "auto", *CONFIG, *STEADY]
    endless = ["train.max_iter=100000", "train.checkpointer.period=100000"]
    process = subprocess.Popen(
        [*COMMAND, *options, *endless],
        env=environment,
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    log = tmp_path / "out" / "metrics.json"
    end = time.monotonic() + 90
    while not (log.is_file() and log.read_text().count("\n") > 12):
        assert time.monotonic() < end
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert "Traceback" not in errors
    assert len(list((tmp_path / "out").glob("model_*.pth"))) == 1
    expected, found = losses(trained[0]), losses(tmp_path / "out")
    assert {i: found[i] for i in expected} == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_errors_of_several_processes_are_said_once(environment, tmp_path):
    options = ["--num-gpus", "2", "--dist-url", "auto", *CONFIG, *STEADY]
    done = run(environment, tmp_path, *options, "model.nan_at=1")
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1
    assert "Traceback" not in done.stderr
