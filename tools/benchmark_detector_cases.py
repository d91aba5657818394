"""What is measured of which detector, and what is required of it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from detectors.detector import Detector
from engine.errors import UserError
from tools.benchmark_detector_peers import (
    DETREX,
    HUGGING_FACE,
    build,
    build_detrex,
    build_hugging_face,
    family_of,
    without_chance,
)
from tools.benchmark_detector_steps import autocast
from tools.benchmark_peers import Unavailable

OURS, BASELINE = "ours", "baseline"
TRAIN, INFER = "train", "infer"
TOLERANCE = 2e-3
"""Largest relative difference in the Euclidean norm."""

_BASELINES = "projects/baselines/configs"
_KS = "projects/ks_detr/configs"


@dataclass(frozen=True)
class Subject:
    """A config of this project and what it is measured beside.

    Attributes:
        name: of its cases.
        config_file: of the detector.
        peers: other packages' contenders.
        baseline: config of the detector that a method extends.
        works: :data:`TRAIN`, :data:`INFER` or both.
    """

    name: str
    config_file: str
    peers: tuple[str, ...] = ()
    baseline: str | None = None
    works: tuple[str, ...] = (TRAIN, INFER)

    @property
    def contenders(self) -> tuple[str, ...]:
        """Ours first."""
        return (OURS, *((BASELINE,) if self.baseline else ()), *self.peers)


def _detector(config: str, *peers: str) -> Subject:
    return Subject(family_of(config), f"{_BASELINES}/{config}.py", (DETREX, *peers))


def over(config_file: str, baseline: str, peers: tuple[str, ...] = ()) -> Subject:
    """A method over its baseline; they differ in training alone."""
    return Subject(family_of(config_file), config_file, peers, baseline, (TRAIN,))


SUBJECTS = (
    _detector("detr_r50_300ep", HUGGING_FACE),
    _detector("conditional_detr_r50_50ep", HUGGING_FACE),
    _detector("dab_detr_r50_50ep"),
    _detector("dn_detr_r50_50ep"),
    _detector("deformable_detr_r50_50ep", HUGGING_FACE),
    _detector("dn_deformable_detr_r50_12ep"),
    *(
        over(f"{_KS}/ks_{config}.py", f"{_BASELINES}/{config}.py")
        for config in ("conditional_detr_r50_50ep", "dab_detr_r50_50ep", "dn_detr_r50_50ep")
    ),
    *(
        over(f"{_KS}/ks_{config}.py", f"{_BASELINES}/{config}.py", (DETREX,))
        for config in ("deformable_detr_r50_50ep", "dn_deformable_detr_r50_12ep")
    ),
    over("projects/smca/configs/smca_single_scale_r50_50ep.py", f"{_BASELINES}/detr_r50_50ep.py"),
)


@dataclass(frozen=True)
class Bound:
    """What a ratio must reach (peer over ours) or must not pass (ours over the other)."""

    value: float
    at_most: bool = False


TIME, MEMORY, STEPS = "time", "memory", "steps"

_REQUIRED: tuple[tuple[str, str, Bound], ...] = (
    *(
        (f"{name}/*/{work}/{TIME}", DETREX, Bound(value))
        for name in ("deformable_detr", "dn_deformable_detr")
        for work, value in ((INFER, 2.0), (TRAIN, 3.0))
    ),
    *(
        (f"{name}/*/{work}/{TIME}", DETREX, Bound(value))
        for name in ("detr", "conditional_detr", "dab_detr", "dn_detr")
        for work, value in ((INFER, 1.1), (TRAIN, 1.15))
    ),
    *(
        (f"{name}/*/{TRAIN}/{MEMORY}", DETREX, Bound(0.6, at_most=True))
        for name in ("deformable_detr", "dn_deformable_detr")
    ),
    ("ks_*deformable_detr/*/time", DETREX, Bound(1.0)),
    ("ks_*/memory", DETREX, Bound(float("inf"), at_most=True)),
    ("*/memory", DETREX, Bound(1.0, at_most=True)),
    ("ks_*deformable_detr/*/time", BASELINE, Bound(1.45, at_most=True)),
    ("ks_*deformable_detr/*/memory", BASELINE, Bound(1.15, at_most=True)),
    ("ks_*/time", BASELINE, Bound(1.3, at_most=True)),
    ("ks_*/memory", BASELINE, Bound(1.35, at_most=True)),
)


@dataclass(frozen=True)
class Case:
    """One row of cases: a subject, an input, a work and what is measured of it.

    With ``amp`` the forward pass is autocast to bfloat16, as ``train.amp.enabled`` has it, and
    nothing is required.
    """

    subject: Subject
    size: tuple[int, int]
    images: int
    work: str
    measure: str
    amp: bool = False

    @property
    def name(self) -> str:
        """Such as ``detr/480x640/B2/train/time``."""
        height, width = self.size
        return f"{self.subject.name}/{height}x{width}/B{self.images}/{self.work}/{self.measure}"

    def required(self, contender: str) -> Bound | None:
        """What its ratio to ours has to be; the first entry that fits counts."""
        if self.amp:
            return None
        for pattern, name, bound in _REQUIRED:
            if name == contender and fnmatchcase(self.name, pattern):
                return bound if bound.value < float("inf") else None
        return None


def all_cases(subjects: Sequence[Subject], sizes: Sequence[tuple[int, int]]) -> Iterator[Case]:
    """Training of two images, inference of two and of one; both sizes, time, memory and steps."""
    for subject, size in product(subjects, sizes):
        for work in subject.works:
            for images in (2,) if work == TRAIN else (2, 1):
                measures = (TIME, MEMORY) if images == 2 else (TIME,)
                for measure in (*measures, *((STEPS,) if work == TRAIN else ())):
                    yield Case(subject, size, images, work, measure)


# --- inputs and contenders ----------------------------------------------------------------------


def batch(size: tuple[int, int], images: int, classes: int, boxes: int = 7) -> list[dict]:
    """Random images of one size with ground truth, the same for the same arguments."""
    generator = torch.Generator().manual_seed(0)
    height, width = size
    extent = torch.tensor([width, height])
    items = []
    for _ in range(images):
        instances = Instances((height, width))
        corner = torch.rand(boxes, 2, generator=generator) * extent * 0.6
        sides = (0.05 + 0.3 * torch.rand(boxes, 2, generator=generator)) * extent
        instances.gt_boxes = Boxes(torch.cat([corner, corner + sides], dim=1))
        instances.gt_classes = torch.randint(classes, (boxes,), generator=generator)
        image = torch.randint(256, (3, height, width), generator=generator, dtype=torch.uint8)
        items.append({"image": image, "instances": instances, "height": height, "width": width})
    return items


@dataclass
class Contest:
    """Models with the same weights, as far as they have the same.

    Attributes:
        ours: the detector of the subject's config.
        models: by contender, ours first.
        unavailable: why a peer is missing, by contender.
        reference: whose results the peers' have to be: ours, or the baseline of ours.
    """

    ours: Detector
    models: dict[str, nn.Module]
    unavailable: dict[str, str]
    reference: Detector

    def items(self, size: tuple[int, int], images: int) -> list[dict]:
        """Images with ground truth of the classes that there are."""
        return batch(size, images, self.reference.num_classes)


def prepare(
    subject: Subject, detrex_root: Path | None, contenders: Sequence[str] | None = None
) -> Contest:
    """Build ours and contenders, by default all of the subject's.

    Raises:
        UserError: weights do not fit.
    """
    contenders = subject.contenders if contenders is None else contenders
    ours = reference = build(subject.config_file)
    models: dict[str, nn.Module] = {OURS: ours}
    if subject.baseline is not None:
        models[BASELINE] = reference = build(subject.baseline)
    config = subject.baseline or subject.config_file
    builders: dict[str, Callable[[], nn.Module]] = {
        HUGGING_FACE: lambda: build_hugging_face(reference, config),  # sets the weights of ours
        DETREX: lambda: build_detrex(detrex_root, reference, config),
    }
    unavailable = {}
    for name, make in builders.items():
        if name in contenders:
            try:
                models[name] = make()
            except Unavailable as error:
                unavailable[name] = str(error)
    chosen = {name: models[name] for name in contenders if name in models}
    return Contest(ours, chosen, unavailable, reference)


def run_of(
    model: nn.Module, items: list[dict], work: str, amp: bool = False
) -> Callable[[], object]:
    """A call that does the work: a training step short of the optimiser's, or inference."""

    def train() -> None:
        model.zero_grad(set_to_none=True)
        model.train()
        with autocast(amp):
            loss = torch.stack(list(model(items).values())).sum()
        loss.backward()

    def infer() -> None:
        model.eval()
        with torch.no_grad(), autocast(amp):
            model(items)

    return train if work == TRAIN else infer


