"""Dense triple and dual attention against the vectors recorded from the released implementation."""

import pytest
import torch
from recorded_entries import Recording, check_gradients, matches, our_attention

from detectors.attention import SelfAttention
from detectors.structures import EncoderContext, FeatureMaps
from projects.ks_detr import attention, teacher
from projects.ks_detr.attention import KnowledgeSharingAttention
from projects.ks_detr.teacher import ForegroundMark, ForegroundMLP

CASES = {
    "triple": ("share_v", "share_a"),
    "triple_nopad": ("share_v", "share_a"),
    "triple_mark": ("share_v", "share_a"),
    "dual_share_v": ("share_v",),
    "dual_share_a": ("share_a",),
}
RELEASED_MLP = "token_split_conv.linear.0."


@pytest.fixture(scope="module")
def recording(reference_dir):
    return Recording(reference_dir / "ks_detr" / "attention")


def build(case, weights):
    features = ForegroundMark() if case == "triple_mark" else ForegroundMLP(32)
    module = KnowledgeSharingAttention(SelfAttention(32, 4), features, CASES[case]).double()
    module.load_state_dict(our_attention(weights))
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


def watch(module, monkeypatch):
    """What a call has inside under its recorded names: attention logits and teacher features."""
    seen, attend = {}, attention.attend

    def watched(query, key, value, allowed=None, *rest):
        logits = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5
        if allowed is not None:
            logits = logits.masked_fill(~allowed, float("-inf"))
        seen["logits_teacher" if "logits_student" in seen else "logits_student"] = logits
        return attend(query, key, value, allowed, *rest)

    def keep(module, inputs, features):
        seen["x_teacher"] = features.transpose(0, 1)

    monkeypatch.setattr(attention, "attend", watched)
    module.teacher.features.register_forward_hook(keep)
    return seen


def check_branch(entries, facts, name, module, tokens, branch, cotangent):
    """One branch's gradients, and the row blocks of the packed projections that get any."""
    weights = module.attn.in_proj_weight, module.teacher.in_proj_weight
    found = torch.autograd.grad(branch, [tokens, *weights], cotangent, retain_graph=True)
    expected = entries.group(f"grad_{name}")
    packed = torch.cat(found[1:])
    matches(found[0].transpose(0, 1), expected.pop("x"), name=name)
    matches(packed, expected.pop("in_proj_weight"), name=name)
    assert not expected
    blocks = packed.split(module.embed_dim)
    assert len(blocks) == len(facts["in_proj_row_blocks"])
    taught = facts["row_blocks_with_gradient_per_branch"][name]
    assert [bool(block.any()) for block in blocks] == taught


@pytest.mark.parametrize("case", CASES)
def test_all_that_is_recorded(case, recording, monkeypatch):
    entries, facts = recording.entries(case), recording.cases[case]
    module = build(case, entries.group("w"))
    seen = watch(module, monkeypatch)
    tokens, positions, context, output = run(module, entries.group("in"), monkeypatch)
    names = facts["outputs"]
    assert len(module.branches(context)) == len(names)
    branches = dict(zip(names, output.chunk(len(names)), strict=True))
    seen |= {name: branch.transpose(0, 1) for name, branch in branches.items()}
    expected = entries.group("out")
    assert seen.keys() == expected.keys()
    for name, value in expected.items():
        matches(seen[name], value, name=name)

    cotangents = {k: v.transpose(0, 1) for k, v in entries.group("cotangent").items()}
    for name, branch in branches.items():
        check_branch(entries, facts, name, module, tokens, branch, cotangents[name])
    output.backward(torch.cat([cotangents[name] for name in names]))
    inputs = {"x": tokens.grad.transpose(0, 1), "pos": positions.grad.transpose(0, 1)}
    check_gradients(module, entries, inputs)


def test_foreground_mlp_alone(recording):
    entries = recording.entries("smlp")
    features, inputs = ForegroundMLP(32).double(), entries.group("in")
    weights = entries.group("w")
    features.linear.load_state_dict({k.removeprefix(RELEASED_MLP): v for k, v in weights.items()})
    tokens = inputs["x"].transpose(0, 1).requires_grad_()
    output = features(tokens, inputs["fg_mask"].T, inputs["padding_mask"])
    matches(output.transpose(0, 1), entries.take("out/x_teacher"))
    # a linear layer and ReLU leave no token as it was
    changed = (output != tokens).any(-1)
    assert torch.equal(changed.T.double(), entries.take("out/valid_fg_mask"))
    output.backward(entries.take("cotangent").transpose(0, 1))
    gradients = entries.group("grad")
    matches(tokens.grad.transpose(0, 1), gradients.pop("x"))
    for kind in ("weight", "bias"):
        found = features.linear.get_parameter(kind).grad
        matches(found, gradients.pop(RELEASED_MLP + kind), name=kind)
    assert not gradients
    entries.finish()


def test_no_recorded_case_is_left_out(recording):
    """The other modules that compare cases of the file ask for theirs by kind."""
    assert recording.of_kind("KSMultihead") == set(CASES)
    assert recording.of_kind("sMLP") == {"smlp"}
    assert recording.of_kind("deformable") == {"deformable_triple"}
    others = recording.of_kind("gt mask") | set(CASES) | {"smlp", "deformable_triple"}
    assert recording.cases.keys() == {key.split("/")[0] for key in recording.arrays} == others


def test_without_ground_truth_it_is_the_plain_attention(recording):
    entries = recording.entries("triple")
    module = build("triple", entries.group("w"))
    plain = SelfAttention(32, 4).double()
    plain.load_state_dict({k: v for k, v in module.state_dict().items() if "teacher" not in k})
    inputs = entries.group("in")
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
