"""Convolutions that do their frozen norm's work."""

import copy

import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from detectron2.modeling.backbone import BasicStem, ResNet
from detectron2.modeling.backbone.resnet import BottleneckBlock
from hypothesis import given, settings
from hypothesis import strategies as st

from detectors.backbone import FoldedConv2d, fold_frozen_norms, laid_out
from ops import pixel_convolution


def resnet(norm, **stages):
    """A ResNet of one bottleneck stage in float64 whose norms do something."""
    torch.manual_seed(0)
    stem = BasicStem(3, 8, norm)
    blocks = ResNet.make_stage(
        BottleneckBlock, 2, in_channels=8, out_channels=16, norm=norm, **stages
    )
    model = ResNet(stem, [blocks], out_features=["res2"]).double().eval()
    for module in model.modules():
        if isinstance(module, FrozenBatchNorm2d | torch.nn.BatchNorm2d):
            for buffer in (module.weight, module.bias, module.running_mean, module.running_var):
                buffer.data = 0.5 + torch.rand_like(buffer)
    return model


STAGE = {"bottleneck_channels": 8, "stride_per_block": [2, 1], "num_groups": 2, "dilation": 2}


def run(model, images):
    """Features, and the gradients of the images and weights."""
    images = images.clone().requires_grad_()
    features = model(images)["res2"]
    weights = [p for p in model.parameters() if p.requires_grad]
    return [features, *torch.autograd.grad(features.pow(2).sum(), [images, *weights])]


def test_results_and_gradients_stay():
    plain = resnet("FrozenBN", **STAGE)
    folded = fold_frozen_norms(copy.deepcopy(plain))
    assert sum(type(module) is FoldedConv2d for module in folded.modules()) == 8
    images = torch.randn(2, 3, 40, 56, dtype=torch.float64)
    expected = run(plain, images)
    for layout in (images, laid_out(images)):
        for found, value in zip(run(folded, layout), expected, strict=True):
            torch.testing.assert_close(found, value, rtol=1e-10, atol=1e-12)


def test_windows_of_3x3_pixels_are_the_operators():
    norm = FrozenBatchNorm2d(64)
    for buffer in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        buffer.uniform_(0.1, 3)
    images = laid_out(torch.randn(2, 64, 24, 24))
    shapes = (
        ({"padding": 1}, "convolution_3x3"),
        ({"padding": 1, "stride": 2}, "_StridedConvolution"),
        ({"padding": 1, "stride": 3}, "ConvolutionBackward0"),
        ({"padding": 2, "dilation": 2}, "ConvolutionBackward0"),
    )
    for shape, name in shapes:
        layer = Conv2d(64, 64, 3, bias=False, norm=norm, **shape)
        expected = layer(images)
        output = fold_frozen_norms(layer)(images)
        assert name in output.grad_fn.name()
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)


def test_weights_have_their_names_and_keep_training():
    plain = resnet("FrozenBN", **STAGE)
    folded = fold_frozen_norms(copy.deepcopy(plain))
    assert list(folded.state_dict()) == list(plain.state_dict())
    images = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    before = folded(images)["res2"]
    state = {key: value + 0.1 for key, value in plain.state_dict().items()}
    for model in (plain, folded):
        model.load_state_dict(state)
    torch.testing.assert_close(folded(images)["res2"], plain(images)["res2"])
    assert not torch.allclose(folded(images)["res2"], before)


def test_other_norms_stay_as_they_are():
    model = fold_frozen_norms(resnet("BN", **STAGE))
    assert not any(isinstance(module, FoldedConv2d) for module in model.modules())
    # an activation behind the norm would be lost, and a bias would need to be scaled
    norm = FrozenBatchNorm2d(4)
    activated = Conv2d(4, 4, 1, bias=False, norm=norm, activation=torch.relu)
    biased = Conv2d(4, 4, 1, norm=norm)
    for layer in (activated, biased):
        assert type(fold_frozen_norms(layer)) is Conv2d


def test_windows_of_one_pixel_are_the_operator(monkeypatch):
    monkeypatch.setattr(pixel_convolution, "weight_gradient_is_product", lambda: True)
    images = laid_out(torch.randn(1, 256, 64, 64))
    for stride, name in ((1, "_ConvolutionBackward"), (2, "ConvolutionBackward0")):
        layer = Conv2d(256, 256, 1, bias=False, norm=FrozenBatchNorm2d(256), stride=stride)
        expected = layer(images)
        output = fold_frozen_norms(layer)(images)
        assert output.grad_fn.name() == name
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)


@settings(max_examples=20, deadline=None)
@given(
    channels=st.sampled_from([2, 4, 6]),
    kernel=st.sampled_from([1, 3, 5]),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 2),
    size=st.tuples(st.integers(9, 14), st.integers(9, 14)),
    seed=st.integers(0, 99),
)
def test_any_convolution(channels, kernel, stride, dilation, size, seed):
    torch.manual_seed(seed)
    norm = FrozenBatchNorm2d(channels)
    for buffer in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        buffer.uniform_(0.1, 3)
    shape = {"stride": stride, "dilation": dilation, "padding": kernel // 2, "groups": 2}
    layer = Conv2d(4, channels, kernel, bias=False, norm=norm, **shape).double()
    images = torch.randn(2, 4, *size, dtype=torch.float64)
    expected = layer(images)
    torch.testing.assert_close(fold_frozen_norms(layer)(images), expected)
