"""D3ETR's losses against recorded values and gradients, and on random inputs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded_distillation import RecordedLosses, context, view

from detectors.attention import attend, attention_weights
from detectors.late_maps import LateMap, LateMaps
from detectors.structures import AttentionMaps
from engine.errors import UserError
from projects.detr_distill import attention_maps
from projects.detr_distill.attention_maps import (
    CrossAttentionDistillation,
    SelfAttentionDistillation,
    divergence,
)
from projects.detr_distill.prediction import PredictionDistillation

EXACT = {"rtol": 1e-9, "atol": 1e-9}
PARTS = {"pred_cls": "class", "pred_l1": "bbox", "pred_giou": "giou"}
GROUPS = {"adaptive": "s", "fixed": "a"}


@pytest.fixture(scope="module")
def recorded(reference_dir):
    return RecordedLosses(reference_dir, "d3etr")


def no_targets(batch):
    nothing = {"labels": torch.zeros(0, dtype=torch.long), "boxes": torch.zeros(0, 4)}
    return [nothing | {"boxes_xyxy": torch.zeros(0, 4)} for _ in range(batch)]


def maps_of(scores, padding=None, late=True):
    """A layer's maps of recorded scores, as they are or to be made later."""

    def make(layer):
        logits = scores[layer]
        if padding is not None:
            logits = logits.masked_fill(padding[:, None, None], float("-inf"))
        return logits.softmax(-1)

    layers = range(len(scores))
    return (
        [LateMap(lambda rows, k=k: make(k)[rows], make(k).shape) for k in layers]
        if late
        else [make(k) for k in layers]
    )


class Case:
    """The recorded teacher, student and group; their tensors are leaves."""

    def __init__(self, recorded, late=True):
        names = ("logits", "boxes", "sa_scores", "ca_scores")
        self.leaves = {f"{n}_{g}": recorded.leaf(f"{n}_{g}") for n in names for g in "sa"}
        self.leaves |= {f"{n}_t": recorded[f"{n}_t"] for n in names}
        views = {}
        for group in "sat":
            logits, boxes, own, cross = (self.leaves[f"{name}_{group}"] for name in names)
            padding = recorded["key_padding"]
            attention = AttentionMaps(maps_of(own, None, late), maps_of(cross, padding, late))
            views[group] = view(logits, boxes, attention=attention)
        self.context = context(views["s"], views["t"], no_targets(2), views["a"])


@pytest.fixture(params=[True, False], ids=["late", "whole"])
def case(recorded, request):
    return Case(recorded, request.param)


def test_matching(recorded, case):
    assert torch.equal(case.context.pairs.teacher.view(2, 2, 6), recorded["xi"])
    assert torch.equal(case.context.pairs.student.view(2, 2, 6), torch.arange(6).expand(2, 2, 6))


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("layer", [0, 1])
def test_losses_of_a_layer(recorded, case, group, layer):
    suffix = "_group" if group == "fixed" else ""
    for kind, objective in (
        ("sa", SelfAttentionDistillation(group, layers=[layer])),
        ("ca", CrossAttentionDistillation(group, layers=[layer])),
    ):
        (name, loss), *_ = objective(case.context).items()
        assert name == f"loss_{objective.kind}{suffix}"
        torch.testing.assert_close(loss, recorded[f"loss/{group}/{kind}"][layer], **EXACT)
    losses = PredictionDistillation(group, layers=[layer])(case.context)
    for key, part in PARTS.items():
        expected = recorded[f"loss/{group}/{key}"][layer]
        torch.testing.assert_close(losses[f"loss_prediction_{part}{suffix}"], expected, **EXACT)


def test_total_and_all_gradients(recorded, case):
    losses = {}
    for group in GROUPS:
        for kind in (
            SelfAttentionDistillation,
            CrossAttentionDistillation,
            PredictionDistillation,
        ):
            losses |= kind(group)(case.context)
    assert len(losses) == 10
    total = sum(losses.values())
    torch.testing.assert_close(total, recorded["loss/total_lambda_1"], **EXACT)
    total.backward()
    for name in ("logits", "boxes", "sa_scores", "ca_scores"):
        for group in "sa":
            found = case.leaves[f"{name}_{group}"].grad
            torch.testing.assert_close(found, recorded[f"grad/{name}_{group}"], **EXACT)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"divergence": "reverse_kl"}, "reverse_kl"),
        ({"average_heads": True}, "head_mean"),
        ({"renormalise": False}, "not_renormalised"),
        ({"divergence": "mse", "renormalise": False}, "mse"),
    ],
)
def test_other_readings(recorded, case, options, name):
    for layer in range(2):
        objective = SelfAttentionDistillation(layers=[layer], **options)
        loss = objective(case.context)["loss_self_attention"]
        expected = recorded[f"loss/alt/adaptive_sa_{name}"][layer]
        torch.testing.assert_close(loss, expected, **EXACT)


# --- without the reference folder ---------------------------------------------------------------


