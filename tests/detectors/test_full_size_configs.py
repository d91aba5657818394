"""Every full-size config trains."""

from pathlib import Path

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from full_size import batch, calm
from tiny_detectors import ROOT

CONFIGS = sorted(
    path
    for project in ("baselines", "ks_detr", "smca")
    for path in ROOT.glob(f"projects/{project}/configs/*.py")
    if "quickstart" not in path.stem
)


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_two_iterations_and_an_evaluation(path: Path) -> None:
    torch.manual_seed(0)
    config = LazyConfig.load(str(path))
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
    assert len(CONFIGS) > 60
