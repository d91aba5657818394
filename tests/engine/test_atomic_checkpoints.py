"""Checkpoint files: complete or absent, and refused where they do not belong."""

import itertools
import os
from pathlib import Path

import pytest
import torch
from tiny_run import run_tiny
from torch import nn

from engine import checkpoint as module
from engine.checkpoint import AtomicCheckpointer, find_damage, newest_checkpoint, write_atomically
from engine.errors import UserError


def net(*sizes):
    return nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(sizes)))


def checkpointer(model, folder="", strictness="initialise"):
    result = AtomicCheckpointer(model, str(folder))
    result.strictness = strictness
    return result


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"new")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"cannot write .*file: .*No space left"):
        write_atomically(path, fail)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_everything_is_synced_before_it_is_visible(tmp_path, monkeypatch):
    events = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(descriptor):
        events.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")
        real_fsync(descriptor)

    def replace(source, target):
        events.append(Path(target).name)
        real_replace(source, target)

    monkeypatch.setattr(module.os, "fsync", fsync)
    monkeypatch.setattr(module.os, "replace", replace)
    checkpointer(net(2, 3), tmp_path).save("model_0000001")
    one = ["file", "model_0000001.pth", "folder"]
    assert events == [*one, "file", "last_checkpoint", "folder"]


def test_the_pointed_to_checkpoint_comes_first_then_by_age(tmp_path):
    saver = checkpointer(net(2, 3), tmp_path)
    for index, name in enumerate(["model_0000009", "model_0000001", "model_0000003"]):
        saver.save(name)
        os.utime(tmp_path / f"{name}.pth", (index, index))
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    assert newest_checkpoint(str(tmp_path)).endswith("model_0000001.pth")
    (tmp_path / "model_0000001.pth").unlink()
    assert newest_checkpoint(str(tmp_path)).endswith("model_0000003.pth")
    (tmp_path / "model_0000003.pth").write_bytes(b"")
    assert newest_checkpoint(str(tmp_path)).endswith("model_0000009.pth")
    assert newest_checkpoint(str(tmp_path / "absent")) == ""


def test_damage_is_found_at_any_cut(tmp_path):
    checkpointer(net(2, 3), tmp_path).save("model_0000001")
    path = tmp_path / "model_0000001.pth"
    assert find_damage(path) == ""
    content = path.read_bytes()
    for size in range(0, len(content), 97):
        path.write_bytes(content[:size])
        assert find_damage(path), size


def test_pruning_keeps_the_newest(tmp_path):
    saver = checkpointer(net(2, 3), tmp_path)
    for name in ("model_0000001", "model_0000012", "model_0000003", "model_final", "model_best"):
        saver.save(name)
    saver.prune(2)
    left = sorted(path.name for path in tmp_path.glob("*.pth"))
    assert left == ["model_0000003.pth", "model_0000012.pth", "model_best.pth", "model_final.pth"]


@pytest.fixture
def saved(tmp_path):
    """Weights of a 2-3-4 network."""
    torch.save(net(2, 3, 4).state_dict(), tmp_path / "weights.pth")
    return str(tmp_path / "weights.pth")


