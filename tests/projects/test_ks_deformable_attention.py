"""Deformable knowledge-sharing attention against recorded vectors and a slow formula."""

import math
from types import SimpleNamespace

import pytest
import torch
from recorded_entries import Recording, check_gradients, matches, our_attention
from torch import nn

from detectors.deformable_attention import DeformableSelfAttention
from detectors.structures import EncoderContext, FeatureMaps
from projects.ks_detr import teacher
from projects.ks_detr.deformable_attention import KnowledgeSharingDeformableAttention
from projects.ks_detr.teacher import ForegroundMark, ForegroundMLP

SHAPES = ((5, 6), (3, 3))
BRANCHES = ("share_v", "share_a")


def build(branches=BRANCHES, features=None, dropout=0.0, dim=32):
    student = DeformableSelfAttention(dim, 4, num_levels=2, dropout=dropout)
    features = ForegroundMLP(dim) if features is None else features
    return KnowledgeSharingDeformableAttention(student, features, branches).double()


def make_context(inputs, targets=()):
    """A context of given positions, padding and reference points; no targets if None."""
    levels = tuple(torch.zeros(1, 1, *shape) for shape in SHAPES)
    features = FeatureMaps(levels, None, levels, [], (0, 0))
    targets = None if targets is None else list(targets)
    context = EncoderContext(inputs["pos"], inputs["key_padding_mask"].bool(), features, targets)
    grid = SimpleNamespace(reference_points=inputs["reference_points"])
    object.__setattr__(context, "grid", grid)
    return context


def with_foreground(monkeypatch, mask):
    monkeypatch.setattr(teacher, "foreground_mask", lambda *_: mask.bool())


def check_branch(entries, silent, name, module, tokens, branch, cotangent):
    """One branch's gradients: those of the tokens, and which parameters get none."""
    parameters = dict(module.named_parameters())
    inputs = [tokens, *parameters.values()]
    found, *rest = torch.autograd.grad(branch, inputs, cotangent, retain_graph=True)
    expected = entries.group(f"grad_{name}")
    matches(found, expected.pop("x"), name=name)
    assert not expected
    without = {key for key, grad in zip(parameters, rest, strict=True) if not grad.any()}
    assert without == our_attention(dict.fromkeys(silent)).keys()


def watch(module):
    """What a call has inside under its recorded names: sampling logits and teacher features."""
    seen = {}

    def keep(name, shape=None):
        def hook(module, inputs, output):
            seen[name] = output if shape is None else output.unflatten(-1, shape)

        return hook

    heads = module.num_heads, -1
    module.attention_weights.register_forward_hook(keep("logits_student", heads))
    module.teacher.attention_weights.register_forward_hook(keep("logits_teacher", heads))
    module.teacher.features.register_forward_hook(keep("x_teacher"))
    return seen


def check_geometry(inputs):
    """The inputs that are implied here: the levels' shapes and where each begins."""
    shapes = inputs.pop("spatial_shapes")
    assert shapes.tolist() == [list(shape) for shape in SHAPES]
    areas = shapes.prod(dim=1)
    assert torch.equal(inputs.pop("level_start_index"), areas.cumsum(0) - areas)


def test_all_that_is_recorded(reference_dir, monkeypatch):
    recording = Recording(reference_dir / "ks_detr" / "attention")
    (case,) = recording.of_kind("deformable")
    entries, facts = recording.entries(case), recording.cases[case]
    module, inputs = build(), entries.group("in")
    module.load_state_dict(our_attention(entries.group("w")))
    check_geometry(inputs)
    seen = watch(module)
    with_foreground(monkeypatch, inputs["fg_mask"].T)
    tokens, positions = (inputs[key].requires_grad_() for key in ("x", "pos"))
    output = module(tokens, make_context(inputs))
    names = facts["outputs"]
    branches = dict(zip(names, output.chunk(len(names)), strict=True))
    seen |= branches
    expected = entries.group("out")
    assert seen.keys() == expected.keys()
    for name, value in expected.items():
        matches(seen[name], value, name=name)

    cotangents = entries.group("cotangent")
    for name, branch in branches.items():
        silent = facts["zero_gradient_tensors_per_branch"][name]
        check_branch(entries, silent, name, module, tokens, branch, cotangents[name])
    output.backward(torch.cat([cotangents[name] for name in names]))
    inputs = {"x": tokens.grad, "pos": positions.grad}
    check_gradients(module, entries, inputs)


def random_inputs(seed=0, batch=2, dim=32):
    generator = torch.Generator().manual_seed(seed)
    count = sum(h * w for h, w in SHAPES)
    draw = {"generator": generator, "dtype": torch.float64}
    padding = torch.zeros(batch, count)
    padding[-1, 25:30] = 1
    return {
        "x": torch.randn(batch, count, dim, **draw),
        "pos": torch.randn(batch, count, dim, **draw),
        "fg_mask": torch.rand(batch, count, **draw) > 0.5,
        "key_padding_mask": padding,
        "reference_points": torch.rand(batch, count, 2, 2, **draw),
    }


