"""Whole KS-DETR models recorded from the released implementation, and the checks on ours."""

import zlib
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from recorded_entries import Entries, Recording, matches
from tiny_dab import build as build_dab
from tiny_deformable import build_deformable, common_parts, decoder, deformable_encoder
from tiny_detectors import StubBackbone, build_conditional, instances, pattern_image

from detectors.conversion.convert import convert
from detectors.dab_detr import DABDETR
from detectors.deformable_detr import MultiLevelTransformer
from detectors.dn_deformable_detr import DNDeformableDecoder, DNDeformableDETR
from detectors.dn_detr import DNDETR
from projects.ks_detr.checkpoint import KS_DETR
from projects.ks_detr.encoder import share_knowledge
from projects.ks_detr.foreground import foreground_mask

NO_NOISE = {"denoising_groups": 3, "label_noise_prob": 0.0, "box_noise_scale": 0.0}
SETTINGS = {
    "embed_dim": 256,
    "num_heads": 8,
    "feedforward_dim": 64,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
    "num_classes": 7,
    "num_queries": 12,
    "c3": 8,
    "c4": 12,
    "c5": 16,
    "gn_groups": 32,
    "select_box_nums_for_evaluation": 12,
    "weight_base": {"loss_class": 1.0, "loss_bbox": 5.0, "loss_giou": 2.0},
}


def build_dn_deformable(settings, features):
    transformer = MultiLevelTransformer(
        deformable_encoder(settings), decoder(settings, DNDeformableDecoder)
    )
    parts = common_parts(settings, features) | {"transformer": transformer}
    return DNDeformableDETR(**parts | NO_NOISE)


BUILDERS = {
    "conditional": build_conditional,
    "dab": lambda *given: build_dab(DABDETR, *given),
    "dn": lambda *given: build_dab(DNDETR, *given, **NO_NOISE),
    "deformable": build_deformable,
    "dn_deformable": build_dn_deformable,
}
CASES = {
    "conditional": ("conditional", {}, {}),
    "conditional_mark": ("conditional", {}, {"teacher_features": "mark"}),
    "conditional_all_levels": ("conditional", {}, {"teacher_aux_loss": True}),
    "dab": ("dab", {}, {}),
    "dab_dual_share_v": ("dab", {}, {"branches": ["share_v"]}),
    "dab_dual_share_a": ("dab", {}, {"branches": ["share_a"]}),
    "dn": ("dn", {}, {}),
    "deformable": ("deformable", {}, {}),
    "deformable_refine": ("deformable", {"refine": True}, {}),
    "deformable_two_stage": ("deformable", {"refine": True, "two_stage": True}, {}),
    "dn_deformable": ("dn_deformable", {}, {}),
}
"""By name: the detector, its options and those of ``share_knowledge``."""


def formula_weights(case, seed):
    """The weights of a recorded model, from their keys alone."""
    weights = {}
    for key, shape in case["state_dict_shapes"].items():
        source = case["tied_keys"].get(key, key)
        rng = np.random.RandomState((zlib.crc32(source.encode()) + seed) % 2**32)
        noise = rng.standard_normal(shape)
        if len(shape) >= 2:
            value = noise / np.sqrt(np.prod(shape[1:]))
        elif not source.endswith("weight"):
            value = 0.1 * noise
        elif tuple(shape) == (1,):  # of a PReLU
            value = 0.25 + 0.05 * noise
        else:
            value = 1 + 0.1 * noise
        weights[key] = torch.from_numpy(np.asarray(value, dtype=np.float32))
    return weights


