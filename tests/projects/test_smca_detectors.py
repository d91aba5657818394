"""SMCA's detectors whole: padding, precision, compilation, branches, attention maps."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_deformable import check_single_results
from tiny_detectors import SETTINGS, instances, pattern_image
from tiny_smca import build_multi_scale_smca, build_single_scale_smca

from detectors.structures import AttentionMaps, FeatureMaps, LearnedQueries
from projects.ks_detr.encoder import share_knowledge

BUILDERS = {"single": build_single_scale_smca, "multi": build_multi_scale_smca}


@pytest.fixture(params=BUILDERS)
def build(request):
    """Makes a tiny detector of the kind whose Gaussians differ."""

    def make(settings=SETTINGS, **options):
        torch.manual_seed(0)
        model = BUILDERS[request.param](settings, **options)
        for layer in model.transformer.decoder.layers:
            torch.nn.init.normal_(layer.modulation.scales.weight, std=0.1)
        return model

    return make


def batch(boxes=True):
    """Two images of different sizes with and without objects."""
    sizes = [(96, 128), (64, 160)]
    given = [[[10.0, 20.0, 60.0, 70.0], [50.0, 8.0, 100.0, 60.0]], []]
    items = [{"image": pattern_image(index, *size)} for index, size in enumerate(sizes)]
    for item, size, objects in zip(items, sizes, given, strict=True):
        objects = objects if boxes else []
        item["instances"] = instances(size, objects, [0] * len(objects))
    return items


# --- padding ------------------------------------------------------------------------------------


def padded(levels, right, below):
    """The same maps with noise on the right and below, half as wide on each next level."""
    noisy = []
    for index, level in enumerate(levels):
        height, width = level.shape[-2:]
        size = height + (below * 4 >> index), width + (right * 4 >> index)
        larger = 9 * torch.randn(*level.shape[:2], *size, dtype=level.dtype)
        larger[..., :height, :width] = level
        noisy.append(larger)
    return noisy


def feature_maps(model, levels, cells):
    """Projected maps of one image that covers ``cells`` (h, w) of the first one."""
    masks, positions = [], []
    for index, level in enumerate(levels):
        mask = torch.ones(1, *level.shape[-2:], dtype=torch.bool)
        mask[:, : -(-cells[0] >> index), : -(-cells[1] >> index)] = False
        masks.append(mask)
        positions.append(model.position_embedding(mask).to(level.dtype))
    size = (cells[0] * 8 - 3, cells[1] * 8 - 5)
    return FeatureMaps(tuple(levels), tuple(masks), tuple(positions), [size], (999, 999))


@settings(max_examples=10, deadline=None)
@given(
    kind=st.sampled_from(sorted(BUILDERS)),
    cells=st.tuples(st.integers(1, 3), st.integers(1, 3)).map(lambda c: (c[0] * 4, c[1] * 4)),
    right=st.integers(0, 2),
    below=st.integers(0, 2),
    training=st.booleans(),
    seed=st.integers(0, 99),
)
def test_more_padding_changes_nothing(kind, cells, right, below, training, seed):
    torch.manual_seed(seed)
    model = BUILDERS[kind]().double().train(training)
    count = 1 if kind == "single" else 3
    levels = [
        torch.randn(1, SETTINGS["embed_dim"], cells[0] >> i, cells[1] >> i).double()
        for i in range(count)
    ]
    found = []
    for maps in (levels, padded(levels, right, below)):
        memory = model.encode(feature_maps(model, maps, cells))
        found.append(model.predict(model.decode(memory, model.queries(memory))))
    torch.testing.assert_close(found[0].boxes, found[1].boxes, rtol=0, atol=1e-10)
    torch.testing.assert_close(found[0].logits, found[1].logits, rtol=0, atol=1e-10)


def test_a_batch_of_mixed_sizes_gives_single_results(build):
    check_single_results(build().eval())


def test_no_query_attends_to_padding(build):
    model = build().train()
    maps = AttentionMaps()
    memory = model.encode(model.extract(model.preprocess(batch())))
    model.decode(memory, model.queries(memory), maps)
    for weights in maps.cross_attention:
        assert (weights[memory.padding_mask[:, None, None].expand_as(weights)] == 0).all()


# --- attention maps -----------------------------------------------------------------------------


def test_attention_maps_are_made_on_request_and_change_nothing(build):
    model = build().eval()
    with torch.no_grad():
        memory = model.encode(model.extract(model.preprocess(batch())))
        queries = model.queries(memory)
        maps = AttentionMaps()
        plain, seen = model.decode(memory, queries), model.decode(memory, queries, maps)
    assert plain.attention is None
    torch.testing.assert_close(plain.states, seen.states, rtol=0, atol=1e-5)
    shape = (2, SETTINGS["num_heads"], SETTINGS["num_queries"], memory.tokens.shape[1])
    layers = SETTINGS["num_decoder_layers"]
    for kind in (maps.cross_attention, maps.gaussian):
        assert [tuple(entry.shape) for entry in kind] == [shape] * layers
    for weights in maps.cross_attention:  # the weights of the levels sum to 1, too
        torch.testing.assert_close(weights.sum(-1), torch.ones(shape[:-1]))


# --- what has to work ---------------------------------------------------------------------------


@pytest.mark.parametrize("precise", [True, False])
@pytest.mark.parametrize("boxes", [True, False])
def test_training_in_both_precisions(build, boxes, precise):
    model = build().train()
    exact = model(batch(boxes))
    with torch.autocast("cpu", torch.bfloat16, enabled=not precise):
        losses = model(batch(boxes))
    sum(losses.values()).backward()
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(exact[name].item(), rel=0.15, abs=1e-2), name
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(grad.isfinite().all() for grad in gradients.values() if grad is not None)
    assert [name for name, grad in gradients.items() if grad is None] == []


def test_gaussians_stay_precise_under_autocast(build):
    """The centre's logits are not rounded to bfloat16, whatever the content is."""
    model = build().eval()
    with torch.no_grad():
        memory = model.encode(model.extract(model.preprocess(batch())))
        exact = model.decode(memory, model.queries(memory)).references
        with torch.autocast("cpu", torch.bfloat16):
            found = model.decode(memory, model.queries(memory)).references
    assert torch.equal(found, exact)


