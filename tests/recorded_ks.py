"""Whole KS-DETR models recorded from the released implementation, and the checks on ours."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
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
        record = json.loads((folder / "models.json").read_text())
        arrays = np.load(folder / "models.npz")
        prefixes = ("inputs/", f"{name}/")
        self.data = {k: torch.from_numpy(arrays[k]) for k in arrays.files if k.startswith(prefixes)}
        self.name, self.about, self.case = name, record["about"], record["cases"][name]
        detector, options, self.sharing = CASES[name]
        self.model = BUILDERS[detector](SETTINGS, self.features("train"), **options)
        share_knowledge(self.model.transformer.encoder, **self.sharing)
        self.model.double()
        weights = formula_weights(self.case, self.about["seed"])
        self.model.load_state_dict(convert(weights, KS_DETR, self.model))

    def features(self, mode: str) -> dict[str, torch.Tensor]:
        """What the stub backbone returns."""
        prefix = f"inputs/{mode}_features/"
        return {k[len(prefix) :]: v for k, v in self.data.items() if k.startswith(prefix)}

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
        """Memory, predictions and losses, and the norms of all gradients."""
        model = self.model.train()
        model.backbone = StubBackbone(self.features("train"))
        inputs = self.training_inputs()
        targets = model.prepare_targets(inputs)
        memory = model.encode(model.extract(model.preprocess(inputs)), targets)
        predictions = model.predict(model.decode(memory, model.queries(memory, targets)))
        self._check_memory(memory)
        parts = {"": predictions, "dn_": predictions.denoised}
        for prefix, part in parts.items():
            for kind in ("logits", "boxes"):
                expected = self.data.get(f"{self.name}/train/{prefix}pred_{kind}")
                if expected is not None:
                    found = getattr(part, kind)
                    torch.testing.assert_close(found, expected.double(), rtol=rel, atol=1e-5)
        losses, expected = model.losses(predictions, targets), self.expected_losses()
        assert losses.keys() == expected.keys()
        for name, value in expected.items():
            assert losses[name].item() == pytest.approx(value, rel=rel), name
        total = sum(losses.values())
        assert total.item() == pytest.approx(self.case["total"], rel=rel)
        model.zero_grad()
        total.backward()
        self._check_gradients(rel)

    def _check_memory(self, memory) -> None:
        kinds = {"student": "student", "share_v": "teacher1", "share_a": "teacher2"}
        if len(memory.branches) == 2:
            kinds["share_a"] = "teacher1"
        for branch, rows in zip(memory.branches, memory.tokens.split(memory.batch), strict=True):
            key = f"{self.name}/train/encoder_{kinds[branch.name]}_first8channels"
            expected = self.data.get(key)
            if expected is not None:
                if expected.shape[0] != len(rows):  # single-scale ones are sequence-first
                    expected = expected.transpose(0, 1)
                close = {"rtol": 1e-5, "atol": 1e-5}
                torch.testing.assert_close(rows[..., :8], expected.double(), **close)

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
        model = self.model.eval()
        model.backbone = StubBackbone(self.features("eval"))
        size = self.about["eval_image_hw"]
        with torch.no_grad():
            result = model([{"image": pattern_image(0, *size)}])[0]["instances"]
        prefix = f"{self.name}/eval/student/result_"
        boxes, scores, classes = (self.data[prefix + k] for k in ("boxes", "scores", "classes"))
        found = result.pred_boxes.tensor
        torch.testing.assert_close(found, boxes.to(found.dtype), rtol=1e-5, atol=1e-3)
        torch.testing.assert_close(result.scores, scores.double(), rtol=1e-5, atol=1e-6)
        assert torch.equal(result.pred_classes, classes.long())