class RecordedModel:
    """One case of a folder that holds models.json and models.npz, in float64."""

    def __init__(self, folder: Path, name: str):
        recording = Recording(folder / "models")
        self.arrays, self.about = recording.arrays, recording.about
        self.name, self.case = name, recording.cases[name]
        detector, options, self.sharing = CASES[name]
        self.model = BUILDERS[detector](SETTINGS, self.features("train"), **options)
        share_knowledge(self.model.transformer.encoder, **self.sharing)
        self.model.double()
        weights = formula_weights(self.case, self.about["seed"])
        self.model.load_state_dict(convert(weights, KS_DETR, self.model))

    def features(self, mode: str) -> dict[str, torch.Tensor]:
        """What the stub backbone returns."""
        return Entries(self.arrays, "inputs/").group(f"{mode}_features")

    def training_inputs(self) -> list[dict]:
        """The three images, of which one is smaller and one has no boxes."""
        images = self.about["train_images"]
        return [
            {
                "image": pattern_image(index, *image["image_size_hw"]),
                "instances": instances(
                    image["image_size_hw"], image["boxes_xyxy"], image["classes"]
                ),
            }
            for index, image in enumerate(images)
        ]

    def levels(self) -> list[tuple[str, int]]:
        """Branch and decoder layer of every recorded output level."""
        layers = SETTINGS["num_decoder_layers"]
        branches = self.sharing.get("branches", ["share_v", "share_a"])
        first = 0 if self.sharing.get("teacher_aux_loss") else layers - 1
        levels = [("", layer) for layer in range(layers)]
        levels += [(f"_{name}", layer) for name in branches for layer in range(first, layers)]
        assert len(levels) == self.case["number_of_output_levels"]
        return levels

    def check_settings(self) -> None:
        """What the record says of the case is what is built here."""
        branches = self.sharing.get("branches", ["share_v", "share_a"])
        attention = {"share_v": "DualAttnShareV", "share_a": "DualAttnShareA"}[branches[0]]
        deformable = "deformable" in CASES[self.name][0]
        if len(branches) == 2:
            attention = "DeformableTripleAttnShareAV" if deformable else "TripleAttnQKVShareAV"
        mark = self.sharing.get("teacher_features") == "mark"
        options = {"refine": "with_box_refine", "two_stage": "as_two_stage"}
        assert self.case["spec"] == {
            "detector": CASES[self.name][0],
            "last_encoder_layer": attention,
            "masking": "MarkFg1Bg0" if mark else "sMLP",
            "loc": {"DualAttnShareV": "QK", "DualAttnShareA": "V"}.get(attention, "X"),
            "teacher_last_decoder_layer_only": not self.sharing.get("teacher_aux_loss", False),
            **{options[name]: value for name, value in CASES[self.name][1].items()},
        }
        levels = self.levels()
        last = {branch: place for place, (branch, _) in enumerate(levels)}
        kinds = {f"_{branch}": kind for branch, kind in self.branch_kinds().items()}
        assert self.case["output_level_index"] == {
            kinds[branch] if branch else f"student_layer{layer}": place
            for place, (branch, layer) in enumerate(levels)
            if not branch or place == last[branch]
        }

    def expected_losses(self) -> dict[str, float]:
        """Recorded losses under our names: they number all output levels in one row."""
        recorded, renamed = dict(self.case["losses"]), {}
        levels = self.levels()
        for suffix in ("", "_dn"):
            if f"loss_class{suffix}" not in recorded:
                continue
            for level, (branch, layer) in enumerate(levels):
                for kind in ("class", "bbox", "giou"):
                    number = "" if level == len(levels) - 1 else f"_{level}"
                    last = layer == SETTINGS["num_decoder_layers"] - 1
                    ours = f"loss_{kind}{suffix}{branch}" + ("" if last else f"_{layer}")
                    renamed[ours] = recorded.pop(f"loss_{kind}{suffix}{number}")
        return renamed | recorded  # what is left are the proposals' losses

    def check_training(self, rel: float = 1e-5) -> None:
        """Losses and the norms of all gradients, and the recorded arrays where there are any."""
        model = self.model.train()
        model.backbone = StubBackbone(self.features("train"))
        inputs = self.training_inputs()
        targets = model.prepare_targets(inputs)
        features = model.extract(model.preprocess(inputs))
        memory = model.encode(features, targets)
        predictions = model.predict(model.decode(memory, model.queries(memory, targets)))
        if any(key.startswith(f"{self.name}/train/") for key in self.arrays):
            entries = Entries(self.arrays, f"{self.name}/train/")
            mask = foreground_mask(features, targets)
            assert torch.equal(mask.T, entries.take("fg_token_mask") != 0)
            self._check_memory(memory, entries)
            self._check_predictions(predictions, entries)
            entries.finish()
        losses, expected = model.losses(predictions, targets), self.expected_losses()
        assert losses.keys() == expected.keys()
        for name, value in expected.items():
            assert losses[name].item() == pytest.approx(value, rel=rel), name
        total = sum(losses.values())
        assert total.item() == pytest.approx(self.case["total"], rel=rel)
        model.zero_grad()
        total.backward()
        self._check_gradients(rel)

    def branch_kinds(self) -> dict[str, str]:
        """Recorded names by branch."""
        return {
            name: f"teacher{number}" if number else name
            for number, name in enumerate(self.model.branch_names)
        }

    def _check_memory(self, memory, entries: Entries) -> None:
        branches = [branch.name for branch in memory.branches]
        kinds = self.branch_kinds()
        assert branches == list(kinds)
        for branch, rows in zip(branches, memory.tokens.split(memory.batch), strict=True):
            expected = entries.take(f"encoder_{kinds[branch]}_first8channels")
            if expected.shape[0] != len(rows):  # single-scale ones are sequence-first
                expected = expected.transpose(0, 1)
            matches(rows[..., :8], expected, name=branch)

    def _check_predictions(self, predictions, entries: Entries) -> None:
        # proposals start from the logits of cell centres, which are computed in float32
        atol = 1e-9 if predictions.proposals is None else 1e-6
        parts = {"": predictions}
        if predictions.denoised is not None:
            parts["dn_"] = predictions.denoised
        for prefix, part in parts.items():
            for kind in ("logits", "boxes"):
                name = f"{prefix}pred_{kind}"
                matches(getattr(part, kind), entries.take(name), atol=atol, name=name)
        if predictions.proposals is not None:
            name = "enc_pred_boxes_first_image"
            boxes = predictions.proposals.boxes[0, 0]
            matches(boxes, entries.take(name), atol=atol, name=name)

    def _check_gradients(self, rel: float) -> None:
        gradients = {name: parameter.grad for name, parameter in self.model.named_parameters()}
        attention = "transformer.encoder.layers.1.attentions.0."
        missing = set(gradients)
        for key, norm in self.case["gradient_norms"].items():
            kind = key.rpartition(".")[2]
            if key.startswith("ksgt"):
                names = [f"{attention}teacher.features.linear.{kind}"]
            elif key.startswith(attention) and "in_proj" in key:
                names = [key, f"{attention}teacher.{kind}"]
            elif "_teacher." in key:
                layer = key.removeprefix(attention).partition("_teacher")[0]
                names = [f"{attention}teacher.{layer}.{kind}"]
            else:
                names = [key]
            found = torch.cat([gradients[name] for name in names]).norm().item()
            assert found == pytest.approx(norm, rel=rel, abs=1e-9), key
            missing -= set(names)
        assert not missing

    def check_inference(self) -> None:
        """The student's detections on one image."""
        model, size = self.model.eval(), self.about["eval_image_hw"]
        model.backbone = StubBackbone(self.features("eval"))
        with torch.no_grad(), patch.object(model, "inference", wraps=model.inference) as inference:
            results = model([{"image": pattern_image(0, *size)}])
        entries = Entries(self.arrays, f"{self.name}/eval/student/")
        _check_detections(inference.call_args.args[0], results, entries)

    def check_branches(self) -> None:
        """The detections of every branch on one image with ground truth."""
        model, inputs = self.model.eval(), self.training_inputs()[:1]
        model.backbone = StubBackbone(self.features("eval"))
        kinds = self.branch_kinds()
        with torch.no_grad(), patch.object(model, "inference", wraps=model.inference) as inference:
            detected = model.detect_branches(inputs, kinds)
        entries = Entries(self.arrays, f"{self.name}/eval/")
        predictions = [call.args[0] for call in inference.call_args_list]
        for branch, found in zip(detected, predictions, strict=True):
            of_branch = Entries(entries.group(kinds[branch]), "")
            _check_detections(found, detected[branch], of_branch)
        entries.finish()


def _check_detections(predictions, results: list[dict], entries: Entries) -> None:
    """The last layer's predictions on one image, and what was made of them."""
    for kind in ("logits", "boxes"):
        expected = entries.take_if_recorded(f"pred_{kind}")
        if expected is not None:
            matches(getattr(predictions, kind)[-1, 0], expected, name=kind)
    (result,) = results
    found = result["instances"]
    matches(found.pred_boxes.tensor, entries.take("result_boxes"), name="boxes")
    matches(found.scores, entries.take("result_scores"), name="scores")
    assert torch.equal(found.pred_classes, entries.take("result_classes"))
    entries.finish()