# --- agreement ----------------------------------------------------------------------------------


def check_agreement(case: Case, contest: Contest) -> None:
    """Hold the peers' detections, and in training their losses and gradients, against ours.

    Models of transformers weigh the losses in their own way; their detections are compared alone.

    Raises:
        UserError: they differ.
    """
    items = contest.items(case.size, case.images)
    reference = contest.reference
    peers = {name: model for name, model in contest.models.items() if name in case.subject.peers}
    if not peers:
        return
    with keeping(reference, sys.maxsize):
        classes = reference.num_classes
        own, count = _detections(reference, items, classes)
        for name, model in peers.items():
            with keeping(model, count):
                _compare(case.name, name, own, _detections(model, items, classes)[0])
    compared = [name for name in peers if name != HUGGING_FACE]
    if compared and case.work == TRAIN:
        own = _losses(reference, items)
        for name in compared:
            _compare(case.name, name, own, _losses(peers[name], items))


@contextmanager
def keeping(model: nn.Module, count: int) -> Iterator[None]:
    """Let a detector that keeps the best detections keep so many for a while."""
    before = getattr(model, "select_box_nums_for_evaluation", None)
    if before is not None:
        model.select_box_nums_for_evaluation = count  # type: ignore[assignment]
    try:
        yield
    finally:
        if before is not None:
            model.select_box_nums_for_evaluation = before


