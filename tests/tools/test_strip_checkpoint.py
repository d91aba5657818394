"""From a KS-DETR training checkpoint to the plain detector's, and back."""

import logging

import pytest
import torch
from tiny_detectors import SETTINGS, StridedBackbone, build_conditional, pattern_image

from engine.checkpoint import AtomicCheckpointer
from engine.ema import ModelEma
from projects.ks_detr.encoder import share_knowledge
from tools import strip_checkpoint

TEACHER = "transformer.encoder.layers.1.attentions.0.teacher."
TEACHER_KEYS = [
    TEACHER + name
    for name in ("in_proj_weight", "in_proj_bias", "features.linear.weight", "features.linear.bias")
]


def detector(seed, sharing):
    torch.manual_seed(seed)
    model = build_conditional(SETTINGS, {})
    if sharing:
        share_knowledge(model.transformer.encoder)
    model.backbone = StridedBackbone()
    return model.eval()


def detections(model):
    with torch.no_grad():
        results = model([{"image": pattern_image(i, 64, 96 - 16 * i)} for i in range(2)])
    return [(r["instances"].pred_boxes.tensor, r["instances"].scores) for r in results]


def same(first, second):
    return all(
        torch.equal(a, b)
        for x, y in zip(first, second, strict=True)
        for a, b in zip(x, y, strict=True)
    )


def load(model, path):
    AtomicCheckpointer(model).load(str(path))
    return model


@pytest.fixture
def trained(tmp_path):
    """A training checkpoint with averages, and the model it is of."""
    model = detector(1, sharing=True)
    ema = ModelEma(model, 0.5)
    ema.start()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    ema.update()
    optimizer = torch.optim.AdamW(model.parameters())
    checkpointer = AtomicCheckpointer(model, str(tmp_path), optimizer=optimizer, ema_state=ema)
    checkpointer.save("model_final", iteration=7)
    return model, tmp_path / "model_final.pth"


def strip(*arguments):
    return strip_checkpoint.main([str(argument) for argument in arguments])


def test_the_plain_detector_gives_the_students_detections_bit_for_bit(trained, tmp_path, capsys):
    student, path = trained
    assert strip(path, tmp_path / "plain.pth") == 0
    output = capsys.readouterr().out
    assert output.startswith("dropped 4 weights:\n")
    assert all(f"  {key}\n" in output for key in TEACHER_KEYS)
    content = torch.load(tmp_path / "plain.pth", weights_only=True)
    plain = detector(2, sharing=False)
    assert set(content) == {"model", "ema_state"}
    assert not same(detections(plain), detections(student))
    plain.load_state_dict(content["model"], strict=True)
    assert same(detections(plain), detections(student))
    assert content["ema_state"].keys() == dict(plain.named_parameters()).keys() | dict(
        plain.named_buffers()
    )
    key = "class_embed.weight"  # the average lags half of the one step behind
    torch.testing.assert_close(content["ema_state"][key] + 0.005, content["model"][key])


def test_a_training_checkpoint_starts_the_plain_detector(trained, caplog):
    student, path = trained
    with caplog.at_level(logging.INFO, "engine"):
        plain = load(detector(2, sharing=False), path)
    assert same(detections(plain), detections(student))
    (line,) = [r.message for r in caplog.records if "ignored" in r.message]
    assert line.startswith("4 weights only training uses were ignored: ")
    assert all(key in line for key in TEACHER_KEYS)


def test_a_plain_checkpoint_starts_a_training(trained, tmp_path, caplog):
    student, path = trained
    strip(path, tmp_path / "plain.pth")
    with caplog.at_level(logging.INFO, "engine"):
        sharing = load(detector(2, sharing=True), tmp_path / "plain.pth")
    assert same(detections(sharing), detections(student))
    (line,) = [r.message for r in caplog.records if "initialised" in r.message]
    assert line.startswith("4 weights only training uses were not loaded but initialised: ")
    assert all(key in line for key in TEACHER_KEYS)
    untouched = detector(2, sharing=True).state_dict()
    for key in TEACHER_KEYS:
        assert torch.equal(sharing.state_dict()[key], untouched[key])


def test_layers_that_share_knowledge_may_differ(trained):
    student, path = trained
    other = detector(2, sharing=False)
    share_knowledge(other.transformer.encoder, layers=[0])
    assert same(detections(load(other, path)), detections(student))


def test_a_state_dict_alone_will_do(trained, tmp_path):
    student, _ = trained
    torch.save(student.state_dict(), tmp_path / "weights.pth")
    assert strip(tmp_path / "weights.pth", tmp_path / "plain.pth") == 0
    content = torch.load(tmp_path / "plain.pth", weights_only=True)
    assert set(content) == {"model"}
    detector(2, sharing=False).load_state_dict(content["model"], strict=True)


def test_nothing_is_overwritten_unless_told(trained, tmp_path, capsys):
    _, path = trained
    target = tmp_path / "plain.pth"
    target.write_text("mine")
    assert strip(path, target) == 2
    assert capsys.readouterr().err == f"error: {target} exists: use --overwrite to replace it\n"
    assert target.read_text() == "mine"
    assert strip(path, target, "--overwrite") == 0
    assert strip(path, path, "--overwrite") == 0
    first, second = (torch.load(p, weights_only=True)["model"] for p in (path, target))
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_errors_are_one_line(trained, tmp_path, capsys):
    _, path = trained
    plain = tmp_path / "plain.pth"
    strip(path, plain)
    (tmp_path / "text.pth").write_text("hello")
    torch.save([1, 2], tmp_path / "list.pth")
    capsys.readouterr()
    for source, message in (
        (plain, "holds no weight that only KS-DETR's training uses"),
        (tmp_path / "absent.pth", "not found"),
        (tmp_path / "text.pth", "cannot read checkpoint"),
        (tmp_path / "list.pth", "is not a checkpoint: it holds no dict of weights"),
    ):
        assert strip(source, tmp_path / "new.pth") == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert message in error
        assert error.count("\n") == 1
    assert strip(path, tmp_path / "none" / "new.pth") == 2
    assert capsys.readouterr().err == f"error: folder {tmp_path / 'none'} not found\n"
    assert not (tmp_path / "new.pth").exists()
    assert not list(tmp_path.glob(".*"))
