"""Two processes with gloo do what one process does with the same total batch."""

import os
import signal
import socket
import sys
import time

import pytest
import torch
from tiny_run import metrics, run_tiny

from engine import checkpoint, errors
from engine.errors import exit_code_of

STEADY = ("model.dropout=0.0", "train.max_iter=8", "train.eval_period=4")


def _rank(rank, port, output, overrides, resume):
    os.environ["LOCAL_RANK"] = str(rank)
    errors.PATIENCE = 0.0  # there is no launcher that would end one for another
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    code = exit_code_of(lambda: run_tiny(output, *overrides, resume=resume))
    torch.distributed.destroy_process_group()
    sys.exit(code)


def start_two(output, *overrides, resume=False):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = torch.multiprocessing.get_context("fork")
    ranks = [
        context.Process(target=_rank, args=(rank, port, output, overrides, resume))
        for rank in range(2)
    ]
    for process in ranks:
        process.start()
    return ranks


def finish(ranks):
    for process in ranks:
        process.join(120)
    return [process.exitcode for process in ranks]


@pytest.mark.parametrize(
    "extra", [(), ("train.accumulation_steps=2", "train.model_ema.enabled=True")]
)
def test_same_losses_as_one_process(tmp_path, extra):
    run_tiny(tmp_path / "one", *STEADY, *extra)
    assert finish(start_two(tmp_path / "two", *STEADY, *extra)) == [0, 0]
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert one.keys() == two.keys()
    for iteration in one:
        assert one[iteration].keys() == two[iteration].keys()
        for key in one[iteration]:
            expected = float(one[iteration][key])
            found = float(two[iteration][key])
            assert found == pytest.approx(expected, rel=2e-5, nan_ok=True), (iteration, key)


def test_two_processes_resume_exactly(tmp_path):
    settings = ("model.dropout=0.5", "train.max_iter=6", "train.eval_period=0")
    assert finish(start_two(tmp_path / "whole", *settings)) == [0, 0]
    run = tmp_path / "part"
    assert finish(start_two(run, *settings)) == [0, 0]
    (run / "model_0000005.pth").unlink()
    (run / "model_final.pth").unlink()
    (run / "last_checkpoint").write_text("model_0000002.pth")
    assert finish(start_two(run, *settings, resume=True)) == [0, 0]
    assert metrics(run) == metrics(tmp_path / "whole")


def test_a_signal_to_one_process_stops_both(tmp_path):
    ranks = start_two(
        tmp_path, "train.max_iter=100000", "train.checkpointer.period=100000", "train.eval_period=0"
    )
    wait_for_metrics(tmp_path)
    os.kill(ranks[1].pid, signal.SIGTERM)
    assert finish(ranks) == [128 + signal.SIGTERM] * 2
    (saved,) = tmp_path.glob("model_*.pth")
    assert len(torch.load(saved, weights_only=True)["rng"]) == 2


def test_no_process_ends_before_the_checkpoint_is_written(tmp_path, monkeypatch):
    real = checkpoint.save_atomically

    def slowly(data, path):
        time.sleep(2)
        real(data, path)

    monkeypatch.setattr(checkpoint, "save_atomically", slowly)
    ranks = start_two(
        tmp_path, "train.max_iter=100000", "train.checkpointer.period=100000", "train.eval_period=0"
    )
    wait_for_metrics(tmp_path)
    os.kill(ranks[1].pid, signal.SIGTERM)
    ranks[1].join(60)
    assert list(tmp_path.glob("model_*.pth"))
    assert finish(ranks) == [128 + signal.SIGTERM] * 2


def wait_for_metrics(folder):
    end = time.monotonic() + 60
    while not ((folder / "metrics.json").is_file() and len(metrics(folder)) > 2):
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_nonfinite_loss_stops_both(tmp_path, capfd):
    assert finish(start_two(tmp_path, "model.nan_at=2")) == [2, 2]
    assert (tmp_path / "nonfinite_0000002.pth").is_file()
    assert capfd.readouterr().err.count("error: loss not finite at iteration 2") == 1