def randomize(module, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(
                torch.randn(p.shape, generator=generator, dtype=p.dtype) / math.sqrt(p.shape[-1])
            )


def sample(value, locations, weights):
    """Bilinear samples, zero outside, one after the other: (S, H, D) to (N, H * D)."""
    count, heads = weights.shape[:2]
    output = torch.zeros(count, heads, value.shape[-1], dtype=value.dtype)
    start = 0
    for level, (height, width) in enumerate(SHAPES):
        plane = value[start : start + height * width].unflatten(0, (height, width))
        start += height * width
        place = locations[:, :, level] * torch.tensor([width, height]) - 0.5
        corner = place.floor()
        for dx in (0, 1):
            for dy in (0, 1):
                x, y = (corner + torch.tensor([dx, dy])).unbind(-1)
                share = (1 - (place[..., 0] - x).abs()) * (1 - (place[..., 1] - y).abs())
                inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
                x, y = x.clamp(0, width - 1).long(), y.clamp(0, height - 1).long()
                picked = plane[y, x, torch.arange(heads)[:, None]]  # (N, H, P, D)
                factor = share * inside * weights[:, :, level]
                output += (picked * factor[..., None]).sum(2)
    return output.flatten(1)


def formula(module, inputs, branches):
    """Section by section, one image after the other, nothing shared."""
    x, pos, smlp = inputs["x"], inputs["pos"], module.teacher.features.linear
    rows = {}
    for image, padded in enumerate(inputs["key_padding_mask"].bool()):
        marked = (inputs["fg_mask"][image] & ~padded)[:, None].double()
        plain = x[image]
        taught = plain * (1 - marked) + smlp(plain).clamp(min=0) * marked
        query = plain + pos[image]
        size = torch.tensor([(w, h) for h, w in SHAPES])[:, None]
        offsets = module.sampling_offsets(query).view(-1, 4, 2, 4, 2) / size
        locations = inputs["reference_points"][image][:, None, :, None] + offsets

        def weigh(layer, features):
            return layer(features).view(-1, 4, 8).softmax(-1).view(-1, 4, 2, 4)

        def project(layer, features, padded=padded):
            return (layer(features) * ~padded[:, None]).view(len(features), 4, -1)

        weights = weigh(module.attention_weights, query)
        value = project(module.value_proj, plain)
        outputs = {"student": (value, weights)}
        if "share_v" in branches:
            taught_weights = weigh(module.teacher.attention_weights, taught + pos[image])
            outputs["share_v"] = value, taught_weights
        if "share_a" in branches:
            outputs["share_a"] = project(module.teacher.value_proj, taught), weights
        for name, (v, a) in outputs.items():
            attended = plain + module.output_proj(sample(v, locations, a))
            rows.setdefault(name, []).append(attended)
    return torch.cat([torch.stack(rows[name]) for name in ("student", *branches)])


@pytest.mark.parametrize("branches", [BRANCHES, ("share_v",), ("share_a",)])
def test_triple_and_duals_follow_the_formula(branches, monkeypatch):
    module, inputs = build(branches), random_inputs()
    randomize(module)
    with_foreground(monkeypatch, inputs["fg_mask"])
    output = module(inputs["x"], make_context(inputs))
    torch.testing.assert_close(output, formula(module, inputs, branches), rtol=1e-9, atol=1e-9)
    cotangent = torch.randn(output.shape, dtype=torch.float64)
    found = torch.autograd.grad(output, list(module.parameters()), cotangent)
    slow = formula(module, inputs, branches)
    expected = torch.autograd.grad(slow, list(module.parameters()), cotangent)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


def test_only_the_layers_that_a_dual_needs_exist():
    assert not hasattr(build(("share_v",)).teacher, "value_proj")
    assert not hasattr(build(("share_a",)).teacher, "attention_weights")


def test_without_ground_truth_it_is_the_plain_attention():
    module, inputs = build(), random_inputs()
    randomize(module)
    plain = DeformableSelfAttention(32, 4, num_levels=2, dropout=0.0).double()
    plain.load_state_dict({k: v for k, v in module.state_dict().items() if "teacher" not in k})
    context = make_context(inputs, None)
    assert torch.equal(module(inputs["x"], context), plain(inputs["x"], context))
    assert [branch.name for branch in module.branches(context)] == ["student"]


def test_student_is_bit_for_bit_the_plain_attention_beside_its_teachers(monkeypatch):
    module, inputs = build().float(), random_inputs()
    randomize(module)
    inputs = {key: value.float() for key, value in inputs.items()}
    with_foreground(monkeypatch, inputs["fg_mask"])
    together = module(inputs["x"], make_context(inputs))
    assert torch.equal(together[:2], module(inputs["x"], make_context(inputs, None)))


def test_dropout_is_drawn_for_every_branch(monkeypatch):
    torch.manual_seed(0)
    module, inputs = build(features=ForegroundMark(), dropout=0.5), random_inputs()
    module.teacher.load_state_dict(  # the teachers' own parts become the student's
        {
            f"{name}.{kind}": getattr(getattr(module, name), kind)
            for name in ("attention_weights", "value_proj")
            for kind in ("weight", "bias")
        }
    )
    monkeypatch.setattr(module.teacher.features, "forward", lambda tokens, *_: tokens)
    with_foreground(monkeypatch, inputs["fg_mask"])
    nn.init.ones_(module.output_proj.bias)
    branches = [part - inputs["x"] for part in module(inputs["x"], make_context(inputs)).chunk(3)]
    dropped = [part == 0 for part in branches]
    assert not torch.equal(dropped[0], dropped[1])
    assert not torch.equal(dropped[0], dropped[2])
    kept = ~(dropped[0] | dropped[1] | dropped[2])
    for part in branches[1:]:
        torch.testing.assert_close(part[kept], branches[0][kept])


def test_teacher_starts_as_released():
    torch.manual_seed(0)
    student = DeformableSelfAttention(256, 8)
    module = KnowledgeSharingDeformableAttention(student, ForegroundMLP(256))
    bounds = {"attention_weights": 0.125, "value_proj": (6 / 512) ** 0.5, "features.linear": 0.0625}
    for name, bound in bounds.items():
        weight = module.teacher.get_submodule(name).weight
        assert 0.99 * bound < weight.abs().max() <= bound, name
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    assert not module.teacher.attention_weights.bias.any()
    assert not module.teacher.value_proj.bias.any()
    assert not module.attention_weights.weight.any()
