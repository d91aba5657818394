"""From the releases of KS-DETR and SMCA to their configs and the plain ones, by the command."""

import json

import pytest
import torch
from conversion_cases import ROWS, batch, read_facts, recipe, tiny_config
from detectron2.config import LazyConfig, instantiate
from tiny_detectors import ROOT

from engine.config import load_config
from tools.convert_checkpoint import main

DENSE = ("ks_conditional_detr_r50_50ep", "conditional_detr_r50_50ep")
DEFORMABLE = ("ks_deformable_detr_r50_50ep", "deformable_detr_r50_50ep")
SMCA = "smca_single_scale_r50_50ep"
DIM = 256
ATTENTION = "transformer.encoder.layers.1.attentions.0."
MLP = "ksgt.smlp_module.token_split_conv.linear.0."


def folder_of(name):
    return {"ks": "ks_detr", "smca": "smca"}.get(name.partition("_")[0], "baselines")


def write_config(folder, name):
    """A complete config with two layers each."""
    config = LazyConfig.load(str(ROOT / f"projects/{folder_of(name)}/configs/{name}.py"))
    config.model = tiny_config(name, project=folder_of(name))
    path = str(folder / f"{name}.yaml")
    LazyConfig.save(config, path)
    return path


def command(folder, weights, config, *arguments):
    """Convert and return the exit code; the result is in result.pth."""
    torch.save({"model": weights, "iteration": 374999}, folder / "released.pth")
    files = [str(folder / name) for name in ("released.pth", "result.pth")]
    return main([*files, "--config-file", config, "--overwrite", *arguments])


def result(folder):
    return torch.load(folder / "result.pth", weights_only=True)["model"]


def plain_weights(name):
    """Of the plain detector, whose names the release has too; tied heads are equal."""
    model = instantiate(tiny_config(name))
    first, shapes, aliases = {}, {}, {}
    for key, value in model.state_dict(keep_vars=True).items():
        key_of_tensor = first.setdefault(id(value), key)
        if key_of_tensor == key:
            shapes[key] = list(value.shape)
        else:
            aliases[key] = key_of_tensor
    return recipe(shapes, aliases)


def teacher_weights(names):
    """What a triple attention of the release adds: ours, by our names, and theirs."""
    linear = {"weight": [DIM, DIM], "bias": [DIM]}
    ours = {f"features.linear.{kind}": shape for kind, shape in linear.items()}
    theirs = {f"features.linear.{kind}": f"{MLP}{kind}" for kind in linear}
    if names is DENSE:
        ours |= {"in_proj_weight": [3 * DIM, DIM], "in_proj_bias": [3 * DIM]}
    else:
        rows = {"value_proj": DIM, "attention_weights": 8 * 4 * 4}  # heads, levels, points
        for module, count in rows.items():
            ours |= {f"{module}.weight": [count, DIM], f"{module}.bias": [count]}
            for kind in linear:
                theirs[f"{module}.{kind}"] = f"{ATTENTION}{module}_teacher.{kind}"
    ours = recipe({f"{ATTENTION}teacher.{key}": shape for key, shape in ours.items()})
    return ours, {new: ours[f"{ATTENTION}teacher.{old}"] for old, new in theirs.items()}


@pytest.fixture(params=[DENSE, DEFORMABLE], ids=["dense", "deformable"])
def ks(request):
    """Names of the configs, plain weights, teachers' weights, and the released file's."""
    names = request.param
    plain = plain_weights(names[1])
    ours, theirs = teacher_weights(names)
    released = plain | theirs
    if names is DENSE:  # the teacher's rows follow the student's
        for kind in ("weight", "bias"):
            parts = (f"{ATTENTION}attn.in_proj_{kind}", f"{ATTENTION}teacher.in_proj_{kind}")
            released[parts[0]] = torch.cat([plain[parts[0]], ours[parts[1]]])
    return names, plain, ours, released


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_a_ks_training_becomes_ours(ks, tmp_path, capsys) -> None:
    (name, _), plain, teachers, released = ks
    assert command(tmp_path, released, write_config(tmp_path, name)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(f"ks-detr (edocanonymous/KS-DETR), {len(released)} weights")
    assert len(lines) == 2
    assert_same(result(tmp_path), plain | teachers)


def test_a_ks_training_becomes_the_plain_detector(ks, tmp_path, capsys) -> None:
    (_, name), plain, teachers, released = ks
    config = write_config(tmp_path, name)
    assert command(tmp_path, released, config) == 0
    first, second, _ = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{len(teachers)} weights only training uses are left out: ")
    assert all(key in first for key in teachers)
    assert "ks-detr" in second
    assert_same(result(tmp_path), plain)
    model = instantiate(load_config(config).model)
    model.load_state_dict(result(tmp_path), strict=True)
    assert len(model.eval()(batch())) == 2


def test_plain_weights_are_none_of_a_ks_config(ks, tmp_path, capsys) -> None:
    (name, _), plain, teachers, _ = ks
    assert command(tmp_path, plain, write_config(tmp_path, name)) == 2
    error = capsys.readouterr().err
    assert f"error: {len(teachers)} of the model's weights are missing: {ATTENTION}t" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "result.pth").exists()


