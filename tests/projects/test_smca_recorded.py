"""SMCA against vectors of the released code, and of the paper's formulas where it has none."""

import pytest
import torch
from tiny_smca import (
    RecordedSMCA,
    build_multi_scale_smca,
    build_single_scale_smca,
    for_levels,
    our_name,
)

from detectors.structures import AttentionMaps

PRECISION = {torch.float64: 1e-10, torch.float32: 1e-5}
NAMES = [
    *(f"decoder/{variant}" for variant in ("independent", "single", "fixed")),
    *(
        f"decoder_multiscale/{variant}"
        for variant in (
            "independent",
            "independent_no_level_embed",
            "independent_factor1",
            "independent_no_selection",
            "single",
            "fixed",
            "encoder_5intra",
            "encoder_5multi",
        )
    ),
]


class Case:
    """One variant: the detector with the recorded weights, what it gives and what is recorded."""

    def __init__(self, record, variant, dtype):
        self.record, self.variant, self.dtype = record, variant, dtype
        options = record.facts.get("variants", {}).get(variant, {"scale_mode": variant})
        self.scales = options["scale_mode"]
        if "strides" in record.facts:
            model = build_multi_scale_smca(
                record.settings,
                options["encoder_order"],
                level_embeddings=options["level_embed"],
                strides=record.facts["strides"],
                level_factors=options["level_factors"],
                level_selection=options["scale_selection"],
                scales=self.scales,
            )
        else:
            model = build_single_scale_smca(record.settings, scales=self.scales)
        self.model = model
        record.load(model, self.name)
        model.to(dtype)
        self.gaussians = []
        for layer in model.transformer.decoder.layers:
            layer.modulation.register_forward_hook(lambda *call: self.gaussians.append(call[-1]))

    def name(self, key):
        """Our name of a recorded parameter, None if this variant has none."""
        name = our_name(key, self.scales)
        if "strides" in self.record.facts and name is not None:
            name = for_levels(name)
        return name if name in self.model.state_dict() else None

    def run(self, attention=None):
        """Feature maps, memory and the decoder's output."""
        features = self.record.features(self.dtype)
        memory = self.model.encode(features)
        return features, memory, self.model.decode(memory, self.model.queries(memory), attention)

    def recorded(self, key, kind="out"):
        """An array of this variant, None if there is none."""
        key = f"{kind}_{self.variant}/{key}"
        return self.record.tensor(key) if key in self.record.arrays.files else None

    def check(self, found, key, kind="out", precision=None):
        """Compare with a recorded array in units of its largest entry; True if there is one."""
        expected = self.recorded(key, kind)
        if expected is None:
            return False
        if precision is None:
            precision = PRECISION[self.dtype]
        if expected.dtype == torch.float32:
            precision = max(precision, 1e-6)
        torch.testing.assert_close(
            found.double(),
            expected.double(),
            rtol=0,
            atol=precision * expected.abs().max().item(),
            msg=lambda message: f"{key}: {message}",
        )
        return True


@pytest.fixture(scope="module", params=NAMES)
def source(request):
    name, _, variant = request.param.partition("/")
    return RecordedSMCA(request.getfixturevalue("reference_dir") / "smca", name), variant


@pytest.fixture(params=[torch.float64, torch.float32], ids=["float64", "float32"])
def case(request, source):
    return Case(*source, request.param)


def test_memory_states_and_predictions(case):
    _, memory, output = case.run()
    case.check(memory.tokens, "memory")
    assert case.check(output.states, "decoder_hidden")
    predictions = case.model.predict(output)
    case.check(predictions.boxes, "boxes")
    case.check(predictions.logits, "class_logits")
    start = case.recorded("initial_center_logit")
    if start is not None:
        expected = start.double().sigmoid()
        torch.testing.assert_close(output.references[0].double(), expected, rtol=0, atol=1e-6)


def test_gaussians(case):
    """Centres, scales and the selection of levels, which every layer predicts."""
    case.run()
    gains = case.model.transformer.decoder.layers[0].modulation.gains
    assert len(case.gaussians) == case.record.facts["dec"]
    for index, gaussians in enumerate(case.gaussians):
        per_level = "strides" in case.record.facts
        centers, precision = (
            tensor.permute(0, 2, 3, 1, 4) if per_level else tensor[:, 0]
            for tensor in (gaussians.centers, gaussians.precision / gains)
        )
        case.check(centers, f"layer{index}/centres", precision=1e-6)
        raw = case.recorded(f"layer{index}/raw_scales")
        if raw is not None:
            expected = raw.double().square().expand_as(precision)
            torch.testing.assert_close(precision.double(), expected, rtol=1e-5, atol=1e-6)
        elif case.scales == "fixed":
            assert (precision == 1).all()
        if gaussians.selection is not None:
            case.check(gaussians.selection, f"layer{index}/scale_weights", precision=1e-6)


def test_attention_maps(case):
    """Asking for maps changes nothing but rounding, and they are the recorded ones."""
    attention = AttentionMaps()
    _, memory, output = case.run(attention)
    assert case.check(output.states, "decoder_hidden")
    heads, rows = case.record.facts["heads"], memory.tokens.shape[0]
    for index, (weights, prior) in enumerate(
        zip(attention.cross_attention, attention.gaussian, strict=True)
    ):
        shape = (rows, heads, case.record.facts["N"], memory.tokens.shape[1])
        assert weights.shape == prior.shape == shape
        case.check(weights, f"layer{index}/attn_weights")
        case.check(prior, f"layer{index}/log_bias")
    assert len(attention.gaussian) == len(attention.self_attention) == case.record.facts["dec"]


def test_gradients(case):
    given = case.record.under(f"grad_{case.variant}")
    if not given:
        pytest.skip("not recorded for this variant")
    features, _, output = case.run()
    boxes = case.model.predict(output).boxes
    states, weights = output.states, case.record.under("in")
    loss = (states * weights["upstream_grad_hidden"]).sum()
    loss = loss + (boxes * weights["upstream_grad_boxes"]).sum()
    loss.backward()
    parameters = dict(case.model.named_parameters())
    maps = sorted(key for key in given if key.startswith("src"))
    checked = 0
    for name, level in zip(maps, features.levels, strict=True):
        checked += case.check(level.grad, name, "grad")
    for key in given.keys() - {*maps, "loss"}:
        name = case.name(key)
        if name is not None:
            checked += case.check(parameters[name].grad, key, "grad")
    assert checked > 20
