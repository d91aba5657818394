"""An interrupted run ends with exactly the numbers of one that was not."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from detectron2.config import LazyConfig
from tiny_run import continue_from, fork_tiny, metrics, run_tiny

from engine.errors import UserError

EVERYTHING = (
    "train.accumulation_steps=2",
    "train.model_ema.enabled=True",
    "model.dropout=0.5",
    "train.checkpointer.max_to_keep=9",
)


def weights(folder):
    state = torch.load(Path(folder, "model_final.pth"), weights_only=True)
    return {**state["model"], **{f"ema.{k}": v for k, v in state.get("ema_state", {}).items()}}


def best_of(folder):
    best = torch.load(Path(folder, "model_best.pth"), weights_only=True)
    return best["best"], best["iteration"]


def assert_equal_runs(a, b):
    assert metrics(a) == metrics(b)
    ours, theirs = weights(a), weights(b)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert best_of(a) == best_of(b)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run_tiny(folder, *EVERYTHING)
    return folder


@pytest.mark.parametrize("iteration", [2, 5, 11])
def test_resuming_from_any_checkpoint_gives_the_same_run(whole_run, tmp_path, iteration):
    continue_from(whole_run, tmp_path / "run", iteration)
    run_tiny(tmp_path / "run", *EVERYTHING, resume=True)
    assert_equal_runs(whole_run, tmp_path / "run")


@pytest.mark.parametrize("setting", ["train.log_period=4", "train.channels_last=True"])
def test_resuming_is_exact_with(setting, tmp_path):
    run_tiny(tmp_path / "whole", *EVERYTHING, setting)
    continue_from(tmp_path / "whole", tmp_path / "run", 5)
    run_tiny(tmp_path / "run", *EVERYTHING, setting, resume=True)
    assert_equal_runs(tmp_path / "whole", tmp_path / "run")


def test_better_weights_than_the_checkpoint_knows_of_stay(whole_run, tmp_path):
    continue_from(whole_run, tmp_path / "run", 5)
    better = {"model": {}, "iteration": 5, "best": 99.0}
    torch.save(better, tmp_path / "run" / "model_best.pth")
    run_tiny(tmp_path / "run", *EVERYTHING, resume=True)
    assert best_of(tmp_path / "run") == (99.0, 5)


def test_workers_do_not_change_the_run(whole_run, tmp_path):
    continue_from(whole_run, tmp_path / "run", 5)
    run_tiny(tmp_path / "run", *EVERYTHING, "dataloader.train.num_workers=2", resume=True)
    assert_equal_runs(whole_run, tmp_path / "run")


def test_kill_at_any_moment(whole_run, tmp_path):
    moments = random.Random(0)
    log = tmp_path / "metrics.json"
    in_training = 0
    for enough in (2, 5, 8, 11):
        process = fork_tiny(tmp_path, *EVERYTHING, resume=True)
        wait_for(lambda: process.exitcode is not None or lines_of(log) >= enough)  # noqa: B023
        time.sleep(moments.uniform(0, 0.03))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        in_training += enough <= lines_of(log) < 12 and not (tmp_path / "model_final.pth").exists()
    assert in_training
    run_tiny(tmp_path, *EVERYTHING, resume=True)
    assert_equal_runs(whole_run, tmp_path)


def test_an_interrupted_evaluation_is_made_up_for(whole_run, tmp_path):
    continue_from(whole_run, tmp_path / "run", 5)
    lines = (whole_run / "metrics.json").read_text().splitlines(keepends=True)
    (tmp_path / "run" / "metrics.json").write_text("".join(lines[:5]) + lines[5][:40])
    run_tiny(tmp_path / "run", *EVERYTHING, resume=True)
    assert "bbox/AP" in metrics(tmp_path / "run")[5]
    assert_equal_runs(whole_run, tmp_path / "run")


def test_a_drawn_seed_is_kept(tmp_path):
    run_tiny(tmp_path / "whole", "train.seed=-1")
    continue_from(tmp_path / "whole", tmp_path / "part", 8)
    run_tiny(tmp_path / "part", "train.seed=-1", resume=True)
    assert_equal_runs(tmp_path / "whole", tmp_path / "part")


def test_two_drawn_seeds_differ(tmp_path):
    run_tiny(tmp_path / "a", "train.seed=-1", "train.max_iter=2")
    run_tiny(tmp_path / "b", "train.seed=-1", "train.max_iter=2")
    assert metrics(tmp_path / "a")[0] != metrics(tmp_path / "b")[0]


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty"])
def test_a_damaged_newest_checkpoint_is_passed_over(whole_run, tmp_path, damage, engine_log):
    run = tmp_path / "run"
    continue_from(whole_run, run, 8)
    (run / "model_0000005.pth").write_bytes((whole_run / "model_0000005.pth").read_bytes())
    newest = run / "model_0000008.pth"
    content = bytearray(newest.read_bytes())
    if damage == "truncate":
        content = content[: len(content) // 2]
    elif damage == "flip":
        stem = torch.load(newest, weights_only=True)["model"]["stem.weight"]
        content[content.find(stem.numpy().tobytes()) + 5] ^= 0x40
    else:
        content = b""
    newest.write_bytes(content)
    run_tiny(run, *EVERYTHING, resume=True)
    assert "model_0000008.pth is damaged" in engine_log.text
    assert_equal_runs(whole_run, run)


def test_no_intact_checkpoint_is_an_error(whole_run, tmp_path):
    continue_from(whole_run, tmp_path / "run", 8)
    (tmp_path / "run" / "model_0000008.pth").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"none of the 1 checkpoints in .* is intact"):
        run_tiny(tmp_path / "run", *EVERYTHING, resume=True)


def test_resume_without_a_checkpoint_starts(tmp_path):
    run_tiny(tmp_path, "train.max_iter=2", resume=True)
    assert set(metrics(tmp_path)) == {0, 1, 2}


def test_a_finished_run_can_be_resumed_and_extended(whole_run, tmp_path):
    continue_from(whole_run, tmp_path / "run", 11)
    for _ in range(2):
        run_tiny(tmp_path / "run", *EVERYTHING, resume=True)
    assert_equal_runs(whole_run, tmp_path / "run")
    run_tiny(tmp_path / "run", *EVERYTHING, "train.max_iter=14", resume=True)
    assert {12, 13, 14} <= set(metrics(tmp_path / "run"))


def test_extending_a_run_repeats_no_record(tmp_path):
    for end in (8, 10, 12):
        run_tiny(tmp_path, f"train.max_iter={end}", "train.eval_period=4", resume=True)
    records = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    with_losses = [record["iteration"] for record in records if "total_loss" in record]
    assert with_losses == list(range(12))
    pairs = [(r["iteration"], name) for r in records for name in r if name != "iteration"]
    assert len(pairs) == len(set(pairs))
    assert [record["iteration"] for record in records] == sorted(r["iteration"] for r in records)


def test_less_than_is_trained_already_is_refused(whole_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole_run, run)
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.name != "log.txt"}
    with pytest.raises(UserError) as caught:
        run_tiny(run, *EVERYTHING, "train.max_iter=4", resume=True)
    assert str(caught.value) == (
        f"train.max_iter is 4, but {run}/model_final.pth has 12 iterations done: "
        "expected at least 12, or another train.output_dir"
    )
    after = {path.name: path.read_bytes() for path in run.iterdir() if path.name != "log.txt"}
    assert after == before


def test_what_is_no_text_does_no_harm(whole_run, tmp_path):
    run = tmp_path / "run"
    continue_from(whole_run, run, 8)
    (run / "last_checkpoint").write_bytes(b"\xff\xfe\x00bad")
    with open(run / "metrics.json", "ab") as file:
        file.write(b'\xff\xfe{"a')
    run_tiny(run, *EVERYTHING, resume=True)
    assert_equal_runs(whole_run, run)


@pytest.mark.parametrize("content", [{"model": {}, "iteration": 8}, [1, 2]])
@pytest.mark.parametrize("seed", [-1, 7])
def test_what_is_no_state_of_a_training_is_refused(tmp_path, content, seed):
    torch.save(content, tmp_path / "model_final.pth")
    with pytest.raises(UserError, match=r"model_final\.pth holds no state of a training"):
        run_tiny(tmp_path, f"train.seed={seed}", resume=True)


def test_detectron2s_loader_resumes_with_a_warning(tmp_path, engine_log):
    other = "dataloader.train._target_=detectron2.data.build_detection_train_loader"
    run_tiny(tmp_path, other, "train.max_iter=3")
    run_tiny(tmp_path, other, "train.max_iter=5", resume=True)
    assert engine_log.text.count("the data order starts anew") == 1
    assert {3, 4} <= set(metrics(tmp_path))


def test_starting_anew_sets_the_earlier_run_aside(tmp_path):
    run_tiny(tmp_path, "train.max_iter=3")
    run_tiny(tmp_path, "train.max_iter=2")
    assert set(metrics(tmp_path)) == {0, 1, 2}
    assert (tmp_path / "previous" / "model_0000002.pth").is_file()
    assert not (tmp_path / "model_0000002.pth").exists()
    run_tiny(tmp_path, "train.max_iter=1")
    assert (tmp_path / "previous" / "model_0000002.pth").is_file()
    assert set(metrics(tmp_path / "previous-2")) == {0, 1, 2}


def test_a_config_stays_with_its_run(tmp_path):
    run_tiny(tmp_path, "train.max_iter=3", "train.eval_period=0")
    first = (tmp_path / "config.yaml").read_text()
    for refused in ("optimizer.betas=0.9", "train.init_checkpoint=absent"):
        with pytest.raises(UserError):
            run_tiny(tmp_path, "train.max_iter=2", refused)
        assert (tmp_path / "config.yaml").read_text() == first
        assert not (tmp_path / "previous").exists()
    run_tiny(tmp_path, "train.max_iter=2", "train.eval_period=0")
    assert (tmp_path / "previous" / "config.yaml").read_text() == first
    second = LazyConfig.load(str(tmp_path / "config.yaml"))
    assert second.train.max_iter == 2
    assert "model" not in second.optimizer.params  # nor what else only building fills in
    assert "seed" not in second.dataloader.train


def test_evaluating_leaves_the_training_config(tmp_path):
    run_tiny(tmp_path, "train.max_iter=1", "train.eval_period=0")
    before = (tmp_path / "config.yaml").read_text()
    run_tiny(tmp_path, f"train.init_checkpoint={tmp_path}/model_final.pth", eval_only=True)
    assert (tmp_path / "config.yaml").read_text() == before
    assert "model_final.pth" in (tmp_path / "config_eval.yaml").read_text()


def test_old_checkpoints_are_removed(tmp_path):
    run_tiny(tmp_path)
    names = sorted(path.name for path in tmp_path.glob("model_0*.pth"))
    assert names == ["model_0000008.pth", "model_0000011.pth"]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops(tmp_path, signum):
    settings = (
        "train.max_iter=100000",
        "train.checkpointer.period=100000",
        "train.eval_period=0",
        "lr_multiplier.warmup_length=0.0",  # so that max_iter does not matter
        "lr_multiplier.scheduler.values=[1.0,1.0]",
    )
    process = fork_tiny(tmp_path, *settings)
    wait_for(lambda: (tmp_path / "metrics.json").is_file() and len(metrics(tmp_path)) > 3)
    os.kill(process.pid, signum)
    process.join(30)
    assert process.exitcode == 128 + signum
    (saved,) = tmp_path.glob("model_*.pth")
    done = torch.load(saved, weights_only=True)["iteration"]
    assert done == max(metrics(tmp_path))
    last = done + 3
    run_tiny(tmp_path, *settings, f"train.max_iter={last}", resume=True)
    run_tiny(tmp_path / "whole", *settings, f"train.max_iter={last}")
    assert {i: r["total_loss"] for i, r in metrics(tmp_path).items() if i < last} == {
        i: r["total_loss"] for i, r in metrics(tmp_path / "whole").items() if i < last
    }


def lines_of(path):
    return path.read_text().count("\n") if path.is_file() else 0


def wait_for(condition, seconds=30.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.005)
