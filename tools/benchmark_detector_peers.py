"""The same detectors from other packages, and what makes two of them comparable."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import detrex
import torch
from detectron2.config import LazyConfig, instantiate
from torch import Tensor, nn

import projects
from detectors.conversion.convert import convert
from detectors.conversion.files import read_weights
from detectors.conversion.huggingface import HF_CONDITIONAL_DETR, HF_DEFORMABLE_DETR, HF_DETR
from detectors.conversion.layout import ConversionError
from detectors.detector import Detector
from detectors.structures import STUDENT, Group, Predictions
from engine.config import load_config
from engine.errors import UserError
from tools.benchmark_peers import Unavailable

ROOT = Path(__file__).resolve().parent.parent
DETREX, HUGGING_FACE = "detrex", "Hugging Face"
_LAST = (Group(STUDENT, 0),)


def build(config_file: str) -> Detector:
    """A detector of a config, relative to this project, with random but tame weights."""
    torch.manual_seed(0)
    model = instantiate(load_config(str(ROOT / config_file)).model)
    tame(model)
    return model


def tame(model: nn.Module) -> None:
    """Let random weights behave as trained ones do.

    Frozen norms that normalise nothing let features double in every residual block, so the last
    norm of each block scales down. Heads that start near zero would tell nothing apart.
    """
    for name, buffer in model.named_buffers():
        if re.search(r"(conv3\.norm|layer\.2\.normalization)\.weight$", name):
            buffer.fill_(0.3)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if re.search(
            r"(bbox_(embed|predictor)\b.*layers\.2|class_(embed|labels)\w*.*)\.weight$", name
        ):
            nn.init.normal_(parameter, std=0.05, generator=generator)


# --- detrex -------------------------------------------------------------------------------------


def build_detrex(root: Path | None, ours: Detector, config_file: str) -> nn.Module:
    """detrex's own detector with our detector's weights.

    Args:
        root: a checkout of detrex, whose ``projects`` hold the detectors.
        ours: whose weights it takes; every key has to fit.
        config_file: of ours; detrex's has the same name.

    Raises:
        Unavailable: there is no checkout, or what it imports is not installed.
        UserError: it lacks the config, or the weights do not fit.
    """
    if Path(detrex.__file__).is_relative_to(ROOT):
        raise Unavailable("detrex is not installed")
    if root is None:
        raise Unavailable("no --detrex-root")
    name = Path(config_file).name
    found = sorted((root / "projects").glob(f"*/configs/{name}"))
    if not found:
        raise UserError(f"--detrex-root {root} has no projects/*/configs/{name}")
    folder = str(root.resolve() / "projects")
    if folder not in projects.__path__:
        projects.__path__.append(folder)  # detrex imports its detectors as projects.<name>.modeling
    try:
        config = LazyConfig.load(str(found[0])).model
        config.device = "cpu"
        model = instantiate(config)
    except ImportError as error:
        raise Unavailable(str(error).splitlines()[0]) from None
    try:
        model.load_state_dict(ours.state_dict(), strict=True)
    except RuntimeError as error:
        raise UserError(f"our weights do not fit detrex's {found[0]}: {error}") from None
    criterion: nn.Module = model.criterion
    criterion.forward = _where_tensors_are(criterion.forward)  # type: ignore[method-assign]
    return model


def _where_tensors_are(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let ``tensor.cuda()`` be the tensor: DN-DETR's criterion asks for it on any device."""

    def call(*args: Any) -> Any:
        with patch.object(Tensor, "cuda", lambda tensor: tensor):
            return function(*args)

    return call


# --- Hugging Face -------------------------------------------------------------------------------

_FAMILIES: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "detr": ("Detr", HF_DETR, {}),
    "conditional_detr": ("ConditionalDetr", HF_CONDITIONAL_DETR, {}),
    "deformable_detr": ("DeformableDetr", HF_DEFORMABLE_DETR, {"class_cost": 2}),
}
"""By our file's name: the class's prefix, how its weights are called, and settings."""


def family_of(config_file: str) -> str:
    """The detector that a config file is named after, such as ``"detr"``."""
    return re.sub(r"_r\d+.*", "", Path(config_file).stem)


