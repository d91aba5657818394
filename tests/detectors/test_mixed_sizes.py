"""Images of different sizes in one batch, through real backbones and norms."""

from pathlib import Path

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.structures import ImageList
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = {
    path.stem.removesuffix("_quickstart"): path
    for project in ("baselines", "smca")
    for path in sorted((ROOT / "projects" / project / "configs").glob("*_quickstart.py"))
}
sides = st.integers(64, 130)


@pytest.fixture(scope="module")
def detectors():
    """Detectors in evaluation whose norms and heads are not as they were initialised."""
    built = {}

    def build(name):
        if name not in built:
            torch.manual_seed(0)
            model = instantiate(LazyConfig.load(str(CONFIGS[name])).model).to("cpu")
            for module in model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm | nn.GroupNorm):
                    nn.init.uniform_(module.weight, 0.5, 1.5)
                    nn.init.normal_(module.bias, std=0.5)
            for parameter in model.class_embed.parameters():
                nn.init.normal_(parameter, std=0.2)
            built[name] = model.eval()
        return built[name]

    return build


def raw(model, images):
    with torch.no_grad():
        memory = model.encode(model.extract(model.preprocess(images)))
        return model.predict(model.decode(memory, model.queries(memory)))


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=4, deadline=None, derandomize=True)
@given(sizes=st.lists(st.tuples(sides, sides), min_size=2, max_size=3))
def test_each_image_has_the_result_that_it_has_alone(detectors, name, sizes):
    model = detectors(name)
    generator = torch.Generator().manual_seed(0)
    images = [
        {"image": torch.rand(3, height, width, generator=generator) * 255}
        for height, width in sizes
    ]
    together = raw(model, images)
    for row, image in enumerate(images):
        alone = raw(model, [image])
        torch.testing.assert_close(
            together.logits[:, row], alone.logits[:, 0], rtol=1e-4, atol=1e-4
        )
        torch.testing.assert_close(together.boxes[:, row], alone.boxes[:, 0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("divisor", [0, 32])
@pytest.mark.parametrize(
    "sizes", [[(64, 96)], [(64, 96)] * 2, [(60, 96)] * 2, [(64, 96), (96, 32)]]
)
def test_images_are_stacked_as_detectron2_does(detectors, monkeypatch, divisor, sizes):
    model = detectors("conditional_detr")
    monkeypatch.setattr(model, "size_divisibility", divisor)
    images = [torch.rand(height, width, 3).permute(2, 0, 1) for height, width in sizes]
    found = model.preprocess([{"image": image} for image in images])
    normal = [(image - model.pixel_mean) / model.pixel_std for image in images]
    expected = ImageList.from_tensors(normal, divisor)
    assert torch.equal(found.tensor, expected.tensor)
    assert found.tensor.is_contiguous()
    assert found.image_sizes == expected.image_sizes == sizes
