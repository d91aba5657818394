"""Knowledge-sharing encoders: recorded ones, several layers, and what the student may see."""

import pytest
import torch
from recorded_entries import Recording, matches
from torch import nn

from detectors.adamixer import NoEncoder
from detectors.attention import SelfAttention
from detectors.dab_detr import DABEncoder
from detectors.deformable_attention import DeformableSelfAttention
from detectors.structures import Branch, FeatureMaps
from detectors.transformer import Encoder, EncoderLayer
from projects.ks_detr import teacher
from projects.ks_detr.attention import KnowledgeSharingAttention
from projects.ks_detr.checkpoint import from_released, plain_state_dict
from projects.ks_detr.encoder import share_knowledge

CASES = {
    "conditional": ("share_v", "share_a"),
    "dab": ("share_v", "share_a"),
    "dab_dual_share_v": ("share_v",),
    "dab_dual_share_a": ("share_a",),
    "deformable": ("share_v", "share_a"),
}
SHAPES = ((5, 6), (3, 3))


def make_encoder(kind, num_layers=2, dim=32):
    if kind == "deformable":
        attention = DeformableSelfAttention(dim, 4, num_levels=2, dropout=0.0)
    else:
        attention = SelfAttention(dim, 4)
    activation = nn.PReLU() if kind.startswith("dab") else None
    layer = EncoderLayer(attention, 64, 0.0, activation)
    return (DABEncoder if kind.startswith("dab") else Encoder)(layer, num_layers)


def feature_maps(tokens, positions, padding, shapes):
    """Feature maps whose tokens, positions (B, S, C) and padding (B, S) are given."""
    areas = [height * width for height, width in shapes]

    def split(tensor):
        parts = zip(tensor.split(areas, 1), shapes, strict=True)
        return tuple(part.unflatten(1, shape) for part, shape in parts)

    levels, encodings = (
        tuple(part.permute(0, 3, 1, 2) for part in split(tensor)) for tensor in (tokens, positions)
    )
    masks = None if padding is None else split(padding)
    return FeatureMaps(levels, masks, encodings, [(64, 64)] * len(tokens), (64, 64))


def batch_first(kind, tensor):
    return tensor if kind == "deformable" else tensor.transpose(0, 1)


@pytest.fixture(scope="module")
def recording(reference_dir):
    return Recording(reference_dir / "ks_detr" / "encoder")


def sources(weights):
    """By released key, the keys of this encoder that hold its rows."""
    marked = {key: torch.full_like(w, i) for i, (key, w) in enumerate(weights.items())}
    names = list(weights)
    found = {key: [] for key in names}
    for key, value in from_released(marked, prefix="").items():
        found[names[int(value.flatten()[0])]].append(key)
    return found


def check_geometry(inputs, context):
    """What the encoder works out itself of shapes and padding; then it takes what is recorded.

    It does so in float32, as the release did: one rounding apart, outputs would differ by 1e-6.
    """
    shapes = inputs.pop("spatial_shapes")
    assert shapes.tolist() == [list(shape) for shape in context.features.spatial_shapes]
    areas = shapes.prod(dim=1)
    assert torch.equal(inputs.pop("level_start_index"), areas.cumsum(0) - areas)
    matches(context.grid.valid_ratios, inputs.pop("valid_ratios"))
    points = inputs.pop("reference_points")
    matches(context.grid.reference_points, points)
    object.__setattr__(context.grid, "reference_points", points)


def check_gradients(encoder, inputs, recorded, norms, weights):
    """Of everything the norm, of the inputs and the last attention's parameters all values."""
    found = inputs | {name: parameter.grad for name, parameter in encoder.named_parameters()}
    rows = sources(weights) | {name: [name] for name in inputs}
    assert sorted(found) == sorted(name for key in norms for name in rows[key])
    for key, norm in norms.items():
        gradient = torch.cat([found[name] for name in rows[key]])
        assert gradient.norm().item() == pytest.approx(norm, rel=1e-6), key
    for key, values in recorded.items():
        matches(torch.cat([found[name] for name in rows[key]]), values, name=key)