def test_keys_that_ks_detr_does_not_have_are_listed(ks, tmp_path, capsys) -> None:
    names, _, _, released = ks
    released["ksgt.other.weight"] = torch.zeros(1)
    for name in names:
        assert command(tmp_path, released, write_config(tmp_path, name)) == 2
        assert "1 converted weights are unknown to the model: ksgt.other" in capsys.readouterr().err


# --- SMCA ---------------------------------------------------------------------------------------


@pytest.fixture
def smca():
    """The release's weights: DETR's official ones, 92 logits, and what SMCA adds."""
    shapes = dict(read_facts("official")["detr"]["shapes"])
    prefix = "transformer.decoder.layers"
    for layer in range(2):
        shapes |= {f"{prefix}.{layer}.norm4.{kind}": [DIM] for kind in ("weight", "bias")}
        for module in ("point2", "point3"):  # two numbers for each of eight heads
            shapes[f"{prefix}.{layer}.{module}.weight"] = [16, DIM]
            shapes[f"{prefix}.{layer}.{module}.bias"] = [16]
    for index, rows in enumerate((DIM, DIM, 2)):
        shapes[f"{prefix}.0.point1.layers.{index}.weight"] = [rows, DIM]
        shapes[f"{prefix}.0.point1.layers.{index}.bias"] = [rows]
    return recipe(shapes)


def test_smca_becomes_ours(smca, tmp_path, capsys) -> None:
    config = write_config(tmp_path, SMCA)
    assert len(smca["class_embed.bias"]) == 92
    assert command(tmp_path, smca, config) == 0
    layout = f"smca (gaopengcuhk/SMCA-DETR, single scale), {len(smca)} weights"
    assert capsys.readouterr().out.splitlines()[0].endswith(layout)
    state = result(tmp_path)
    assert torch.equal(state["class_embed.bias"], smca["class_embed.bias"][ROWS])
    for theirs, ours in {
        "layers.1.point3.weight": "layers.1.modulation.scales.weight",
        "layers.0.point2.bias": "layers.0.modulation.offsets.bias",
        "layers.0.point1.layers.2.weight": "center_head.layers.2.weight",
    }.items():
        prefix = "transformer.decoder."
        assert torch.equal(state[prefix + ours], smca[prefix + theirs])
    model = instantiate(load_config(config).model)
    model.load_state_dict(state, strict=True)
    assert len(model.eval()(batch())) == 2


def test_keys_that_smca_does_not_have_are_listed(smca, tmp_path, capsys) -> None:
    smca |= {"level_embed": torch.zeros(4, DIM), "conv.weight": torch.zeros(1)}
    assert command(tmp_path, smca, write_config(tmp_path, SMCA)) == 2
    assert "2 keys are not understood as smca: level_embed, conv.w" in capsys.readouterr().err


def test_smca_is_no_detr(smca, tmp_path, capsys) -> None:
    assert command(tmp_path, smca, write_config(tmp_path, "detr_r50_300ep")) == 2
    assert "18 converted weights are unknown to the model" in capsys.readouterr().err
    assert command(tmp_path, smca, write_config(tmp_path, SMCA), "--from", "detr") == 2
    assert "are not understood as detr: transformer.decoder.lay" in capsys.readouterr().err


# --- as released ----------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [*DENSE, *DEFORMABLE])
def test_full_size(reference_dir, tmp_path, config: str) -> None:
    detector = "conditional" if config in DENSE else "deformable"
    path = reference_dir / f"ks_detr/checkpoint_keys/ks_{detector}_detr_r50_triple.json"
    record = json.loads(path.read_text())["state_dict"]
    weights = {key: torch.full((1,), 0.5).expand(shape) for key, (shape, _) in record.items()}
    file = str(ROOT / f"projects/{folder_of(config)}/configs/{config}.py")
    assert command(tmp_path, weights, file) == 0
    model = instantiate(LazyConfig.load(file).model)
    model.load_state_dict(result(tmp_path), strict=True)
    (tmp_path / "result.pth").unlink()