def _compare(case: str, contender: str, own: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    if own.keys() != theirs.keys():
        raise UserError(
            f"{case}: ours gives {', '.join(sorted(own))}, {contender} {', '.join(sorted(theirs))}"
        )
    for name, value in own.items():
        norm = theirs[name].double().norm().item()
        difference = (value.double() - theirs[name].double()).norm().item()
        if not difference <= TOLERANCE * norm:
            raise UserError(
                f"{case}: {name} of ours and {contender} differ by {difference:.3g} in the norm, "
                f"expected at most {TOLERANCE:g} of {norm:.3g}"
            )


def _detections(model: nn.Module, items: list[dict], classes: int) -> tuple[dict[str, Tensor], int]:
    """What does not depend on the order of near ties, and how many detections an image has.

    Scores are ordered already; boxes are summed for each class, weighted by their scores.
    """
    model.eval()
    with torch.no_grad():
        found = [result["instances"] for result in model(items)]
    boxes = []
    for instances in found:
        weighted = instances.pred_boxes.tensor * instances.scores[:, None]
        sums = weighted.new_zeros(classes, 4, dtype=torch.float64)
        boxes.append(sums.index_add(0, instances.pred_classes, weighted.double()))
    scores = torch.stack([instances.scores for instances in found])
    return {"scores": scores, "boxes": torch.stack(boxes)}, scores.shape[1]


def _losses(model: nn.Module, items: list[dict]) -> dict[str, Tensor]:
    model.train()
    model.zero_grad(set_to_none=True)
    with without_chance(model):
        losses = model(items)
        torch.stack(list(losses.values())).sum().backward()
    norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return {**{k: v.detach() for k, v in losses.items()}, "gradients": torch.stack(norms).norm()}
