"""Dense triple and dual attention against the vectors recorded from the released implementation."""

import json

import numpy as np
import pytest
import torch

from detectors.attention import SelfAttention
from detectors.structures import EncoderContext, FeatureMaps
from projects.ks_detr import teacher
from projects.ks_detr.attention import KnowledgeSharingAttention
from projects.ks_detr.checkpoint import from_released
from projects.ks_detr.teacher import ForegroundMark, ForegroundMLP

CASES = {
    "triple": ("share_v", "share_a"),
    "triple_nopad": ("share_v", "share_a"),
    "triple_mark": ("share_v", "share_a"),
    "dual_share_v": ("share_v",),
    "dual_share_a": ("share_a",),
}


@pytest.fixture(scope="module")
def vectors(reference_dir):
    folder = reference_dir / "ks_detr"
    return np.load(folder / "attention.npz"), json.loads((folder / "attention.json").read_text())


def group(arrays, case, name):
    prefix = f"{case}/{name}/"
    return {
        key[len(prefix) :]: torch.from_numpy(arrays[key]).double()
        for key in arrays.files
        if key.startswith(prefix)
    }


def build(case, arrays):
    weights = group(arrays, case, "w")
    features = ForegroundMark() if case == "triple_mark" else ForegroundMLP(32)
    module = KnowledgeSharingAttention(SelfAttention(32, 4), features, CASES[case]).double()
    released = {
        f"layers.0.attentions.0.{key}": value for key, value in weights.items() if "attn" in key
    }
    released |= {key: value for key, value in weights.items() if key.startswith("ksgt")}
    prefix = "layers.0.attentions.0."
    state = from_released(released, prefix="")
    module.load_state_dict({key.removeprefix(prefix): value for key, value in state.items()})
    return module


def run(module, inputs, monkeypatch):
    tokens = inputs["x"].transpose(0, 1).requires_grad_()
    positions = inputs["pos"].transpose(0, 1).requires_grad_()
    mask = inputs.get("key_padding_mask")
    foreground = inputs["fg_mask"].transpose(0, 1).bool()
    monkeypatch.setattr(teacher, "foreground_mask", lambda *_: foreground)
    features = FeatureMaps((), None, (), [], (0, 0))
    context = EncoderContext(positions, None if mask is None else mask.bool(), features, targets=[])
    return tokens, positions, context, module(tokens, context)


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients(case, vectors, monkeypatch):
    arrays, _ = vectors
    module = build(case, arrays)
    inputs = group(arrays, case, "in")
    tokens, positions, context, output = run(module, inputs, monkeypatch)
    expected = group(arrays, case, "out")
    names = [name for name in ("student", "teacher1", "teacher2") if name in expected]
    reference = torch.cat([expected[name].transpose(0, 1) for name in names])
    torch.testing.assert_close(output, reference, rtol=1e-5, atol=1e-6)
    assert len(module.branches(context)) == len(names)

    cotangents = group(arrays, case, "cotangent")
    output.backward(torch.cat([cotangents[name].transpose(0, 1) for name in names]))
    gradients = group(arrays, case, "grad")
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(tokens.grad.transpose(0, 1), gradients["x"], **close)
    torch.testing.assert_close(positions.grad.transpose(0, 1), gradients["pos"], **close)
    for kind in ("weight", "bias"):
        packed = torch.cat(
            [getattr(part, f"in_proj_{kind}").grad for part in (module.attn, module.teacher)]
        )
        torch.testing.assert_close(packed, gradients[f"attn.in_proj_{kind}"], **close)
        out_proj = getattr(module.attn.out_proj, kind).grad
        torch.testing.assert_close(out_proj, gradients[f"attn.out_proj.{kind}"], **close)
        if case != "triple_mark":
            released = gradients[f"ksgt.smlp_module.token_split_conv.linear.0.{kind}"]
            learned = getattr(module.teacher.features.linear, kind).grad
            torch.testing.assert_close(learned, released, **close)


def test_without_ground_truth_it_is_the_plain_attention(vectors):
    arrays, _ = vectors
    module = build("triple", arrays)
    plain = SelfAttention(32, 4).double()
    plain.load_state_dict({k: v for k, v in module.state_dict().items() if "teacher" not in k})
    inputs = group(arrays, "triple", "in")
    features = FeatureMaps((), None, (), [], (0, 0))
    context = EncoderContext(inputs["pos"].transpose(0, 1), None, features)
    tokens = inputs["x"].transpose(0, 1)
    assert torch.equal(module(tokens, context), plain(tokens, context))


def test_student_and_share_a_use_the_same_dropout_draw(monkeypatch):
    """With V^t forced equal to V, A V and A V^t agree in spite of dropout; A^t V does not."""
    torch.manual_seed(0)
    module = KnowledgeSharingAttention(SelfAttention(16, 2, dropout=0.5), ForegroundMark())
    channels = 16
    with torch.no_grad():
        module.teacher.in_proj_weight.copy_(module.attn.in_proj_weight)
    monkeypatch.setattr(module.teacher.features, "forward", lambda tokens, *_: tokens)
    inputs = {"x": torch.randn(6, 2, channels), "pos": torch.randn(6, 2, channels)}
    inputs["fg_mask"] = torch.zeros(6, 2)
    output = run(module.train(), inputs, monkeypatch)[-1]
    student, share_v, share_a = output.chunk(3)
    torch.testing.assert_close(student, share_a)
    assert not torch.allclose(student, share_v)


def test_unknown_branch_is_refused():
    with pytest.raises(ValueError, match="share_q"):
        KnowledgeSharingAttention(SelfAttention(16, 2), ForegroundMark(), ("share_q",))