def made_view(seed, layers, batch, queries, cells, heads=2, classes=3):
    """A view of random predictions and maps in float64, and the scores behind its maps."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    boxes = noise(layers, batch, queries, 4).sigmoid() * 0.5 + 0.1
    scores = [
        noise(layers, batch, heads, queries, keys).requires_grad_() for keys in (queries, cells)
    ]
    maps = AttentionMaps(maps_of(scores[0]), maps_of(scores[1]))
    logits = noise(layers, batch, queries, classes)
    return view(logits, boxes, attention=maps), scores


def by_hand(student, teacher, pairs, self_attention):
    """KL of (H, N, S) maps of one image, entry by entry."""
    total = 0.0
    for own, theirs in pairs:
        for head in range(len(student)):
            s, t = student[head][own], teacher[head][theirs]
            if self_attention:
                s, t = s[[a for a, _ in pairs]], t[[b for _, b in pairs]]
                s, t = s / s.sum(), t / t.sum()
            for p, q in zip(t.tolist(), s.tolist(), strict=True):
                total += p * float(torch.tensor(p / q, dtype=torch.float64).log())
    return total / (len(pairs) * len(student))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 3), st.integers(1, 3), st.data())
def test_only_pairs_count(queries, others, layers, teacher_layers, data):
    """Any two numbers of queries and of layers, against loops over the definition."""
    seed = data.draw(st.integers(0, 10**6))
    student, scores = made_view(seed, layers, 2, queries, 4)
    teacher, teacher_scores = made_view(seed + 1, teacher_layers, 2, others, 4)
    found = context(student, teacher, no_targets(2))
    stages = [-(-(k + 1) * teacher_layers // layers) - 1 for k in range(layers)]
    for place, objective in enumerate((SelfAttentionDistillation(), CrossAttentionDistillation())):
        expected = 0.0
        for layer, stage in enumerate(stages):
            for image in range(2):
                own = found.pairs.images == image
                pairs = list(
                    zip(
                        found.pairs.student[layer, own].tolist(),
                        found.pairs.teacher[layer, own].tolist(),
                        strict=True,
                    )
                )
                assert len(pairs) == min(queries, others)
                s = scores[place][layer, image].detach().softmax(-1)
                t = teacher_scores[place][stage, image].detach().softmax(-1)
                expected += by_hand(s, t, pairs, self_attention=place == 0) / 2
        (loss,) = objective(found).values()
        assert loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    (wanted, *_) = torch.autograd.grad(loss, scores[1:])
    picked = torch.zeros(layers, 2, queries, dtype=torch.bool)
    for layer in range(layers):
        picked[layer, found.pairs.images, found.pairs.student[layer]] = True
    assert (wanted[~picked[:, :, None].expand(-1, -1, 2, -1)] == 0).all()
    assert teacher_scores[1].grad is None


def test_the_same_maps_differ_in_nothing():
    student, scores = made_view(3, 2, 2, 4, 6)
    same = context(student, student, no_targets(2), student)
    for objective in (SelfAttentionDistillation("fixed"), CrossAttentionDistillation("fixed")):
        (loss,) = objective(same).values()
        assert abs(float(loss)) < 1e-14
        gradients = torch.autograd.grad(loss, scores, allow_unused=True)
        assert all(g is None or g.abs().max() < 1e-15 for g in gradients)


def test_heads_are_averaged_where_their_numbers_differ():
    student, _ = made_view(1, 1, 2, 4, 6, heads=4)
    teacher, _ = made_view(2, 1, 2, 4, 6, heads=2)
    found = context(student, teacher, no_targets(2))
    (loss,) = CrossAttentionDistillation()(found).values()
    (explicit,) = CrossAttentionDistillation(average_heads=True)(found).values()
    torch.testing.assert_close(loss, explicit, **EXACT)
    s, t = (v.attention.cross_attention[0]().mean(1) for v in (student, teacher))
    t = t.take_along_dim(found.pairs.teacher.view(2, 4, 1), dim=1)
    torch.testing.assert_close(loss, (t * (t / s).log()).sum(-1).mean(), **EXACT)


@pytest.mark.parametrize("kind", ["kl", "reverse_kl"])
def test_zeros_leave_values_and_gradients_finite(kind):
    """Padded cells of one, of the other, of both; and probabilities that underflow."""
    scores = torch.tensor([[0.0, 1.0, float("-inf"), float("-inf"), -200.0]], requires_grad=True)
    wanted = torch.tensor([[0.5, 0.0, 0.5, 0.0, 0.0]])
    loss = divergence(scores.softmax(-1), wanted, kind)
    loss.backward()
    assert loss.isfinite()
    assert scores.grad.isfinite().all()


def test_kl_has_the_gradient_of_softmax():
    """Of KL(t || softmax(z)) with respect to z it is softmax(z) - t."""
    scores = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    wanted = torch.randn(2, 3, 5, dtype=torch.float64).softmax(-1)
    divergence(scores.softmax(-1), wanted, "kl").backward()
    torch.testing.assert_close(scores.grad, (scores.softmax(-1).detach() - wanted) / 6, **EXACT)


def sampled(heads, levels=2, points=3, seed=0):
    """A view of a deformable decoder of one layer."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(2, 4, heads, levels * points, generator=generator, dtype=torch.float64)
    weights = weights.requires_grad_().softmax(-1).unflatten(-1, (levels, points))
    found, _ = made_view(seed, 1, 2, 4, 6)
    maps = AttentionMaps(found.attention.self_attention, sampling=[(None, weights)])
    return view(found.logits, found.boxes, attention=maps)


