"""Queries of noised targets: where they are, what they see, how far noise goes."""

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded_detectors import RecordedDetector
from tiny_dab import build_recorded
from tiny_detectors import ROOT

from detectors.denoising import DenoisingQueries
from detectors.structures import Queries


def make_targets(sizes, num_classes=5, device="cpu"):
    torch.manual_seed(sum(sizes))
    return [
        {
            "labels": torch.randint(num_classes, (size,)).to(device),
            "boxes": (torch.rand(size, 4) * 0.4 + 0.3).to(device),
        }
        for size in sizes
    ]


@pytest.fixture(scope="module", params=["dn_detr", "dn_detr_d256"])
def recorded(request):
    folder = ROOT / "tests" / "data" / "detrex"
    if not (folder / f"{request.param}.json").exists():
        folder = request.getfixturevalue("reference_dir") / "detrex" / "detectors"
    return RecordedDetector(folder, request.param)


@pytest.mark.parametrize("case", ["A", "B"])
def test_recorded_noise(case, recorded, monkeypatch):
    model = build_recorded(recorded).train()
    generator, arrays = model.denoising_generator, recorded.arrays
    labels, boxes = (
        arrays[f"noise{case}/{key}"] for key in ("noised_labels", "noised_boxes_cxcywh")
    )
    sizes = [len(item["instances"]) for item in recorded.inputs(case)]
    content, logits, denoising = generator.embed(labels, boxes, sizes)
    torch.testing.assert_close(content, arrays[f"noise{case}/label_queries"])
    torch.testing.assert_close(logits, arrays[f"noise{case}/box_queries"], rtol=1e-5, atol=1e-5)
    mask = generator.attention_mask(denoising, recorded.settings["num_queries"])
    assert torch.equal(mask, arrays[f"noise{case}/attn_mask"])

    monkeypatch.setattr(generator, "noise_labels", lambda _: labels)
    monkeypatch.setattr(generator, "noise_boxes", lambda _: boxes)
    losses = model(recorded.inputs(case))
    expected = recorded.record["train"][f"noise{case}"]["losses"]
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        assert losses[name].item() == pytest.approx(value, rel=1e-4), name


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 5), min_size=1, max_size=4),
    groups=st.integers(1, 4),
    num_queries=st.integers(1, 4),
    indicator=st.booleans(),
)
def test_every_copy_has_its_query(sizes, groups, num_queries, indicator):
    generator = DenoisingQueries(5, 8, groups, 0.0, 0.0, with_indicator=indicator)
    targets = make_targets(sizes)
    content, logits, denoising = generator(targets)
    assert content.shape == (len(sizes), groups * max(sizes), 8)
    assert denoising.count == logits.shape[1] == groups * max(sizes)
    matches = denoising.matches
    assert matches.queries.shape == matches.targets.shape == (1, groups * sum(sizes))

    found = matches.select(logits.sigmoid()[None])[0]
    wanted = torch.cat([target["boxes"] for target in targets])[matches.targets[0]]
    torch.testing.assert_close(found, wanted)
    labels = torch.cat([target["labels"] for target in targets])[matches.targets[0]]
    embedded = matches.select(content[None])[0]
    width = 8 - indicator
    torch.testing.assert_close(embedded[:, :width], generator.label_encoder.weight[labels])
    assert not indicator or (embedded[:, -1] == 1).all()

    free = torch.ones(content.shape[:2], dtype=torch.bool)
    free[matches.images, matches.queries[0]] = False
    assert free.sum() == free.numel() - groups * sum(sizes)  # no query is used twice
    assert (content[free] == 0).all()
    assert (logits[free] == 0).all()
    check_mask(generator.attention_mask(denoising, num_queries), groups, max(sizes), num_queries)


