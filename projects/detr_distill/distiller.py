"""The model that trains a student under a teacher."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from detectors.detector import Detector
from detectors.late_maps import LateMaps
from detectors.structures import (
    STUDENT,
    AttentionMaps,
    DecoderOutput,
    FeatureMaps,
    Matches,
    Memory,
    Predictions,
    Queries,
    Targets,
)
from engine.errors import UserError

from .context import DistillationContext, View
from .measures import detection_quality, instability
from .objective import Objective
from .queries import QueryAdapter
from .teacher import encode, pad_as_student
from .timing import StepClock


class Distiller(nn.Module):
    """In training a student's losses and those of the objectives; in evaluation the student.

    The teacher is no submodule: it is in no state dict, no average of weights and no distributed
    wrapper, and always in evaluation mode. It treats padding as the student does in training, see
    :func:`~projects.detr_distill.teacher.pad_as_student`. What is learned besides the student is
    under ``training_parts``, so that ``student.state_dict()`` is a plain detector's.

    Args:
        student: any detector.
        teacher: as :func:`~projects.detr_distill.teacher.load_teacher` returns it.
        objectives: whose losses are added to the student's.

    Raises:
        UserError: if the two detectors cannot be compared.
    """

    def __init__(self, student: Detector, teacher: Detector, objectives: Sequence[Objective]):
        super().__init__()
        if student.num_classes != teacher.num_classes:
            raise UserError(
                f"the student has num_classes {student.num_classes}, "
                f"the teacher {teacher.num_classes}: expected the same"
            )
        self.student = student
        pad_as_student(teacher, student)
        self._outside = (teacher.requires_grad_(False).eval(),)  # a tuple registers nothing
        self.training_parts = nn.ModuleDict({"objectives": nn.ModuleList(objectives)})
        if any(objective.needs_group for objective in objectives):
            self.training_parts["queries"] = QueryAdapter(student, teacher)
        self.attention_wanted = any(objective.needs_attention for objective in objectives)
        self.metrics: dict[str, Tensor] = {}
        """Of the last step, without gradients; for the log."""
        self._clock = StepClock()
        self._prepare()
        self.training_parts.to(student.device)

    @property
    def teacher(self) -> Detector:
        """The frozen detector."""
        return self._outside[0]

    @property
    def objectives(self) -> Sequence[Objective]:
        """Whose losses are added to the student's."""
        return self.training_parts["objectives"]  # type: ignore[return-value]

    def _apply(self, fn: Callable, recurse: bool = True) -> Distiller:
        self.teacher._apply(fn, recurse)  # to the same device
        return super()._apply(fn, recurse)

    def forward(self, batched_inputs: list[dict]) -> dict[str, Tensor] | list[dict]:
        """As :class:`~detectors.detector.Detector`; the objectives' losses are among those."""
        if not self.training:
            return self.student(batched_inputs)
        student = self.student
        targets = student.prepare_targets(batched_inputs)
        self._clock.start_step(student.device)
        with torch.no_grad():
            teacher_view, teacher_predictions = self._view(self.teacher, batched_inputs)
        self._clock.stop_teacher()
        view, predictions = self._view(student, batched_inputs, targets)
        matches, teacher_matches = self._match(predictions, teacher_predictions, targets)
        losses = student.losses(predictions, targets, matches)
        context = DistillationContext(
            view,
            teacher_view,
            targets,
            matches.of_groups(slice(len(view.logits))),
            teacher_matches,
            lambda: self._group(view),
        )
        for objective in self.objectives:
            more = objective(context)
            if losses.keys() & more.keys():
                taken = min(losses.keys() & more.keys())
                raise UserError(f"two objectives return {taken}: one would hide the other")
            losses |= more
        self.metrics = self._measure(context)
        return losses

    def _view(
        self, detector: Detector, batched_inputs: list[dict], targets: Targets | None = None
    ) -> tuple[View, Predictions]:
        """Run a detector; its student branch's view and what all branches predict."""
        features, memory = encode(detector, detector.preprocess(batched_inputs), targets)
        return self._decode(detector, features, memory, detector.queries(memory, targets))

    def _decode(
        self, detector: Detector, features: FeatureMaps, memory: Memory, queries: Queries
    ) -> tuple[View, Predictions]:
        attention = self.new_maps() if self.attention_wanted else None
        output = detector.decode(memory, queries, attention)
        predictions = detector.predict(output)
        view = View(
            detector,
            features,
            memory.of_branch(STUDENT.name),
            _own_states(output),
            predictions.of_branch(0),
            None if attention is None else _own_attention(attention, output),
        )
        return view, predictions

    @staticmethod
    def new_maps() -> AttentionMaps:
        """What collects a decoder's attention maps: to be made later, so that none is kept."""
        return AttentionMaps(LateMaps(), LateMaps())

    def _group(self, view: View) -> View:
        """The teacher's queries in the student's decoder, on the student branch's memory."""
        with torch.no_grad():
            learned = self.teacher.learned_queries()
        learned = self.training_parts["queries"](learned)
        queries = self.student.start(learned, view.memory)
        return self._decode(self.student, view.features, view.memory, queries)[0]

    def _match(
        self, student: Predictions, teacher: Predictions, targets: Targets
    ) -> tuple[Matches, Matches]:
        """Match all groups of both with the ground truth, in one call if they have N in common."""
        match = self.student.criterion.match
        logits, boxes = student.logits.detach(), student.boxes.detach()
        if logits.shape[1:] != teacher.logits.shape[1:]:
            return match(logits, boxes, targets), match(teacher.logits, teacher.boxes, targets)
        matches = match(
            torch.cat([logits, teacher.logits]), torch.cat([boxes, teacher.boxes]), targets
        )
        return matches.of_groups(slice(len(logits))), matches.of_groups(slice(len(logits), None))

    def _measure(self, context: DistillationContext) -> dict[str, Tensor]:
        """What the log says beside the losses."""
        metrics = {"teacher_share": torch.tensor(self._clock.teacher_share)}
        for name, view, matches in (
            ("student", context.student, context.student_matches),
            ("teacher", context.teacher, context.teacher_matches),
        ):
            metrics[f"{name}_quality"] = detection_quality(view, matches, context.targets)
            batch, queries = view.logits.shape[1:3]
            for stage, value in enumerate(instability(matches, batch, queries).unbind()):
                metrics[f"{name}_instability_{stage}"] = value
        return metrics

    @torch.no_grad()
    def _prepare(self) -> None:
        """Let every objective see what both make of an image of noise."""
        training = self.student.training
        self.student.eval()
        image = torch.rand(3, 128, 128, device=self.student.device) * 255
        teacher, _ = self._view(self.teacher, [{"image": image}])
        student, _ = self._view(self.student, [{"image": image}])
        for objective in self.objectives:
            objective.prepare(student, teacher)
        self.student.train(training)


def _own_states(output: DecoderOutput) -> Tensor:
    """The student branch's states of queries that are no noised targets, (L, B, N, C)."""
    batch = output.states.shape[1] // len(output.branches)
    noised = 0 if output.denoising is None else output.denoising.count
    return output.states[:, :batch, noised:]


def _own_attention(attention: AttentionMaps, output: DecoderOutput) -> AttentionMaps:
    """The student branch's maps of queries that are no noised targets."""
    batch = output.states.shape[1] // len(output.branches)
    noised = 0 if output.denoising is None else output.denoising.count
    return AttentionMaps(
        [maps[:batch, :, noised:, noised:] for maps in attention.self_attention],
        [maps[:batch, :, noised:] for maps in attention.cross_attention],
        [
            (places[:batch, noised:], weights[:batch, noised:])
            for places, weights in attention.sampling
        ],
        [maps[:batch, :, noised:] for maps in attention.gaussian],
    )