def test_sampling_points_are_a_distribution():
    student, teacher = sampled(2), sampled(2, seed=1)
    (loss,) = CrossAttentionDistillation("fixed")(
        context(student, teacher, no_targets(2), student)
    ).values()
    s, t = (v.attention.sampling[0][1].flatten(3) for v in (student, teacher))
    torch.testing.assert_close(loss, (t * (t / s).log()).sum(-1).mean(), **EXACT)


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        (sampled(2), sampled(4), "attends to samples of 2 heads, .* the teacher to .* 4 heads"),
        (sampled(2), made_view(0, 1, 2, 4, 6)[0], "samples of .* the teacher to maps of"),
        (sampled(2, points=2), sampled(2), "2 points, the teacher to .* 3 points"),
    ],
)
def test_what_cannot_be_compared_is_refused(student, teacher, message):
    with pytest.raises(UserError, match=message):
        CrossAttentionDistillation().prepare(student, teacher)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SelfAttentionDistillation("mine"), "group is 'mine', expected"),
        (lambda: SelfAttentionDistillation(divergence="js"), "divergence is 'js', expected"),
    ],
)
def test_options_are_checked(make, message):
    with pytest.raises(UserError, match=message):
        make()


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.booleans(), st.integers(0, 10**6))
def test_a_late_map_is_the_map(queries, keys, masked, seed):
    generator = torch.Generator().manual_seed(seed)
    query, key = (
        torch.randn(3, 2, n, 5, generator=generator, dtype=torch.float64) for n in (queries, keys)
    )
    allowed = torch.ones(queries, keys, dtype=torch.bool)
    if masked:
        allowed[:, 1:] = False
    whole = attention_weights(query, key, allowed)
    expected = torch.einsum("bhnd,bhsd->bhns", query, key) / 5**0.5
    expected = expected.masked_fill(~allowed, float("-inf")).exp()
    torch.testing.assert_close(whole, expected / expected.sum(-1, keepdim=True), **EXACT)
    maps = LateMaps()
    padding = torch.arange(3)[:, None, None, None] < 2  # one of the images has no cell to look at
    for mask, expected in (
        (allowed, whole),
        (allowed & padding, torch.where(padding, whole, float("nan"))),
    ):
        attend(query, key, key, mask, maps=maps)
        late = maps.pop()
        torch.testing.assert_close(late(), expected, equal_nan=True, **EXACT)
        assert late.shape == expected.shape
        picked = late[:2, :, 1:, :]
        assert picked.shape == expected[:2, :, 1:].shape
        torch.testing.assert_close(picked(), expected[:2, :, 1:], **EXACT)
        torch.testing.assert_close(picked(slice(1, 2)), expected[1:2, :, 1:], **EXACT)


@pytest.mark.parametrize("make", [SelfAttentionDistillation, CrossAttentionDistillation])
def test_images_by_twos_lose_what_they_lose_together(make, monkeypatch):
    """Of five images the last is alone, and counts no more than the others."""
    student, leaves = made_view(0, 2, 5, 4, 6)
    teacher, _ = made_view(1, 2, 5, 8, 6)  # whose maps are larger
    found = context(student, teacher, no_targets(5))
    asked = []

    class Counted(make):
        def layer_loss(self, student, teacher, pairs, rows):
            asked.append(rows.stop - rows.start)
            return super().layer_loss(student, teacher, pairs, rows)

    results = []
    weights_of_an_image = make().maps(teacher)[0].shape[1:].numel()
    for images in (1000, 2, 0.5):
        monkeypatch.setattr(attention_maps, "AT_A_TIME", int(images * weights_of_an_image))
        (loss,) = Counted()(found).values()
        results.append((loss, *torch.autograd.grad(loss, leaves, allow_unused=True)))
    sizes = [5] * 2 + [2, 2, 1] * 2 + [1] * 10  # of two layers; the backward pass asks again
    assert sorted(asked) == sorted(sizes * 2)
    assert any(value is not None for value in results[0][1:])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], **EXACT)


def test_no_weights_are_kept():
    """Autograd keeps, of all maps of a step, none: neither the student's nor the teacher's."""
    student, _ = made_view(0, 3, 2, 8, 40)
    teacher, _ = made_view(1, 3, 2, 9, 40)
    found = context(student, teacher, no_targets(2))
    kept = {}

    def keep(tensor):
        kept[tensor.data_ptr()] = tensor.shape
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        for objective in (SelfAttentionDistillation(), CrossAttentionDistillation()):
            objective(found)
    assert not [shape for shape in kept.values() if len(shape) == 4]
