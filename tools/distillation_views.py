"""What a distillation sees in one image: who teaches whom, where, and who attends to what."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from detectron2.structures import Boxes, Instances
from detrex.layers import box_cxcywh_to_xyxy
from torch import Tensor, nn

from detectors.structures import AttentionMaps
from engine.errors import UserError
from projects.detr_distill import context as distill
from projects.detr_distill.distiller import Distiller
from projects.detr_distill.features import Place, feature_maps
from projects.detr_distill.objective import Objective
from projects.detr_distill.queries import QueryAdapter
from projects.detr_distill.target_aware import cosine_masks, detection_weights
from tools.attention_views import Cells, View, best_classes, cells_of


class Watch(Objective):
    """Keeps the context instead of giving losses."""

    needs_attention = True
    context: distill.DistillationContext

    def forward(self, context: distill.DistillationContext) -> dict[str, Tensor]:
        """No losses."""
        self.context = context
        return {}


@dataclass(frozen=True)
class Observation:
    """One image under teacher and student, both as in an evaluation.

    Attributes:
        context: of a batch of one.
        cells: where the cells of the teacher's maps lie.
        has_group: whether the teacher's queries can be the student's.
    """

    context: distill.DistillationContext
    cells: Cells
    has_group: bool

    def stage(self, layer: int) -> int:
        """The teacher's decoder layer for one of the student's."""
        return self.context.stages()[layer]

    def pairs(self, layer: int, count: int) -> list[tuple[int, int]]:
        """(student, teacher) queries matched in a layer, the teacher's best detections first."""
        pairs, teacher = self.context.pairs, self.context.teacher
        stage = self.stage(layer)
        scores, _ = best_classes(teacher.detector, teacher.logits[stage], teacher.boxes[stage])
        order = scores[0][pairs.teacher[layer]].argsort(descending=True, stable=True)[:count]
        chosen = (pairs.student[layer][order], pairs.teacher[layer][order])
        return list(zip(*(part.tolist() for part in chosen), strict=True))

    def view(self, seen: distill.View, layer: int) -> View:
        """What the queries of a detector, or the group, attend to and find in a layer."""
        detector, attention = seen.detector, seen.attention
        assert attention is not None  # Watch.needs_attention
        cells = self.cells if seen is self.context.teacher else self._own_cells(seen)
        scores, classes = best_classes(detector, seen.logits[layer], seen.boxes[layer])
        height, width = cells.size
        corners = box_cxcywh_to_xyxy(seen.boxes[layer, 0])
        view = View(
            cells,
            scores[0],
            classes[0],
            corners * corners.new_tensor([width, height, width, height]),
            attention.self_attention[layer][0],
        )
        if attention.cross_attention:
            view = replace(view, cross=attention.cross_attention[layer][0])
        elif attention.sampling:
            locations, weights = (part[0] for part in attention.sampling[layer])
            view = replace(view, points=cells.to_pixels(locations), weights=weights)
        return view

    def masks(self, place: Place, queries: int) -> tuple[Tensor, list[int]]:
        """Selection masks of target-aware distillation in the teacher's last decoder layer.

        Args:
            place: where the features are taken from.
            queries: how many of the queries that weigh most also get a mask of their own.

        Returns:
            Masks (V, 1 + queries, h, w) in [0, 1] at the image's pixels, the quality-weighted one
            first; and which queries the others are of.

        Raises:
            UserError: the features have other channels than the queries.
        """
        teacher = self.context.teacher
        last = [len(teacher.logits) - 1]
        quality = detection_weights(self.context, last, max_detections=100)
        best = quality[0, 0].argsort(descending=True, stable=True)[:queries]
        alone = torch.zeros(len(best), 1, quality.shape[-1], device=quality.device)
        alone[torch.arange(len(best)), 0, best] = 1
        weights = torch.cat([quality, alone])
        states = teacher.states[last].float().expand(len(weights), -1, -1, -1)
        levels = []
        for features in feature_maps(teacher, place):
            if features.shape[1] != states.shape[-1]:
                raise UserError(
                    f"the teacher's maps at '{place}' have {features.shape[1]} channels, "
                    f"its queries {states.shape[-1]}"
                )
            levels.append(cosine_masks(states, weights, features.float().flatten(2))[:, 0])
        pictures = self.cells.pictures(self.cells.maps(torch.cat(levels, dim=-1)))
        return pictures, best.tolist()

    def _own_cells(self, seen: distill.View) -> Cells:
        height, width = self.cells.size
        images = seen.detector.preprocess([{"image": torch.zeros(3, height, width)}])
        return next(cells_of(seen.detector, images, seen.memory))


def make_watched(model: Distiller) -> Distiller:
    """Turn a distillation into one that gives no losses, in evaluation mode, to be observed."""
    model.training_parts["objectives"] = nn.ModuleList([Watch()])
    model.attention_wanted = True
    model.new_maps = AttentionMaps  # type: ignore[method-assign, assignment]
    if "queries" not in model.training_parts:
        with suppress(UserError):  # of different kinds: there is no group to be shown
            model.training_parts["queries"] = QueryAdapter(model.student, model.teacher)
    return model.eval()


@torch.no_grad()
def observe(model: Distiller, item: dict) -> Observation:
    """Look at one image.

    Args:
        model: of :func:`make_watched`.
        item: as a detector takes it; without ``instances`` it counts as an image without objects.
    """
    height, width = item["image"].shape[-2:]
    if "instances" not in item:
        nothing = Instances((height, width), gt_boxes=Boxes(torch.zeros(0, 4)))
        nothing.gt_classes = torch.zeros(0, dtype=torch.long)
        item = item | {"instances": nothing}
    model.training = True  # of the distillation itself, not of its detectors
    model([item])
    model.training = False
    (watch,) = model.objectives
    context: distill.DistillationContext = watch.context  # type: ignore[assignment]
    teacher = context.teacher
    images = teacher.detector.preprocess([item])
    cells = next(cells_of(teacher.detector, images, teacher.memory))
    has_group = "queries" in model.training_parts
    if has_group:
        _ = context.group  # made here, without gradients
    return Observation(context, cells, has_group)
