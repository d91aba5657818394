"""Detectors recorded from detrex: weights, inputs, outputs of all layers, losses, gradients."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from omegaconf import DictConfig, OmegaConf
from tiny_detectors import ROOT, instances, pattern_image, recipe_weights

CLOSE = {"rtol": 1e-4, "atol": 1e-4}


class RecordedDetector:
    """One pair of json and npz files and the checks that a detector of ours has to pass."""

    def __init__(self, folder: Path, name: str):
        self.record = json.loads((folder / f"{name}.json").read_text())
        arrays = np.load(folder / f"{name}.npz")
        self.arrays = {key: torch.from_numpy(arrays[key]) for key in arrays.files}
        self.settings = self.record["settings"]

    @property
    def features(self) -> dict[str, torch.Tensor]:
        """What the stub backbone returns."""
        prefix = "feat/"
        return {k[len(prefix) :]: v for k, v in self.arrays.items() if k.startswith(prefix)}

    def load(self, model: torch.nn.Module) -> torch.nn.Module:
        """Give a model the recorded weights; every key has to fit."""
        record = self.record["weights"]
        weights = recipe_weights(record["parameters"], record["seed"])
        if record["stored"]:
            stored = {k[6:]: v for k, v in self.arrays.items() if k.startswith("param/")}
            assert all(torch.equal(weights[key], value) for key, value in stored.items())
        weights |= {alias: weights[key] for alias, key in record["aliases"].items()}
        buffers = self.record.get("buffers", {})
        weights |= {key: torch.tensor(value) for key, value in buffers.items()}
        model.load_state_dict(weights, strict=True)
        return model

    def inputs(self, case: str | None = None) -> list[dict]:
        """The batch, with ground truth for a training case."""
        given = self.record["inputs"]
        items = []
        sizes = zip(given["image_sizes_hw"], given["output_sizes_hw"], strict=True)
        for index, (size, output) in enumerate(sizes):
            item = {"image": pattern_image(index, *size)}
            if output is not None:
                item["height"], item["width"] = output
            if case is not None:
                gt = self.record["train"][case]["gt"][index]
                item["instances"] = instances(size, gt["boxes_xyxy_abs"], gt["classes"])
            items.append(item)
        return items

    def check_preprocess(self, model) -> None:
        """Normalised and padded pixels."""
        if "preprocess" not in self.record:
            pytest.skip("not recorded for this size")
        images = model.preprocess(self.inputs())
        expected = self.record["preprocess"]
        assert list(images.tensor.shape) == expected["batched_shape"]
        sums = images.tensor.double().sum((2, 3))
        wanted = torch.tensor(expected["sum_per_image_channel"]).double()
        torch.testing.assert_close(sums, wanted, rtol=1e-4, atol=1e-2)
        for index, value in expected["pixels"].items():
            assert images.tensor[tuple(map(int, index.split(",")))].item() == pytest.approx(value)

    def check_inference(self, model) -> None:
        """Memory, all layers' predictions, final detections."""
        model.eval()
        inputs = self.inputs()
        with torch.no_grad():
            memory = model.encode(model.extract(model.preprocess(inputs)))
            predictions = model.predict(model.decode(memory, model.queries(memory)))
            results = model(inputs)
        if "eval/memory" in self.arrays:
            self._check_memory(memory.tokens, self.arrays["eval/memory"])
        torch.testing.assert_close(predictions.logits, self.arrays["eval/pred_logits"], **CLOSE)
        boxes = self.arrays["eval/pred_boxes"]
        torch.testing.assert_close(predictions.boxes, boxes, rtol=0, atol=2e-5)
        for index, result in enumerate(results):
            self._check_result(index, result["instances"])

    @staticmethod
    def _check_memory(found: torch.Tensor, expected: torch.Tensor) -> None:
        if found.shape != expected.shape:  # detrex's single-scale detectors are sequence-first
            expected = expected.transpose(0, 1)
        torch.testing.assert_close(found, expected, **CLOSE)

    def _check_result(self, index: int, found) -> None:
        assert list(found.image_size) == self.record["eval_result_sizes_hw"][index]
        boxes, scores, classes = (
            self.arrays[f"eval/result{index}/{key}"] for key in ("boxes", "scores", "classes")
        )
        torch.testing.assert_close(found.pred_boxes.tensor, boxes, rtol=2e-5, atol=5e-3)
        torch.testing.assert_close(found.scores, scores, rtol=0, atol=2e-5)
        assert torch.equal(found.pred_classes, classes)

    def check_training(self, model, case: str) -> None:
        """Losses, predictions, matches and gradients of a training case."""
        expected = self.record["train"][case]
        model.train()
        targets = model.prepare_targets(self.inputs(case))
        memory = model.encode(model.extract(model.preprocess(self.inputs(case))), targets)
        predictions = model.predict(model.decode(memory, model.queries(memory, targets)))
        self._check_predictions(predictions, case)
        losses = model.losses(predictions, targets)
        assert losses.keys() == expected["losses"].keys()
        for name, value in expected["losses"].items():
            assert losses[name].item() == pytest.approx(value, rel=1e-4, abs=1e-6), name
        sum(losses.values()).backward()
        norms = expected.get("grad_norms", {})
        for name, parameter in model.named_parameters():
            if norms.get(name) is not None:
                found = parameter.grad.norm().item()
                assert found == pytest.approx(norms[name], rel=1e-4, abs=1e-5), name
            stored = self.arrays.get(f"train{case}/grad/{name}")
            if stored is not None:
                close = min(1e-3, 1e-4 * stored.abs().max().item())
                torch.testing.assert_close(parameter.grad, stored, rtol=1e-4, atol=close)

    def _check_predictions(self, predictions, case: str) -> None:
        parts = {"": predictions, "dn_": predictions.denoised, "enc_": predictions.proposals}
        for prefix, part in parts.items():
            for kind in ("logits", "boxes"):
                expected = self.arrays.get(f"train{case}/{prefix}pred_{kind}")
                if expected is not None:
                    found = getattr(part, kind)
                    torch.testing.assert_close(found.view(expected.shape), expected, **CLOSE)

    def check_training_steps(self, model) -> None:
        """Three AdamW steps follow the recorded losses, so gradients are right everywhere."""
        if "adamw_3_steps_case_B" not in self.record:
            pytest.skip("not recorded for this size")
        record = self.record["adamw_3_steps_case_B"]
        expected = record["total_loss_before_each_step_and_after_last"]
        norms = {
            id(p)
            for m in model.modules()
            if isinstance(m, torch.nn.LayerNorm | torch.nn.GroupNorm)
            for p in m.parameters()
        }
        groups = [
            {"params": [p for p in model.parameters() if id(p) not in norms]},
            {"params": [p for p in model.parameters() if id(p) in norms], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=1e-3, weight_decay=1e-2)
        model.train()
        inputs, totals = self.inputs("B"), []
        for _ in range(4):
            total = sum(model(inputs).values())
            totals.append(total.item())
            optimizer.zero_grad()
            total.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
        assert totals[:3] == pytest.approx(expected[:3], rel=1e-3)
        assert totals[3] == pytest.approx(expected[3], rel=2e-2)


def check_full_size(reference_dir: Path, name: str) -> None:
    """Keys, shapes, frozen and trainable parameters of a baseline config are detrex's."""
    config = LazyConfig.load(str(ROOT / f"projects/baselines/configs/{name}.py"))
    model = instantiate(config.model)
    record = reference_dir / f"detrex/checkpoint_keys/{name}.json"
    expected = json.loads(record.read_text())
    state = model.state_dict()
    assert {key: list(value.shape) for key, value in state.items()} == {
        key: shape for key, (_, shape) in expected["keys"].items()
    }
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen == expected["frozen_parameters"]
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == expected["trainable_parameters"]


def check_settings(reference_dir: Path, name: str) -> None:
    """A baseline config has detrex's optimiser, schedule, criterion and numbers of things."""
    config = LazyConfig.load(str(ROOT / f"projects/baselines/configs/{name}.py"))
    record = (reference_dir / "detrex/training_settings.json").read_text()
    expected = json.loads(record)["configs"][name]
    optimizer, train, model = config.optimizer, config.train, config.model
    schedule = OmegaConf.to_container(config.lr_multiplier)
    schedule |= schedule.pop("scheduler")
    found = {
        "lr": optimizer.lr,
        "backbone_lr": optimizer.lr * optimizer.params.lr_factor_func("backbone.stem.conv1.weight"),
        "betas": list(optimizer.betas),
        "weight_decay": optimizer.weight_decay,
        "weight_decay_norm": optimizer.params.weight_decay_norm,
        "grad_clip": train.clip_grad,
        "schedule": schedule,
        "max_iter": train.max_iter,
        "total_batch_size": config.dataloader.train.total_batch_size,
        "eval_period": train.eval_period,
        "output_dir": train.output_dir,
        "num_queries": model.num_queries,
        "num_classes": model.num_classes,
        "aux_loss": model.aux_loss,
        "matcher": model.criterion.matcher,
    }
    for key, value in found.items():
        assert _without_target(value) == _without_target(expected[key]), key
    criterion = expected["criterion"]
    assert model.criterion.loss_class_type == criterion["loss_class_type"]
    weights = {re.sub(r"_\d+$", "", key): value for key, value in criterion["weight_dict"].items()}
    assert model.criterion.weight_dict == weights


def _without_target(value):
    """A node without the name of its class, which need not be detrex's."""
    if not isinstance(value, dict | DictConfig):
        return value
    return {key: entry for key, entry in value.items() if key != "_target_"}