def check_mask(mask, groups, size, num_queries):
    count = groups * size
    assert mask.shape == (count + num_queries, count + num_queries)
    assert mask.dtype == torch.bool
    for row in range(len(mask)):
        for column in range(len(mask)):
            answer = column < count and (row >= count or row // size != column // size)
            assert bool(mask[row, column]) == answer


def test_box_noise_stays_within_its_scale():
    generator = DenoisingQueries(5, 8, box_noise_scale=0.4)
    torch.manual_seed(0)
    boxes = torch.rand(4000, 4) * 0.2 + 0.4
    moved = (generator.noise_boxes(boxes) - boxes) / boxes[:, 2:].repeat(1, 2)
    limit = torch.tensor([0.2, 0.2, 0.4, 0.4])
    assert (moved.abs() <= limit + 1e-6).all()
    assert (moved.abs().amax(0) > 0.95 * limit).all()
    torch.testing.assert_close(moved.mean(0), torch.zeros(4), rtol=0, atol=0.02)
    on_the_edge = torch.tensor([[0.0, 1.0, 0.9, 0.9]]).repeat(100, 1)
    noised = generator.noise_boxes(on_the_edge)
    assert 0 <= noised.min() <= noised.max() <= 1


def test_label_noise_redraws_its_share():
    generator = DenoisingQueries(4, 8, label_noise_prob=0.5)
    torch.manual_seed(0)
    labels = torch.full((20000,), 2)
    noised = generator.noise_labels(labels)
    share = noised.bincount(minlength=5) / len(labels)
    # each of five labels, the one of no target included, is drawn by a tenth of the copies
    torch.testing.assert_close(share, torch.tensor([0.1, 0.1, 0.6, 0.1, 0.1]), rtol=0, atol=0.01)
    assert (labels == 2).all()
    generator = DenoisingQueries(4, 8, label_noise_prob=1.0, noise_draws_no_label=False)
    assert generator.noise_labels(labels).unique().tolist() == [0, 1, 2, 3]


def test_noise_comes_from_the_default_generator():
    generator, targets = DenoisingQueries(5, 8), make_targets([3, 1])
    rounds = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        rounds.append(generator(targets)[1])
    assert torch.equal(rounds[0], rounds[1])
    assert not torch.equal(rounds[0], rounds[2])


def test_no_value_is_read_back_from_the_device():
    generator = DenoisingQueries(5, 8).to("meta")  # has no values: reading one would raise
    targets = make_targets([3, 0, 2], device="meta")
    content, logits, denoising = generator(targets)
    assert content.shape == (3, 15, 8)
    assert logits.shape == (3, 15, 4)
    assert generator.attention_mask(denoising, 6).shape == (21, 21)


def test_other_queries_follow_the_noised_targets():
    generator, targets = DenoisingQueries(5, 8), make_targets([2, 1])
    ordinary = Queries(torch.ones(2, 3, 8), torch.ones(2, 3, 4))
    queries = generator.prepend(ordinary, targets)
    assert torch.equal(queries.content[:, 10:], ordinary.content)
    assert torch.equal(queries.position[:, 10:], ordinary.position)
    assert queries.content.shape[:2] == queries.position.shape[:2] == (2, 13)
    assert queries.attention_mask.shape == (13, 13)


def test_the_label_of_no_target_is_what_other_queries_start_with():
    generator = DenoisingQueries(5, 8)
    content = generator.matching_content(3)
    assert torch.equal(content[:, :-1], generator.label_encoder.weight[-1:].expand(3, -1))
    assert (content[:, -1] == 0).all()
    plain = DenoisingQueries(5, 8, with_indicator=False)
    assert torch.equal(plain.matching_content(2)[1], plain.label_encoder.weight[5])


def test_an_empty_batch_leaves_the_embedding_in_the_graph():
    generator = DenoisingQueries(5, 8)
    content, logits, denoising = generator(make_targets([0, 0]))
    assert content.shape == (2, 0, 8)
    assert logits.shape == (2, 0, 4)
    assert denoising.count == 0
    content.sum().backward()
    assert (generator.label_encoder.weight.grad == 0).all()


def test_groups_are_needed():
    with pytest.raises(ValueError, match="groups is 0, noised targets need at least 1"):
        DenoisingQueries(5, 8, groups=0)


@pytest.mark.parametrize("name", ["dn_detr", "dn_deformable_detr"])
def test_a_config_can_keep_noise_to_the_classes(name):
    config = LazyConfig.load(str(ROOT / f"projects/baselines/configs/{name}_quickstart.py"))
    config.model.noise_draws_no_label = False
    assert not instantiate(config.model).denoising_generator.noise_draws_no_label