@pytest.mark.parametrize("case", CASES)
def test_all_that_is_recorded(case, recording, monkeypatch):
    entries, facts = recording.entries(case), recording.cases[case]
    encoder = share_knowledge(make_encoder(case), CASES[case]).double()
    weights, inputs = entries.group("w"), entries.group("in")
    encoder.load_state_dict(from_released(weights, prefix=""))
    assert set(facts["state_dict_keys"]) == weights.keys()
    x, pos = (batch_first(case, inputs.pop(key)).requires_grad_() for key in ("x", "pos"))
    foreground, padding = inputs.pop("fg_mask").T, inputs.pop("key_padding_mask")
    monkeypatch.setattr(teacher, "foreground_mask", lambda *_: foreground)
    seen = {}
    encoder.layers[0].register_forward_hook(lambda _, given, out: seen.update(layer0=out))
    if case == "deformable":
        encoder.layers[0].register_forward_pre_hook(
            lambda _, given: check_geometry(inputs, given[1])
        )
    shapes = SHAPES if case == "deformable" else ((4, 5),)
    memory = encoder(feature_maps(x, pos, padding, shapes), targets=[])
    assert not inputs
    names = facts["outputs"]
    assert [branch.name for branch in memory.branches] == ["student", *CASES[case]]
    found = dict(zip(names, memory.tokens.chunk(len(names)), strict=True)) | seen
    expected = entries.group("out")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        matches(found[name], batch_first(case, value), name=name)

    cotangents = entries.group("cotangent")
    memory.tokens.backward(torch.cat([batch_first(case, cotangents.pop(name)) for name in names]))
    assert not cotangents
    inputs = {"x": batch_first(case, x.grad), "pos": batch_first(case, pos.grad)}
    gradients = entries.group("grad")
    check_gradients(encoder, inputs, gradients, facts["gradient_norms"], weights)
    entries.finish()


def test_no_recorded_encoder_is_left_out(recording):
    assert recording.cases.keys() == {key.split("/")[0] for key in recording.arrays} == set(CASES)


def attention(query, key, value, heads, padding):
    """Multi-head attention of one image (S, C), head after head."""
    outputs = []
    width = query.shape[-1] // heads
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        logits = query[:, part] @ key[:, part].T / width**0.5
        logits[:, padding] = float("-inf")
        outputs.append(logits.softmax(-1) @ value[:, part])
    return torch.cat(outputs, dim=-1)


