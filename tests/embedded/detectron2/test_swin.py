import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from detectron2.config import LazyConfig, instantiate
from detectron2.modeling import SwinTransformer
from full_size import without_storage
from omegaconf import OmegaConf
from recorded_cases import RecordedCases, close, embedded_only
from torch import nn

CONFIG = "projects/baselines/configs/models/swin_backbones.py"
SMALL = {"embed_dim": 8, "depths": (2, 2), "num_heads": (1, 2), "window_size": 4}


@pytest.fixture(scope="module")
def cases(reference_dir):
    return RecordedCases(reference_dir / "detrex", "backbones")


@pytest.fixture(scope="module")
def configs():
    return LazyConfig.load(str(Path(__file__).resolve().parents[3] / CONFIG))


def small_swin(**kwargs):
    """A model with weights large enough that every part shows in the output."""
    kwargs = {**SMALL, "drop_path_rate": 0.0, "out_indices": (0, 1), **kwargs}
    model = SwinTransformer(**kwargs)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(0.4 * noise + (weight.mean() == 1))
    return model


def images(batch=2, height=37, width=50):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


# --- the same network without windows: every token against all others, most of them masked -------


def dense_swin(state, x, window=4, heads=(1, 2), qk_scale=None):
    height, width = x.shape[2:]
    x = F.pad(x, (0, -width % 4, 0, -height % 4))
    weight = state["patch_embed.proj.weight"].flatten(1)
    x = F.unfold(x, 4, stride=4).transpose(1, 2) @ weight.T + state["patch_embed.proj.bias"]
    height, width = -(-height // 4), -(-width // 4)
    if "patch_embed.norm.weight" in state:
        x = dense_norm(state, "patch_embed.norm", x)
    if "absolute_pos_embed" in state:
        position = F.interpolate(state["absolute_pos_embed"], (height, width), mode="bicubic")
        x = x + position.flatten(2).transpose(1, 2)
    x = x.unflatten(1, (height, width))
    outputs = {}
    for i, num_heads in enumerate(heads):
        for j, shift in enumerate([0, window // 2]):
            name = f"layers.{i}.blocks.{j}"
            y = dense_norm(state, f"{name}.norm1", x)
            x = x + dense_attention(state, f"{name}.attn", y, window, shift, num_heads, qk_scale)
            y = dense_linear(state, f"{name}.mlp.fc1", dense_norm(state, f"{name}.norm2", x))
            x = x + dense_linear(state, f"{name}.mlp.fc2", F.gelu(y))
        outputs[f"p{i}"] = dense_norm(state, f"norm{i}", x).permute(0, 3, 1, 2)
        if i + 1 < len(heads):
            name = f"layers.{i}.downsample"
            x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
            # unshuffling gives (C, row, column); the layer wants (column, row, C)
            y = F.pixel_unshuffle(x.permute(0, 3, 1, 2), 2).unflatten(1, (-1, 2, 2))
            y = y.permute(0, 4, 5, 3, 2, 1).flatten(3)
            x = dense_linear(state, f"{name}.reduction", dense_norm(state, f"{name}.norm", y))
    return outputs


def dense_norm(state, name, x):
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    return x * state[f"{name}.weight"] + state[f"{name}.bias"]


def dense_linear(state, name, x):
    return x @ state[f"{name}.weight"].T + state.get(f"{name}.bias", 0)


def dense_attention(state, name, x, window, shift, heads, qk_scale):
    height, width = x.shape[1:3]
    x = F.pad(x, (0, 0, 0, -width % window, 0, -height % window))
    size = torch.tensor(x.shape[1:3])
    place = torch.cartesian_prod(*map(torch.arange, x.shape[1:3]))  # (tokens, 2)
    moved = (place - shift) % size
    room = torch.cat([moved // window, place < shift], 1)
    together = (room[:, None] == room).all(-1)
    offset = (moved[:, None] - moved + window - 1).clamp(0, 2 * window - 2)
    table = state[f"{name}.relative_position_bias_table"]
    bias = table[offset[..., 0] * (2 * window - 1) + offset[..., 1]].permute(2, 0, 1)

    qkv = dense_linear(state, f"{name}.qkv", x.flatten(1, 2)).unflatten(2, (3, heads, -1))
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    logits = q @ k.transpose(2, 3) * (qk_scale or q.shape[-1] ** -0.5) + bias
    out = logits.masked_fill(~together, -torch.inf).softmax(-1) @ v
    out = dense_linear(state, f"{name}.proj", out.transpose(1, 2).flatten(2))
    return out.unflatten(1, size.tolist())[:, :height, :width]


@pytest.mark.parametrize(
    ("kwargs", "dense", "size"),
    [
        ({}, {}, (37, 50)),
        ({"window_size": 3}, {"window": 3}, (48, 24)),
        ({"window_size": 7, "qk_scale": 0.7}, {"window": 7, "qk_scale": 0.7}, (61, 9)),
        ({"ape": True, "pretrain_img_size": (24, 40)}, {}, (29, 64)),
        ({"patch_norm": False, "qkv_bias": False, "mlp_ratio": 1.5}, {}, (32, 40)),
        ({"window_size": 1}, {"window": 1}, (17, 18)),
        ({}, {}, (1, 3)),
    ],
)
def test_windows_compute_what_dense_attention_does(kwargs, dense, size):
    """Outputs and all gradients, of every option and of sizes that need padding."""
    model = small_swin(**kwargs).double()
    x = images(2, *size).double().requires_grad_()
    expected = dense_swin(dict(model.named_parameters()), x, **dense)
    inputs = [x, *model.parameters()]
    expected_grads = torch.autograd.grad(loss(expected), inputs, allow_unused=True)

    outputs = model(x)
    grads = torch.autograd.grad(loss(outputs), inputs, allow_unused=True)
    assert list(outputs) == list(expected)
    for name, feature in outputs.items():
        close(feature, expected[name], atol=1e-8, rtol=1e-8)
        assert feature.is_contiguous()
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        close(grad, expected_grad, atol=1e-7, rtol=1e-7)


def loss(outputs):
    """A scalar whose gradient is not constant along channels, which norms would cancel."""
    return sum((torch.sin(i + f) * f).sum() for i, f in enumerate(outputs.values()))


# --- recorded facts ------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["swin_default_ape_off", "swin_last_only_pretrain_like"])
def test_outputs_are_the_recorded_ones(cases, case):
    facts = cases.facts[case]
    model = SwinTransformer(**facts["constructor"]).eval()
    assert list(model.state_dict()) == facts["state_dict_keys"]
    missing, unexpected = model.load_state_dict(cases.arrays(case, "param"), strict=False)
    assert (missing, unexpected) == (facts["buffers_and_int_keys"], [])

    outputs = model(cases.arrays(case, "in")["x"])
    expected = cases.arrays(case, "out")
    assert list(outputs) == list(expected)
    for name, feature in outputs.items():
        close(feature, expected[name], atol=1e-4)
    shapes = {name: dataclasses.asdict(shape) for name, shape in model.output_shape().items()}
    recorded = facts["output_shape"]
    assert {n: {k: s[k] for k in recorded[n]} for n, s in shapes.items()} == recorded


def test_swin_tiny_has_the_published_keys_and_settings(reference_dir, configs):
    folder, name = reference_dir / "detrex", "dab_detr_swin_t_in1k_50ep"
    keys = json.loads((folder / "checkpoint_keys" / f"{name}.json").read_text())
    recorded = {
        key.removeprefix("backbone."): entry
        for key, entry in keys["keys"].items()
        if key.startswith("backbone.")
    }
    with without_storage():
        model = instantiate(configs.swin_tiny)
    kinds = {name: "p" if p.requires_grad else "f" for name, p in model.named_parameters()}
    actual = {k: [kinds.get(k, "b"), list(v.shape)] for k, v in model.state_dict().items()}
    assert actual == recorded

    settings = json.loads((folder / "training_settings.json").read_text())
    expected = settings["configs"][name]["backbone"]
    found = OmegaConf.to_container(configs.swin_tiny)
    del found["_target_"]
    assert found == {key: value for key, value in expected.items() if key != "_target_"}
    defined_in = f"{SwinTransformer.__module__}.{SwinTransformer.__name__}"
    assert defined_in == expected["_target_"]


@pytest.mark.parametrize(
    ("name", "channels", "published"),
    [
        ("swin_tiny", 768, 28_288_354),
        ("swin_small", 768, 49_606_258),
        ("swin_base", 1024, 87_768_224),
    ],
)
def test_sizes_are_the_published_ones(configs, name, channels, published):
    """Parameters of the ImageNet classifiers, whose head is not part of the backbone."""
    with without_storage():
        model = instantiate(configs[name])
        features = model(torch.zeros(1, 3, 70, 100))
    head = 1000 * (channels + 1)
    assert sum(p.numel() for p in model.parameters()) == published - head
    assert {k: tuple(v.shape) for k, v in features.items()} == {"p3": (1, channels, 3, 4)}


def test_initialisation():
    kwargs = {"depths": (1, 1), "num_heads": (3, 6), "out_indices": (0, 1)}
    for name, weight in SwinTransformer(**kwargs, ape=True).named_parameters():
        if name.startswith("patch_embed.proj"):
            continue
        if name.endswith("bias") or "norm" in name:
            value = 1.0 if name.endswith("weight") else 0.0
            assert (weight == value).all(), name
        else:
            assert weight.std().item() == pytest.approx(0.02, rel=0.15), name
            assert abs(weight.mean().item()) < 5 * 0.02 / weight.numel() ** 0.5, name


# --- behaviour -----------------------------------------------------------------------------------


def test_missing_rows_and_columns_count_as_zeros():
    model, x = small_swin(), images(1, 37, 50)
    outputs, padded = model(x), model(F.pad(x, (0, 2, 0, 3)))
    for name in outputs:
        close(outputs[name], padded[name])


def test_images_of_a_batch_do_not_see_each_other():
    model, x = small_swin(), images(3)
    together = model(x)
    for i in range(3):
        for name, feature in model(x[i : i + 1]).items():
            close(together[name][i : i + 1], feature)
    x.requires_grad_()
    model(x)["p1"][1].sum().backward()
    assert x.grad[1].any()
    assert not x.grad[[0, 2]].any()


def test_stochastic_depth_drops_whole_branches_and_more_of_them_with_depth():
    torch.manual_seed(0)
    batch, rate = 3000, 0.6
    model = small_swin(drop_path_rate=rate)
    seen = [[] for _ in range(4)]
    blocks = [block for stage in model.layers for block in stage.blocks]
    for block, calls in zip(blocks, seen, strict=True):
        block.drop_path.register_forward_hook(
            lambda _, args, out, calls=calls: calls.append((args[0].flatten(1), out.flatten(1)))
        )
    with torch.no_grad():
        model.train()(images(1, 4, 8).expand(batch, -1, -1, -1))
    for i, calls in enumerate(seen):
        expected = rate * i / 3
        dropped = [(out == 0).all(1) for _, out in calls]
        for (branch, out), gone in zip(calls, dropped, strict=True):
            close(out[~gone], branch[~gone] / (1 - expected))
            sigma = (expected * (1 - expected) / batch) ** 0.5
            assert abs(gone.float().mean().item() - expected) <= 5 * sigma
        attention, mlp = dropped  # each is drawn on its own
        both = (attention & mlp).float().mean().item()
        assert both == pytest.approx(expected**2, abs=0.04)


@pytest.mark.parametrize(
    "kwargs", [{"drop_path_rate": 0.5}, {"drop_rate": 0.5}, {"attn_drop_rate": 0.5}]
)
def test_randomness_is_for_training(kwargs):
    torch.manual_seed(0)
    model, plain, x = small_swin(**kwargs), small_swin(), images()
    expected = plain(x)["p1"]
    close(model.eval()(x)["p1"], expected)
    first, second = (model.train()(x)["p1"] for _ in range(2))
    assert (first - second).abs().max() > 0.1


def test_dropout_follows_positions_projections_and_both_layers_of_perceptrons():
    model, shapes = small_swin(drop_rate=0.5, depths=(1, 1)), []
    for module in model.modules():
        if isinstance(module, nn.Dropout) and module.p == 0.5:
            module.register_forward_hook(lambda _, args, out: shapes.append(out.shape[-1]))
    model(images())
    assert shapes == [8, 8, 32, 8, 16, 64, 16]


@pytest.mark.parametrize(
    ("frozen_stages", "prefixes"),
    [
        (-1, ()),
        (0, ("patch_embed.",)),
        (1, ("patch_embed.", "absolute_pos_embed")),
        (2, ("patch_embed.", "absolute_pos_embed", "layers.0.")),
        (3, ("patch_embed.", "absolute_pos_embed", "layers.0.", "layers.1.")),
    ],
)
def test_frozen_stages_get_no_gradients(frozen_stages, prefixes):
    model = small_swin(ape=True, frozen_stages=frozen_stages)
    in_eval_mode = {name for name, module in model.named_children() if not module.training}
    names = [("patch_embed", 0), ("pos_drop", 2)]
    assert in_eval_mode == {name for name, start in names if frozen_stages >= start}
    stages_in_eval_mode = [not stage.training for stage in model.layers]
    assert stages_in_eval_mode == [frozen_stages >= 2, frozen_stages >= 3]
    loss(model(images())).backward()
    for name, weight in model.named_parameters():
        frozen = name.startswith(prefixes) if prefixes else False
        assert weight.requires_grad != frozen, name
        assert (weight.grad is None) == frozen, name


def test_checkpointing_saves_memory_and_changes_nothing():
    x, results = images(), []
    for use_checkpoint in (False, True):
        model = small_swin(drop_path_rate=0.5, use_checkpoint=use_checkpoint)
        torch.manual_seed(0)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, kept=kept: (kept.append(t.numel()), t)[1], lambda t: t
        ):
            total = loss(model(x))
        total.backward()
        results.append((sum(kept), total, [p.grad for p in model.parameters()]))
    (plain, total, grads), (checkpointed, same_total, same_grads) = results
    assert checkpointed < plain / 2
    close(same_total, total)
    for grad, same in zip(grads, same_grads, strict=True):
        close(same, grad)


def test_lower_precision():
    model, x = small_swin(), images()
    expected = model(x)["p1"]
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x)["p1"]
    assert (output - expected).abs().mean() < 0.05 * expected.abs().mean()


@embedded_only  # the real one mixes it with float32
def test_weights_of_lower_precision():
    features = small_swin().bfloat16()(images().bfloat16())
    assert features["p1"].dtype == torch.bfloat16


def test_another_normalisation_and_patch_size():
    model = small_swin(norm_layer=nn.RMSNorm, patch_size=(2, 2), out_indices=[1])
    assert isinstance(model.norm1, nn.RMSNorm)
    assert isinstance(model.layers[0].blocks[1].norm2, nn.RMSNorm)
    assert {k: tuple(v.shape) for k, v in model(images(1, 9, 16)).items()} == {"p1": (1, 16, 3, 4)}


@embedded_only
def test_strides_follow_the_patch_size():
    model = SwinTransformer(**SMALL, patch_size=2, out_indices=(1, 0))
    strides = {name: shape.stride for name, shape in model.output_shape().items()}
    assert strides == {"p1": 4, "p0": 2}
    assert model.size_divisibility == 0


@embedded_only
@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_heads": (1,)}, "found 1 num_heads, expected 2"),
        ({"out_indices": (2,)}, r"found out_indices \(2,\), expected some of 0..1"),
        ({"num_heads": (3, 2)}, "8 channels in 3 heads"),
    ],
)
def test_wrong_arguments_are_refused(kwargs, message):
    with pytest.raises(AssertionError, match=message):
        small_swin(**kwargs)


@embedded_only
def test_a_single_image_needs_a_batch_axis():
    with pytest.raises(AssertionError, match=r"shape \(3, 8, 8\), expected 4 axes"):
        small_swin()(torch.zeros(3, 8, 8))
