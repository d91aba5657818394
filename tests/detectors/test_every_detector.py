"""What every detector does alike: in low precision, compiled and in several processes."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from every_detector import BOXES, BUILDERS, SINGLE_SCALE, batch, build

each_detector = pytest.mark.parametrize("name", BUILDERS)
with_and_without_boxes = pytest.mark.parametrize("boxes", [BOXES, ()], ids=["boxes", "no_boxes"])


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@each_detector
@with_and_without_boxes
def test_every_parameter_has_a_gradient(name, boxes) -> None:
    model = build(name)
    sum(model(batch(boxes)).values()).backward()
    found = gradients(model)
    assert [key for key, grad in found.items() if grad is None] == []
    assert all(grad.isfinite().all() for grad in found.values())


LOSS_SCALE = 2.0**8
"""Of float16, whose small gradients would be zero."""


def step_of(model, inputs, dtype=None):
    """Losses and the gradient of everything in one vector."""
    torch.manual_seed(1)  # noise of denoising queries
    model.zero_grad()
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        losses = model(inputs)
    (sum(losses.values()) * LOSS_SCALE).backward()
    grads = [grad.flatten() for grad in gradients(model).values()]
    return losses, torch.cat(grads) / LOSS_SCALE


@each_detector
@with_and_without_boxes
@pytest.mark.parametrize(
    ("dtype", "tolerance", "grad_tolerance"),
    [(torch.bfloat16, 0.15, 0.35), (torch.float16, 0.03, 0.06)],
    ids=["bfloat16", "float16"],
)
def test_low_precision(name, boxes, dtype, tolerance, grad_tolerance) -> None:
    model = build(name)
    if name in SINGLE_SCALE:
        tolerance = min(tolerance, 0.1)
    exact, exact_grad = step_of(model, batch(boxes))
    losses, grad = step_of(model, batch(boxes), dtype)
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    for key, loss in losses.items():
        assert loss.item() == pytest.approx(exact[key].item(), rel=tolerance, abs=1e-3), key
    assert (grad - exact_grad).norm() < grad_tolerance * exact_grad.norm()


def check_compiles_in_one_graph(name, checkpoint_layers=False):
    torch.compiler.reset()  # else it counts the other detectors as variants of one
    model = build(name)
    model.transformer.decoder.checkpoint_layers = checkpoint_layers
    features = model.extract(model.preprocess(batch()))
    queries = model.queries(model.encode(features), model.prepare_targets(batch()))

    def run(features, queries):
        return model.predict(model.decode(model.encode(features), queries))

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)(features, queries)
    plain = run(features, queries)
    torch.testing.assert_close(compiled.boxes, plain.boxes)
    torch.testing.assert_close(compiled.logits, plain.logits)


@each_detector
def test_encode_and_decode_compile_in_one_graph(name) -> None:
    check_compiles_in_one_graph(name)


@pytest.mark.parametrize("name", ["conditional", "adamixer"])
def test_layers_that_are_computed_again_compile_too(name) -> None:
    check_compiles_in_one_graph(name, checkpoint_layers=True)


SIZE = (64, 96)


def without_noise(name):
    """A detector whose denoising queries, if it has any, are the targets themselves."""
    model = build(name)
    if hasattr(model, "denoising_generator"):
        noise = model.denoising_generator
        noise.label_noise_prob = noise.box_noise_scale = 0.0
    return model


def work(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for name in BUILDERS:
        model = torch.nn.parallel.DistributedDataParallel(without_noise(name))
        for _ in range(2):  # a parameter without gradient would be missed in the second one
            model.zero_grad()
            losses = model([batch(sizes=(SIZE, SIZE))[rank]])
            sum(losses.values()).backward()
        torch.save((losses, gradients(model.module)), f"{folder}/{name}_{rank}.pth")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results_of_two(tmp_path_factory):
    """Losses and gradients of two processes by name; the second one's image has no box."""
    folder = tmp_path_factory.mktemp("two")
    mp.spawn(work, args=(str(folder),), nprocs=2)
    return lambda name: [torch.load(folder / f"{name}_{rank}.pth") for rank in range(2)]


@each_detector
def test_two_processes_learn_the_same(results_of_two, name) -> None:
    (_, first), (_, second) = results_of_two(name)
    for key, grad in first.items():
        assert grad.isfinite().all(), key
        assert torch.equal(grad, second[key]), key


# cross entropy is a mean over a process's own queries, as in detrex
@pytest.mark.parametrize("name", sorted(BUILDERS.keys() - {"detr_cross_entropy"}))
def test_two_processes_learn_what_one_does(results_of_two, name) -> None:
    model = without_noise(name)
    losses = model(batch(sizes=(SIZE, SIZE)))
    sum(losses.values()).backward()
    (first, grads), (second, _) = results_of_two(name)
    for key, loss in losses.items():
        mean = (first[key].item() + second[key].item()) / 2
        assert mean == pytest.approx(loss.item(), rel=1e-4, abs=1e-6), key
    for key, grad in gradients(model).items():
        assert (grads[key] - grad).norm() <= 1e-4 * grad.norm() + 1e-5, key