def test_plain_state_dicts_load(saved):
    model = net(2, 3, 4)
    checkpointer(model, strictness="evaluate").load(saved)
    loaded = torch.load(saved, weights_only=True)
    assert all(torch.equal(value, loaded[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("sizes", "strictness", "fits"),
    [
        ((2, 3, 4), "resume", True),
        ((2, 3, 4, 5), "initialise", True),  # the checkpoint is a part of the model
        ((2, 3), "initialise", True),  # the model is a part of the checkpoint
        ((2, 3, 5), "initialise", False),
        ((2, 3, 5), "partial", True),
        ((2, 3, 4, 5), "evaluate", False),
        ((2, 3), "evaluate", False),
        ((2, 3), "resume", False),
        ((2, 3, 4, 5), "resume", False),
        ((7, 7), "partial", False),
    ],
)
def test_which_weights_fit(saved, sizes, strictness, fits):
    loader = checkpointer(net(*sizes), strictness=strictness)
    if fits:
        loader.load(saved)
    else:
        with pytest.raises(UserError, match="is of another architecture than the model: ") as e:
            loader.load(saved)
        assert "\n" not in str(e.value)


def test_another_architecture_names_the_first_keys(saved):
    model = nn.ModuleDict({"first": nn.Linear(2, 3), "0": nn.Linear(2, 5)})
    with pytest.raises(UserError) as caught:
        checkpointer(model).load(saved)
    message = str(caught.value)
    assert "2 of another shape (0.weight is (3, 2), expected (5, 2), 0.bias is" in message
    assert "2 missing (first.weight, first.bias)" in message
    assert "2 unknown to the model (1.weight, 1.bias)" in message
    assert "train.init_partial=True" in message


def test_shared_weights_need_one_name_only(tmp_path):
    model = nn.ModuleDict({"a": nn.Linear(2, 2)})
    torch.save(model.state_dict(), tmp_path / "one.pth")
    model["b"] = model["a"]
    checkpointer(model, strictness="evaluate").load(str(tmp_path / "one.pth"))


def test_classifier_of_a_pretrained_backbone_is_left_out(tmp_path):
    weights = {**net(2, 3).state_dict(), "fc.weight": torch.zeros(2), "fc.bias": torch.zeros(2)}
    torch.save(weights, tmp_path / "backbone.pth")
    checkpointer(net(2, 3, 4)).load(str(tmp_path / "backbone.pth"))


def test_files_that_are_no_checkpoints(tmp_path):
    loader = checkpointer(net(2, 3))
    with pytest.raises(UserError, match=r"checkpoint .*absent.pth not found"):
        loader.load(str(tmp_path / "absent.pth"))
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(UserError, match=r"cannot read checkpoint .*text.pth"):
        checkpointer(net(2, 3)).load(str(tmp_path / "text.pth"))
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UserError, match=r"list\.pth"):
        checkpointer(net(2, 3)).load(str(tmp_path / "list.pth"))


class Evil:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


def test_code_in_a_checkpoint_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {}, "x": Evil()}, "evil.pth")
    with pytest.raises(UserError, match=r"cannot read checkpoint evil.pth"):
        checkpointer(net(2, 3)).load("evil.pth")
    assert not Path("pwned").exists()


def test_training_only_weights_may_be_surplus_in_an_evaluation(saved, tmp_path, engine_log):
    weights = torch.load(saved, weights_only=True)
    torch.save({**weights, "1.attentions.0.teacher.weight": torch.zeros(2)}, tmp_path / "ks.pth")
    checkpointer(net(2, 3, 4), strictness="evaluate").load(str(tmp_path / "ks.pth"))
    assert "ignored: 1.attentions.0.teacher.weight" in engine_log.text
    torch.save({**weights, "2.weight": torch.zeros(2)}, tmp_path / "deeper.pth")
    with pytest.raises(UserError, match=r": 1 unknown to the model \(2\.weight\)"):
        checkpointer(net(2, 3, 4), strictness="evaluate").load(str(tmp_path / "deeper.pth"))


def test_training_only_weights_may_be_missing_when_training_starts(tmp_path, engine_log):
    model = nn.ModuleDict({"net": net(2, 3), "teacher": nn.Linear(2, 2)})
    weights = {f"net.{key}": value for key, value in net(2, 3).state_dict().items()}
    student = nn.ModuleDict({"layer": model})
    before = model["teacher"].weight.clone()
    surplus = {"layer.old.teacher.bias": torch.zeros(2)}
    torch.save({f"layer.{k}": v for k, v in weights.items()} | surplus, tmp_path / "plain.pth")
    checkpointer(student).load(str(tmp_path / "plain.pth"))
    assert torch.equal(model["teacher"].weight, before)
    assert (
        "2 weights only training uses were not loaded but initialised: layer.t" in engine_log.text
    )
    assert "1 weights only training uses were ignored: layer.old.teacher.bias" in engine_log.text