def test_one_query_and_one_class(build):
    model = build(SETTINGS | {"num_queries": 1, "num_classes": 1})
    losses = model.train()(batch())
    assert all(loss.isfinite() for loss in losses.values())
    with torch.no_grad():
        results = model.eval()(batch())
    assert [len(result["instances"]) for result in results] == [1, 1]


def test_boxes_start_from_the_initial_centre_in_every_layer(build):
    model = build().eval()
    torch.nn.init.constant_(model.transformer.decoder.center_head.layers[-1].bias, 9.0)
    for parameter in model.bbox_embed.layers[-1].parameters():
        torch.nn.init.zeros_(parameter)
    memory = model.encode(model.extract(model.preprocess(batch())))
    output = model.decode(memory, model.queries(memory))
    boxes = model.predict(output).boxes
    expected = output.references.expand_as(boxes[..., :2])
    torch.testing.assert_close(boxes[..., :2], expected, rtol=0, atol=1e-6)
    boxes[..., 0].sum().backward()  # also where detrex's inverse sigmoid has no slope
    slope = expected[..., 0] * (1 - expected[..., 0])
    found = model.transformer.decoder.center_head.layers[-1].bias.grad[0]
    torch.testing.assert_close(found, slope.sum(), rtol=1e-2, atol=0)


def test_compiled_without_a_graph_break(build):
    model = build().eval()
    features = model.extract(model.preprocess(batch()))

    def run(features):
        memory = model.encode(features)
        output = model.decode(memory, model.queries(memory))
        return output.states, output.references

    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected, found = run(features), compiled(features)
    torch.testing.assert_close(found, expected)


def test_checkpointed_layers_give_the_same_gradients(build):
    gradients = []
    for checkpoint in (False, True):
        model = build(encoder_options={"checkpoint_layers": checkpoint}).train()
        sum(model(batch()).values()).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second)


def test_queries_of_another_detector_can_be_decoded(build):
    model, other = build().eval(), build(SETTINGS | {"num_queries": 9})
    memory = model.encode(model.extract(model.preprocess(batch())))
    output = model.decode(memory, model.start(other.learned_queries(), memory))
    assert output.states.shape[2] == 9
    assert isinstance(model.learned_queries(), LearnedQueries)


# --- knowledge sharing --------------------------------------------------------------------------


def test_knowledge_is_shared_on_one_level():
    torch.manual_seed(0)
    model = build_single_scale_smca().double()
    share_knowledge(model.transformer.encoder)
    model.double().train()
    inputs = batch()
    targets = model.prepare_targets(inputs)
    features = model.extract(model.preprocess(inputs))
    memory = model.encode(features, targets)
    assert [branch.name for branch in memory.branches] == ["student", "share_v", "share_a"]
    assert memory.tokens.shape[0] == 3 * len(inputs)
    together = model.decode(memory, model.queries(memory))
    for index, name in enumerate(("student", "share_v", "share_a")):
        alone = memory.of_branch(name)
        states = model.decode(alone, model.queries(alone)).states
        rows = slice(2 * index, 2 * index + 2)
        torch.testing.assert_close(together.states[:, rows], states, rtol=0, atol=1e-10)
    losses = model(inputs)
    kinds = {"loss_class", "loss_bbox", "loss_giou"}
    branches = {kind + suffix for kind in kinds for suffix in ("", "_share_v", "_share_a")}
    assert branches <= losses.keys()
    sum(losses.values()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_evaluation_is_that_of_the_student():
    torch.manual_seed(0)
    model = build_single_scale_smca().eval()
    plain = model(batch())
    share_knowledge(model.transformer.encoder)
    state = model.state_dict()
    other = build_single_scale_smca().eval()
    other.load_state_dict({key: v for key, v in state.items() if ".teacher." not in key})
    for first, second in zip(model(batch()), other(batch()), strict=True):
        assert torch.equal(first["instances"].scores, second["instances"].scores)
    assert len(plain) == 2


# --- errors -------------------------------------------------------------------------------------


def test_contradictions_are_refused_in_one_line(build):
    model = build()
    memory = model.encode(model.extract(model.preprocess(batch())))
    queries = model.queries(memory)
    without = {**vars(memory), "image_sizes": None}
    with pytest.raises(ValueError, match=r"memory\.image_sizes is None"):
        model.decode(type(memory)(**without), queries)
    fewer = {**vars(memory), "spatial_shapes": (*memory.spatial_shapes, (1, 1))}
    with pytest.raises(ValueError, match=r"the memory has \d levels, .* has strides"):
        model.decode(type(memory)(**fewer), queries)
    with pytest.raises(ValueError, match="num_layers is 0"):
        build(SETTINGS | {"num_decoder_layers": 0})