def slow_layer(layer, rows, positions, foreground, padding):
    """One dense layer on one image: tokens (S, C) of every branch by name, nothing shared."""
    module, dim = layer.attentions[0], layer.embed_dim
    weight, bias = module.attn.in_proj_weight, module.attn.in_proj_bias

    def project(x, p, weight, bias, block):
        part = slice(block * dim, (block + 1) * dim)
        return (x if p is None else x + p) @ weight[part].T + bias[part]

    def plain(x, p):
        return [project(x, q, weight, bias, i) for i, q in enumerate((p, p, None))]

    if isinstance(module, KnowledgeSharingAttention):
        teaching = module.teacher
        names = ["student", *(branch.name for branch in teaching.branches)]
        rows = {name: rows.get(name, rows["student"]) for name in names}
        positions = {name: positions.get(name, positions["student"]) for name in names}
        packed = teaching.in_proj_weight, teaching.in_proj_bias
    attended = {}
    for name, x in rows.items():
        query, key, value = plain(x, positions[name])
        if name != "student" and isinstance(module, KnowledgeSharingAttention):
            marked = (foreground & ~padding)[:, None]
            taught = torch.where(marked, teaching.features.linear(x).relu(), x)
            query, key, value = plain(rows["student"], positions["student"])
            if name == "share_v":
                query, key = (project(taught, positions[name], *packed, i) for i in (0, 1))
            else:
                value = project(taught, None, *packed, len(packed[0]) // dim - 1)
        attended[name] = x + module.attn.out_proj(
            attention(query, key, value, module.num_heads, padding)
        )
    return {name: layer.norms[1](layer.ffns[0](layer.norms[0](x))) for name, x in attended.items()}


def slow_encoder(encoder, tokens, positions, foreground, padding):
    """All branches (R * B, S, C) of an encoder, one image, branch and head after the other."""
    images = []
    for x, p, marked, padded in zip(tokens, positions, foreground, padding, strict=True):
        rows = {"student": x}
        for layer in encoder.layers:
            scale = getattr(encoder, "query_scale", lambda _: 1)
            rows = slow_layer(
                layer, rows, {name: p * scale(x) for name, x in rows.items()}, marked, padded
            )
        images.append(torch.cat([x[None] for x in rows.values()]))
    return torch.cat(list(torch.stack(images, dim=1)))


def random_inputs(shapes=SHAPES, dim=32, dtype=torch.float64):
    torch.manual_seed(3)
    count = sum(height * width for height, width in shapes)
    x, pos = torch.randn(2, 2, count, dim, dtype=dtype)
    padding = torch.zeros(2, count, dtype=torch.bool)
    start = 0
    for height, width in shapes:
        padding[1, start : start + height * width].view(height, width)[:, width - 1 :] = True
        start += height * width
    return x, pos, torch.rand(2, count) > 0.5, padding


def randomize(module):
    torch.manual_seed(4)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return module


LAYERS = [1, 2, 4, [0], [0, 2], [1, 3], (3, 1, -1)]


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("kind", ["conditional", "dab"])
@pytest.mark.parametrize("branches", [("share_v", "share_a"), ("share_a",)])
def test_branches_go_on_through_the_layers(branches, kind, layers, monkeypatch):
    encoder = share_knowledge(make_encoder(kind, 4), branches, layers=layers)
    randomize(encoder.double())
    x, pos, foreground, padding = random_inputs()
    monkeypatch.setattr(teacher, "foreground_mask", lambda *_: foreground)
    memory = encoder(feature_maps(x, pos, padding, SHAPES), targets=[])
    assert [branch.name for branch in memory.branches] == ["student", *branches]
    expected = slow_encoder(encoder, x, pos, foreground, padding)
    torch.testing.assert_close(memory.tokens, expected, rtol=1e-9, atol=1e-9)
    cotangent = torch.randn_like(expected)
    parameters = list(encoder.parameters())
    found = torch.autograd.grad(memory.tokens, parameters, cotangent)
    wanted = torch.autograd.grad(expected, parameters, cotangent)
    torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("kind", ["conditional", "dab", "deformable"])
def test_the_student_never_sees_a_teacher(kind, layers, monkeypatch):
    encoder = randomize(share_knowledge(make_encoder(kind, 4), layers=layers).double())
    plain = make_encoder(kind, 4).double()
    plain.load_state_dict(plain_state_dict(encoder.state_dict()))
    x, pos, foreground, padding = random_inputs()
    monkeypatch.setattr(teacher, "foreground_mask", lambda *_: foreground)
    features = feature_maps(x, pos, padding, SHAPES)
    student = encoder(features, targets=[]).tokens[:2]
    torch.testing.assert_close(student, plain(features).tokens, rtol=1e-12, atol=1e-12)
    for name, parameter in encoder.named_parameters():
        if "teacher" in name:
            nn.init.normal_(parameter)
    assert torch.equal(encoder(features, targets=[]).tokens[:2], student)
    assert torch.equal(encoder(features).tokens, plain(features).tokens)


@pytest.mark.parametrize("kind", ["conditional", "dab", "deformable"])
def test_checkpointed_layers_give_the_same_gradients(kind, monkeypatch):
    x, pos, foreground, padding = random_inputs()
    monkeypatch.setattr(teacher, "foreground_mask", lambda *_: foreground)
    encoder = randomize(share_knowledge(make_encoder(kind, 3), layers=[0, 2])).double().train()
    gradients = []
    for encoder.checkpoint_layers in (False, True):
        encoder.zero_grad()
        tokens = encoder(feature_maps(x, pos, padding, SHAPES), targets=[]).tokens
        tokens.pow(2).sum().backward()
        gradients.append([parameter.grad for parameter in encoder.parameters()])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("kind", ["conditional", "deformable"])
def test_hidden_layers_of_the_branches_are_computed_again(kind, monkeypatch):
    x, pos, foreground, padding = random_inputs()
    monkeypatch.setattr(teacher, "foreground_mask", lambda *_: foreground)
    results = []
    for keep_hidden in (False, True):
        torch.manual_seed(0)
        encoder = share_knowledge(make_encoder(kind, 3), layers=[0, 2], keep_hidden=keep_hidden)
        encoder = randomize(encoder).double().train()
        again = [layer.ffns[0].checkpoint_hidden for layer in encoder.layers]
        assert again == [not keep_hidden, False, not keep_hidden]
        torch.manual_seed(1)
        tokens = encoder(feature_maps(x, pos, padding, SHAPES), targets=[]).tokens
        tokens.pow(2).sum().backward()
        results.append([tokens, *(parameter.grad for parameter in encoder.parameters())])
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def test_each_layer_has_a_teacher_of_its_own():
    encoder = share_knowledge(make_encoder("conditional", 4), layers=[1, 3])
    keys = {key for key in encoder.state_dict() if "teacher.features" in key}
    assert keys == {
        f"layers.{layer}.attentions.0.teacher.features.linear.{kind}"
        for layer in (1, 3)
        for kind in ("weight", "bias")
    }
    first, second = (encoder.layers[layer].attentions[0].teacher for layer in (1, 3))
    assert not torch.equal(first.in_proj_weight, second.in_proj_weight)


def test_branches_carry_their_settings():
    encoder = share_knowledge(
        make_encoder("deformable"),
        ["share_a", "share_v"],
        teacher_aux_loss=True,
        branch_loss_weights={"share_a": 0.5},
    )
    found = encoder.layers[-1].attentions[0].teacher_branches
    assert found == (Branch("share_v", True, 1.0), Branch("share_a", True, 0.5))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"teacher_features": "concat"}, r"'concat', expected 'smlp' or 'mark'"),
        ({"branches": []}, r"branches is \[\], expected 'share_v', 'share_a' or both"),
        ({"branches": ["share_v", "v"]}, r"branches is \['share_v', 'v'\]"),
        ({"layers": 0}, "layers is 0, the encoder has 2"),
        ({"layers": 3}, "layers is 3, the encoder has 2"),
        ({"layers": []}, r"layers is \[\], the encoder has 2"),
        ({"layers": [0, 2]}, r"layers is \[0, 2\], the encoder has 2"),
        ({"interpolation": "cubic"}, r"interpolation is 'cubic'"),
        (
            {"branches": ["share_v"], "branch_loss_weights": {"share_a": 1.0}},
            r"branch_loss_weights names \['share_a'\], the branches are \['share_v'\]",
        ),
    ],
)
def test_wrong_options_are_refused(options, error):
    encoder = make_encoder("conditional")
    with pytest.raises(ValueError, match=error):
        share_knowledge(encoder, **options)
    assert type(encoder.layers[-1].attentions[0]) is SelfAttention


def test_teachers_are_where_the_encoder_is():
    encoder = share_knowledge(make_encoder("conditional").double())
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float64}


def test_only_plain_layers_are_extended():
    with pytest.raises(TypeError, match="NoEncoder is no Encoder"):
        share_knowledge(NoEncoder(8))
    encoder = share_knowledge(make_encoder("conditional", 3))
    with pytest.raises(TypeError, match="has KnowledgeSharingAttention"):
        share_knowledge(encoder)
    with pytest.raises(TypeError, match="shares knowledge already, name all its layers at once"):
        share_knowledge(encoder, layers=[0])