def test_training_only_weights_may_be_missing_when_a_student_is_evaluated(tmp_path, engine_log):
    model = nn.ModuleDict({"net": net(2, 3), "layer": nn.ModuleDict({"teacher": nn.Linear(2, 2)})})
    path = str(tmp_path / "plain.pth")
    weights = {f"net.{key}": value for key, value in net(2, 3).state_dict().items()}
    torch.save(weights, path)
    checkpointer(model, strictness="evaluate").load(path)
    assert torch.equal(model["net"][0].weight, weights["net.0.weight"])
    assert (
        "2 weights only training uses were not loaded but initialised, and not used in an "
        "evaluation: layer.teacher.weight, layer.teacher.bias"
    ) in engine_log.text
    with pytest.raises(UserError, match=r"no teacher weights \(2 missing: layer\.teacher\.w"):
        checkpointer(model, strictness="evaluate branches").load(path)
    del weights["net.0.bias"]
    torch.save(weights, path)
    for strictness in ("evaluate", "evaluate branches"):
        with pytest.raises(UserError, match=r"another architecture .*: 1 missing \(net\.0\.bias\)"):
            checkpointer(model, strictness=strictness).load(path)


def test_evaluating_twice_gives_the_same_results(tmp_path):
    trained = run_tiny(tmp_path, "train.model_ema.enabled=True", "train.max_iter=4")
    weights = f"train.init_checkpoint={tmp_path}/model_final.pth"
    once, twice = (run_tiny(tmp_path / "e", weights, eval_only=True) for _ in range(2))
    assert repr(once) == repr(twice)
    assert repr(once["bbox"]) == repr(trained["bbox"])
    averaged = run_tiny(
        tmp_path / "e",
        weights,
        "train.model_ema.enabled=True",
        "train.model_ema.use_ema_weights_for_eval_only=True",
        eval_only=True,
    )
    assert repr(averaged["bbox"]) == repr(trained["ema"]["bbox"])


def test_evaluating_needs_fitting_weights(tmp_path):
    run_tiny(tmp_path, "train.max_iter=1", "train.eval_period=0")
    weights = f"train.init_checkpoint={tmp_path}/model_final.pth"
    with pytest.raises(UserError, match=r"set train\.init_checkpoint"):
        run_tiny(tmp_path / "e", eval_only=True)
    with pytest.raises(UserError, match="another architecture"):
        run_tiny(tmp_path / "e", weights, "model.width=16", eval_only=True)
    with pytest.raises(UserError, match="holds no averaged weights"):
        run_tiny(
            tmp_path / "e",
            weights,
            "train.model_ema.enabled=True",
            "train.model_ema.use_ema_weights_for_eval_only=True",
            eval_only=True,
        )


def test_the_best_weights_are_kept(tmp_path):
    run_tiny(tmp_path)
    best = torch.load(tmp_path / "model_best.pth", weights_only=True)
    assert set(best) == {"model", "iteration", "best"}
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"


def test_states_of_another_config_are_refused_in_one_line(tmp_path):
    model = nn.Linear(2, 2)
    optimizers = [
        torch.optim.SGD(groups, lr=1.0)
        for groups in (model.parameters(), [{"params": [p]} for p in model.parameters()])
    ]
    AtomicCheckpointer(model, str(tmp_path), optimizer=optimizers[0]).save("model")
    other = AtomicCheckpointer(model, str(tmp_path), optimizer=optimizers[1])
    with pytest.raises(UserError, match=r"model\.pth does not fit this config: .*groups") as caught:
        other.load(str(tmp_path / "model.pth"))
    assert "\n" not in str(caught.value)
