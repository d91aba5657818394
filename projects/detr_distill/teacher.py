"""The frozen detector that teaches."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch
from detectron2.structures import ImageList
from torch import Tensor, nn

from detectors.detector import Detector
from detectors.structures import FeatureMaps, Memory, Targets
from engine.checkpoint import AtomicCheckpointer
from engine.errors import UserError

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SMALLER = {torch.bfloat16, torch.float16}
_EARLY = ("backbone.", "neck.", "input_proj.", "transformer.encoder.")


def load_teacher(detector: Detector, init_checkpoint: str, dtype: str = "float32") -> Detector:
    """Load a detector's weights and freeze it, in evaluation mode.

    Args:
        detector: of any weights.
        init_checkpoint: must hold every weight.
        dtype: of the convolutions and linear layers of backbone, neck and encoder: ``float32``,
            ``bfloat16`` or ``float16``, in which these work. What follows works in float32, as
            positions need it, or in the precision of the student's step.

    Returns:
        The same detector.

    Raises:
        UserError: no checkpoint is named, it does not fit, or it cannot be read.
    """
    if not init_checkpoint:
        raise UserError("a teacher needs weights: set teacher.init_checkpoint=FILE")
    if dtype not in DTYPES:
        raise UserError(f"teacher.dtype is '{dtype}', expected one of {', '.join(DTYPES)}")
    checkpointer = AtomicCheckpointer(detector)
    checkpointer.strictness = "evaluate"
    try:
        checkpointer.load(init_checkpoint, checkpointables=[])
    except UserError as error:
        raise UserError(f"teacher.init_checkpoint: {error}") from error
    logger.info("Teacher: %s of %s", type(detector).__name__, init_checkpoint)
    if dtype != "float32":
        _shrink(detector, DTYPES[dtype])
    return detector.requires_grad_(False).eval()


def pad_as_student(teacher: Detector, student: Detector) -> None:
    """Let a teacher treat a padded batch as its student does in training.

    Its maps and proposals are made as in training. How padding is treated there is for the
    student's options to say, so that a copy of the teacher has nothing to learn. Where the student
    has no such option, being of another kind, the teacher's decoder goes on as in evaluation, and
    AdaMixer's maps follow its own option.
    """
    teacher.pads_as_in_training = True
    decoders = teacher.transformer.decoder, student.transformer.decoder
    for asleep, awake in ((teacher, student), decoders):
        for name in asleep.padding_options:  # type: ignore[union-attr]
            if hasattr(awake, name):
                setattr(asleep, name, getattr(awake, name))
                asleep.pads_as_in_training = True  # type: ignore[assignment]


def encode(
    detector: Detector, images: ImageList, targets: Targets | None = None
) -> tuple[FeatureMaps, Memory]:
    """A detector's maps and memory, made in the type that its early weights are kept in.

    What is made in a smaller one is returned in float32, for a decoder that is not.
    """
    dtype = next((p.dtype for p in detector.parameters() if p.dtype in _SMALLER), None)
    if dtype is None:
        features = detector.extract(images)
        return features, detector.encode(features, targets)
    with torch.autocast(detector.device.type, dtype=dtype):
        features = detector.extract(images)
        memory = detector.encode(features, targets)
    levels, positions = (_widened(maps) for maps in (features.levels, features.positions))
    tokens, token_positions = _widened((memory.tokens, memory.positions))
    return (
        replace(features, levels=levels, positions=positions),
        replace(memory, tokens=tokens, positions=token_positions),
    )


def _widened(values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(value.float() for value in values)


def _shrink(detector: Detector, dtype: torch.dtype) -> None:
    """Keep in a smaller type what autocast would convert to it anyway, up to the encoder's end."""
    for name, module in detector.named_modules():
        if name.startswith(_EARLY) and isinstance(module, nn.Conv2d | nn.Linear):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)
