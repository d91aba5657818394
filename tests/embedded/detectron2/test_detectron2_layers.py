import pytest
import torch
from detectron2.layers import CNNBlockBase, Conv2d, FrozenBatchNorm2d, ShapeSpec, cat, get_norm
from recorded_cases import RecordedCases, close, embedded_only
from torch import nn


@pytest.fixture(scope="module")
def cases(reference_dir):
    return RecordedCases(reference_dir / "detrex", "backbones")


def trained_batch_norm(channels=3):
    norm = nn.BatchNorm2d(channels, eps=1e-3)
    nn.init.uniform_(norm.weight)
    nn.init.uniform_(norm.bias)
    norm(torch.randn(8, channels, 4, 4) * 3 + 1)
    return norm.eval()


def test_frozen_batch_norm_matches_the_recorded_outputs(cases):
    norm = FrozenBatchNorm2d(5)
    assert list(norm.state_dict()) == cases.facts["frozen_bn"]["state_dict_keys"]
    for key, values in cases.facts["frozen_bn"]["fresh_state"].items():
        assert norm.state_dict()[key][:2].tolist() == values
    norm.load_state_dict(cases.arrays("frozen_bn", "param"))
    x = cases.arrays("frozen_bn", "in")["x"]
    expected = cases.arrays("frozen_bn", "out")
    close(norm(x), expected["out"], atol=1e-6)
    close(norm(x.requires_grad_()), expected["out_with_grad_input"], atol=1e-6)


def test_fresh_frozen_batch_norm_is_the_identity():
    x = torch.randn(2, 4, 3, 3)
    close(FrozenBatchNorm2d(4)(x), x, atol=1e-6)


@pytest.mark.parametrize("needs_gradient", [False, True])
def test_frozen_batch_norm_keeps_bfloat16(needs_gradient):
    x = torch.randn(2, 3, 5, 5)
    norm = FrozenBatchNorm2d.convert_frozen_batchnorm(trained_batch_norm())
    half = norm(x.bfloat16().requires_grad_(needs_gradient))
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), norm(x), atol=0.05, rtol=0.02)


def test_freezing_keeps_the_function_of_batch_norm_and_thawing_brings_it_back():
    norm = trained_batch_norm()
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Sequential(norm))
    x = torch.randn(2, 3, 5, 5)
    expected = model(x)

    frozen = FrozenBatchNorm2d.convert_frozen_batchnorm(model)
    assert frozen is model
    assert [type(m).__name__ for m in (model[0], model[1][0])] == ["Conv2d", "FrozenBatchNorm2d"]
    assert len(list(model.parameters())) == 2
    close(model(x), expected)
    model[1][0].train()
    close(model(x), expected)

    thawed = FrozenBatchNorm2d.convert_frozenbatchnorm2d_to_batchnorm2d(model)
    assert isinstance(thawed[1][0], nn.BatchNorm2d)
    close(thawed.eval()(x), expected)
    assert {k: v.shape for k, v in thawed[1][0].state_dict().items()} == {
        k: v.shape for k, v in norm.state_dict().items()
    }


def test_conversion_of_a_norm_without_affine_parameters():
    norm = nn.BatchNorm2d(3, affine=False)
    norm(torch.randn(4, 3, 2, 2) * 2)
    x = torch.randn(2, 3, 2, 2)
    close(FrozenBatchNorm2d.convert_frozen_batchnorm(norm)(x), norm.eval()(x))


def test_state_dicts_without_version_may_lack_statistics():
    norm = FrozenBatchNorm2d(3)
    nn.init.constant_(norm.running_mean, 7)
    norm.load_state_dict({"weight": torch.full((3,), 2.0), "bias": torch.zeros(3)})
    assert norm.running_mean.tolist() == [0, 0, 0]
    assert norm.running_var.tolist() == [1, 1, 1]

    versioned = norm.state_dict()
    del versioned["running_var"]
    with pytest.raises(RuntimeError, match="running_var"):
        norm.load_state_dict(versioned)


@embedded_only
def test_a_batch_norm_checkpoint_loads_into_a_frozen_one_and_back():
    norm = trained_batch_norm()
    frozen = FrozenBatchNorm2d(3, eps=norm.eps)
    frozen.load_state_dict(norm.state_dict())  # num_batches_tracked is dropped
    converted = FrozenBatchNorm2d.convert_frozen_batchnorm(norm)
    converted.load_state_dict(frozen.state_dict())  # and need not be there
    x = torch.randn(2, 3, 4, 4)
    close(frozen(x), converted(x))


def test_get_norm_builds_the_recorded_types(cases):
    recorded = cases.facts["get_norm"]["results"]
    assert get_norm(None, 32) is recorded["None"]
    assert get_norm("", 32) is recorded["''"]
    for name in ("BN", "SyncBN", "FrozenBN", "GN"):
        assert type(get_norm(name, 32)).__name__ == recorded[f"'{name}'"]["type"]
    assert get_norm(lambda channels: nn.GroupNorm(2, channels), 6).num_channels == 6
    with pytest.raises(KeyError):
        get_norm("unknown", 32)


def test_conv2d_matches_the_recorded_outputs(cases):
    def build():
        return Conv2d(
            3,
            4,
            kernel_size=3,
            stride=2,
            padding=1,
            bias=False,
            norm=FrozenBatchNorm2d(4),
            activation=nn.functional.relu,
        )

    conv = build()
    assert list(conv.state_dict()) == cases.facts["conv2d"]["state_dict_keys"]
    conv.load_state_dict(cases.arrays("conv2d", "param"))
    x = cases.arrays("conv2d", "in")["x"]
    expected = cases.arrays("conv2d", "out")
    close(conv(x), expected["out"])
    assert list(conv(x[:0]).shape) == expected["empty_batch_shape"].tolist()


def test_cat_and_shape_spec(cases):
    assert list(vars(ShapeSpec())) == cases.facts["misc"]["facts"]["ShapeSpec_fields"]
    assert ShapeSpec(8, stride=4) == ShapeSpec(channels=8, stride=4)
    x = torch.ones(2, 3)
    assert cat([x]) is x
    assert cat([x, x], dim=1).shape == (2, 6)


def test_freezing_a_block():
    block = CNNBlockBase(3, 4, 2)
    block.conv = Conv2d(3, 4, 1, norm=nn.BatchNorm2d(4))
    assert block.freeze() is block
    assert not any(p.requires_grad for p in block.parameters())
    assert isinstance(block.conv.norm, FrozenBatchNorm2d)
    assert (block.in_channels, block.out_channels, block.stride) == (3, 4, 2)
