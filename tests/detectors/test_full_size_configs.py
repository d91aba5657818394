"""Every full-size baseline config trains."""

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from tiny_detectors import ROOT, instances, pattern_image

CONFIGS = sorted(
    path.stem
    for path in ROOT.glob("projects/baselines/configs/*.py")
    if "quickstart" not in path.stem
)


def batch():
    """Two images of different sizes, one of them without objects."""
    boxes = [[20.0, 30.0, 120.0, 200.0], [5.0, 5.0, 6.0, 6.0], [90.0, 10.0, 250.0, 150.0]]
    sizes = [(224, 256), (192, 288)]
    items = [{"image": pattern_image(index, *size)} for index, size in enumerate(sizes)]
    items[0]["instances"] = instances(sizes[0], boxes, [0, 79, 17])
    items[1]["instances"] = instances(sizes[1], [], [])
    return items


@torch.no_grad()
def calm(backbone: torch.nn.Module) -> None:
    """Keep the maps of an untrained ResNet with frozen norms from growing with its depth."""
    for name, module in backbone.named_modules():
        if name.endswith(("conv3.norm", "bn3")):
            module.weight.fill_(0.2)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_two_iterations_and_an_evaluation(name: str) -> None:
    torch.manual_seed(0)
    config = LazyConfig.load(str(ROOT / f"projects/baselines/configs/{name}.py"))
    model = instantiate(config.model).train()
    calm(model.backbone)
    config.optimizer.params.model = model
    optimizer = instantiate(config.optimizer)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    totals = []
    for _ in range(2):
        total = sum(model(batch()).values())
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        totals.append(total.item())
    assert all(torch.isfinite(torch.tensor(totals)))
    trained = [parameter.requires_grad for parameter in model.parameters()]
    moved = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert all(moves <= trains for moves, trains in zip(moved, trained, strict=True))
    assert sum(moved) > 0.9 * sum(trained)
    with torch.no_grad():
        results = model.eval()(batch())
    assert all(result["instances"].scores.isfinite().all() for result in results)


def test_configs_are_found() -> None:
    assert len(CONFIGS) > 25