def build_hugging_face(ours: Detector, config_file: str) -> nn.Module:
    """transformers' detector; ours takes its weights.

    Raises:
        Unavailable: transformers is not installed or has no such detector.
        UserError: its weights do not fit ours.
    """
    family = family_of(config_file)
    if family not in _FAMILIES:
        raise Unavailable(f"transformers has no such detector as {family}")
    try:
        import transformers
    except ImportError:
        raise Unavailable("not installed") from None
    prefix, layout, options = _FAMILIES[family]
    levels = ["stage2", "stage3", "stage4"] if family == "deformable_detr" else ["stage4"]
    settings = getattr(transformers, f"{prefix}Config")(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config={"model_type": "resnet", "out_features": levels},
        num_labels=ours.num_classes,
        attention_dropout=0.1,
        auxiliary_loss=True,
        **options,
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{prefix}ForObjectDetection")(settings)
    tame(model)
    with TemporaryDirectory() as folder:  # files have the names that are known, unlike modules
        model.save_pretrained(folder)
        weights = read_weights(Path(folder) / "model.safetensors")
    try:
        ours.load_state_dict(convert(weights, layout, ours))
    except ConversionError as error:
        raise UserError(f"transformers' weights do not fit {config_file}: {error}") from None
    _train_the_same(model, ours)
    return HuggingFace(model, ours)


def _train_the_same(theirs: nn.Module, ours: Detector) -> None:
    """Freeze of their ResNet the stem, as ours does, and nothing else of it."""
    frozen_stages = sum(
        not any(p.requires_grad for p in stage.parameters())
        for name, stage in ours.backbone.named_children()
        if name.startswith("res")
    )
    for name, parameter in theirs.named_parameters():
        stage = re.search(r"backbone\..*\bencoder\.stages\.(\d)", name)
        if stage is not None:
            parameter.requires_grad_(int(stage[1]) >= frozen_stages)
        elif "backbone.model.embedder" in name:
            parameter.requires_grad_(False)


class HuggingFace(nn.Module):
    """A model of transformers, called as detectron2 calls its own.

    Args:
        model: called with pixels and a mask.
        ours: prepares the images and targets and makes detections of the predictions, so that
            only the models differ.
    """

    def __init__(self, model: nn.Module, ours: Detector):
        super().__init__()
        self.model = model
        self._ours = (ours,)  # in a tuple, so that its parameters are not this module's

    def forward(self, batched_inputs: list[dict]) -> dict[str, Tensor] | list[dict]:
        """The weighted sum of losses in training, detections in evaluation."""
        (ours,) = self._ours
        images = ours.preprocess(batched_inputs)
        mask = torch.ones(len(batched_inputs), *images.tensor.shape[-2:], dtype=torch.long)
        if not self.training:
            output = self.model(pixel_values=images.tensor, pixel_mask=mask)
            predictions = Predictions(output.logits[None], output.pred_boxes[None], _LAST)
            return ours.inference(predictions, images.image_sizes, batched_inputs)
        labels = [
            {"class_labels": target["labels"], "boxes": target["boxes"]}
            for target in ours.prepare_targets(batched_inputs)
        ]
        output = self.model(pixel_values=images.tensor, pixel_mask=mask, labels=labels)
        return {"loss": output.loss}


# --- comparing ----------------------------------------------------------------------------------


@contextmanager
def without_chance(model: nn.Module) -> Iterator[None]:
    """Switch dropout and the noise of denoising queries off for a while."""
    changed: list[tuple[nn.Module, str, float]] = []
    for module in model.modules():
        names = [name for name in vars(module) if "dropout" in name or name.endswith("_noise_prob")]
        names += ["box_noise_scale"] if hasattr(module, "box_noise_scale") else []
        names += ["p"] if "Dropout" in type(module).__name__ else []
        for name in names:
            value = getattr(module, name, None)
            if isinstance(value, float):
                changed.append((module, name, value))
                setattr(module, name, 0.0)
    try:
        yield
    finally:
        for module, name, value in changed:
            setattr(module, name, value)
