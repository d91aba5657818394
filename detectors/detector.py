"""The detector that all of the family share, its steps in the order in which data flows."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from detectron2.modeling import detector_postprocess
from detectron2.structures import Boxes, ImageList, Instances
from detrex.layers import box_cxcywh_to_xyxy, box_xyxy_to_cxcywh
from torch import Tensor, nn

from .backbone import fold_frozen_norms, laid_out
from .criterion import SetCriterion, average_num_boxes
from .heads import apply_heads, decode_boxes, split_denoised
from .padding import PaddingRules, no_padding, padding_of, resize_mask, stack_padded
from .structures import (
    STUDENT,
    AttentionMaps,
    Branch,
    DecoderOutput,
    FeatureMaps,
    Group,
    LearnedQueries,
    Matches,
    Memory,
    Predictions,
    Queries,
    Targets,
)
from .transformer import Transformer


class Detector(PaddingRules):
    """Images in; weighted losses (training) or instances (evaluation) out.

    A subclass says how backbone features become maps of the transformer's width (:meth:`project`)
    and what the queries are (:meth:`queries`), and owns the heads ``class_embed`` and
    ``bbox_embed``: one for all decoder layers, or a list with one for each.

    Args:
        backbone: maps images (B, 3, H, W) to a dict of feature maps.
        in_features: names of the backbone's maps that are used.
        position_embedding: maps padding masks (B, H, W) to encodings (B, C, H, W).
        transformer: holds ``encoder`` and ``decoder``.
        num_classes: K.
        criterion: matches and weighs; its ``weight_dict`` weighs the losses. A numbered name
            (``loss_class_0``) that it does not list has the weight of the plain one.
        aux_loss: supervise every decoder layer, not only the last.
        pixel_mean: per channel, in the data loader's channel order.
        pixel_std: per channel.
        select_box_nums_for_evaluation: detections kept per image with a focal-loss criterion;
            with cross entropy every query is one.
        mask_padding_at_inference: mask padded cells as training does. detrex does not, so that its
            results depend on the other images of a batch; False reproduces its numbers.
        separate_at_inference: let images of different sizes pass backbone and neck one by one where
            padding is masked: through convolutions and norms it would reach their cells. The
            detectors' authors mask it in the attention alone.
        size_divisibility: heights and widths are padded to multiples of it; 0 for no such rule.
    """

    pixel_mean: Tensor
    pixel_std: Tensor
    class_embed: nn.Module
    bbox_embed: nn.Module

    def __init__(
        self,
        *,
        backbone: nn.Module,
        in_features: Sequence[str],
        position_embedding: nn.Module,
        transformer: Transformer,
        num_classes: int,
        criterion: SetCriterion,
        aux_loss: bool = True,
        pixel_mean: Sequence[float] = (123.675, 116.280, 103.530),
        pixel_std: Sequence[float] = (58.395, 57.120, 57.375),
        select_box_nums_for_evaluation: int = 300,
        mask_padding_at_inference: bool = True,
        separate_at_inference: bool = True,
        size_divisibility: int = 0,
    ):
        super().__init__()
        if not isinstance(criterion, SetCriterion):
            found = f"{type(criterion).__module__}.{type(criterion).__name__}"
            raise TypeError(f"criterion is {found}, expected a detectors.criterion.SetCriterion")
        self.backbone = fold_frozen_norms(backbone)
        self.in_features = list(in_features)
        self.position_embedding = position_embedding
        self.transformer = transformer
        self.num_classes = num_classes
        self.criterion = criterion
        self.aux_loss = aux_loss
        self.select_box_nums_for_evaluation = select_box_nums_for_evaluation
        self.mask_padding_at_inference = mask_padding_at_inference
        self.separate_at_inference = separate_at_inference
        self.size_divisibility = size_divisibility
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(3, 1, 1), persistent=False)

    @property
    def device(self) -> torch.device:
        """Where the detector lives."""
        return self.pixel_mean.device

    def forward(self, batched_inputs: list[dict]) -> dict[str, Tensor] | list[dict]:
        """Run on detectron2's standard input.

        Args:
            batched_inputs: per image ``image`` (3, H, W), in training ``instances`` with
                ``gt_boxes`` and ``gt_classes``, in evaluation optionally the output ``height`` and
                ``width``.

        Returns:
            Training: weighted losses by name. Evaluation: ``{"instances": Instances}`` per image.
        """
        images = self.preprocess(batched_inputs)
        targets = self.prepare_targets(batched_inputs) if self.training else None
        features = self.extract(images)
        memory = self.encode(features, targets)
        output = self.decode(memory, self.queries(memory, targets))
        predictions = self.predict(output)
        if targets is not None:
            return self.losses(predictions, targets)
        return self.inference(predictions, images.image_sizes, batched_inputs)

    @property
    def branch_names(self) -> tuple[str, ...]:
        """The branches that there are where ground truth is given, the student first."""
        teachers = (getattr(module, "teacher_branches", ()) for module in self.modules())
        names = (branch.name for branches in teachers for branch in branches)
        return (STUDENT.name, *dict.fromkeys(names))

    def detect_branches(
        self, batched_inputs: list[dict], names: Sequence[str]
    ) -> dict[str, list[dict]]:
        """Detections of teachers, which see the ground truth, and of the student beside them.

        Args:
            batched_inputs: as in :meth:`forward`, with ``instances`` in evaluation too.
            names: of the branches, among :attr:`branch_names`; no other is decoded.

        Returns:
            By branch, what :meth:`forward` returns in evaluation.
        """
        images = self.preprocess(batched_inputs)
        targets = self.prepare_targets(batched_inputs)
        memory = self.encode(self.extract(images), targets)
        queries = self.queries(memory.of_branch(STUDENT.name))  # the same in all branches
        results = {}
        for name in names:
            predictions = self.predict(self.decode(memory.of_branch(name), queries))
            results[name] = self.inference(predictions, images.image_sizes, batched_inputs)
        return results

    def preprocess(self, batched_inputs: list[dict]) -> ImageList:
        """Normalise the images and pad them at the bottom and right with zeros."""
        for index, item in enumerate(batched_inputs):
            shape = tuple(item["image"].shape)
            if len(shape) != 3 or shape[0] != 3:
                raise ValueError(
                    f"image {index} of the batch has shape {shape}, expected (3, H, W)"
                )
        images = [
            (item["image"].to(self.device) - self.pixel_mean) / self.pixel_std
            for item in batched_inputs
        ]
        return self._stacked(images)

    def _stacked(self, images: list[Tensor]) -> ImageList:
        """Images (3, H, W), padded where they must be."""
        sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        divisor = max(self.size_divisibility, 1)
        whole = [height % divisor == 0 and width % divisor == 0 for height, width in sizes]
        if images and all(whole) and all(size == sizes[0] for size in sizes):
            # detectron2 would pad by nothing, to a size that torch.export then takes for unknown
            return ImageList(torch.stack(images).contiguous(), sizes)
        return ImageList.from_tensors(images, self.size_divisibility)

    def prepare_targets(self, batched_inputs: list[dict]) -> Targets:
        """Ground truth of every image on the detector's device."""
        targets = []
        for index, item in enumerate(batched_inputs):
            if "instances" not in item:
                raise ValueError(f"image {index} of the batch has no 'instances', its ground truth")
            instances = item["instances"]
            height, width = instances.image_size
            labels = instances.gt_classes
            boxes = instances.gt_boxes.tensor.to(self.pixel_mean.dtype)
            if labels.numel() and not 0 <= labels.min() <= labels.max() < self.num_classes:
                found = f"{int(labels.min())}..{int(labels.max())}"
                raise ValueError(
                    f"image {index} of the batch has gt_classes {found}, "
                    f"the detector has num_classes {self.num_classes}"
                )
            scale = boxes.new_tensor([width, height, width, height])
            target = {
                "labels": labels,
                "boxes": box_xyxy_to_cxcywh(boxes / scale),
                "boxes_xyxy": boxes,
            }
            targets.append({key: value.to(self.device) for key, value in target.items()})
        return targets

    def extract(self, images: ImageList) -> FeatureMaps:
        """Backbone, projection to the transformer's width, padding masks and positions."""
        padding = self._padding(images)
        if padding is None or self.follows_training or not self.separate_at_inference:
            levels, masks = self._levels(images, padding)
        else:
            levels, masks = self._levels_of_each(images)
        positions = tuple(
            self.position_embedding(mask).to(level.dtype)
            for mask, level in zip(masks, levels, strict=True)
        )
        return FeatureMaps(
            levels,
            None if padding is None else tuple(masks),
            positions,
            [(int(height), int(width)) for height, width in images.image_sizes],
            (images.tensor.shape[-2], images.tensor.shape[-1]),
        )

    def _levels(
        self, images: ImageList, padding: Tensor | None
    ) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        """V maps (B, C, H, W) and their padding masks (B, H, W)."""
        levels = tuple(self.project(self.backbone(laid_out(images.tensor))))
        masks = [
            no_padding(level) if padding is None else resize_mask(padding, level)
            for level in levels
        ]
        return levels, masks

    def _levels_of_each(self, images: ImageList) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        """The same, each image's as it is alone, then padded."""
        singles = [self._stacked([images[row]]) for row in range(len(images))]
        alone = [self._levels(single, self._padding(single)) for single in singles]
        levels = zip(*(levels for levels, _ in alone), strict=True)
        masks = zip(*(masks for _, masks in alone), strict=True)
        return tuple(stack_padded(x, 0.0) for x in levels), [stack_padded(x, True) for x in masks]

    def project(self, features: dict[str, Tensor]) -> list[Tensor]:
        """Backbone features to maps (B, C, H, W) of the transformer's width."""
        raise NotImplementedError

    def encode(self, features: FeatureMaps, targets: Targets | None = None) -> Memory:
        """Run the encoder; ``targets`` reach encoders that learn from ground truth."""
        return self.transformer.encoder(features, targets)

    def queries(self, memory: Memory, targets: Targets | None = None) -> Queries:
        """The queries that detect in every image; some learn from noised targets."""
        return self.start(self.learned_queries(), memory)

    def learned_queries(self) -> LearnedQueries:
        """The queries that detect, before any image is seen."""
        raise NotImplementedError(f"{type(self).__name__} learns no queries")

    def start(self, learned: LearnedQueries, memory: Memory) -> Queries:
        """Queries for every image of the memory; they need not be this detector's own."""
        images = memory.batch
        return Queries(
            learned.content.expand(images, -1, -1), learned.position.expand(images, -1, -1)
        )

    def decode(
        self, memory: Memory, queries: Queries, attention: AttentionMaps | None = None
    ) -> DecoderOutput:
        """Run the decoder on all branches at once; ``attention`` collects its attention maps."""
        return self.transformer.decoder(queries, memory, attention)

    def predict(self, output: DecoderOutput) -> Predictions:
        """Apply the heads to every group's decoder states; boxes start from the references."""
        with torch.autocast(output.states.device.type, enabled=False):
            states = output.of_groups(output.states)
            states = states.to(next(self.class_embed.parameters()).dtype)  # float32 in AMP
            boxes = self.boxes(apply_heads(self.bbox_embed, states, output.groups), output)
            logits = apply_heads(self.class_embed, states, output.groups)
        predictions = Predictions(logits, boxes, output.groups, proposals=output.proposals)
        return split_denoised(predictions, output.denoising)

    def boxes(self, offsets: Tensor, output: DecoderOutput) -> Tensor:
        """Boxes (G, B, N, 4) from what the box heads say about the references."""
        return decode_boxes(offsets, output.group_references)

    def losses(
        self, predictions: Predictions, targets: Targets, matches: Matches | None = None
    ) -> dict[str, Tensor]:
        """Weighted losses, named ``loss_<kind>[_dn | _enc][_<branch>][_<decoder layer>]``.

        Args:
            predictions: as :meth:`predict` returns them.
            targets: ground truth of the B images.
            matches: of all groups of predictions; None to find them.
        """
        num_boxes = average_num_boxes(targets, self.device)
        supervised = self._supervised(predictions)
        if matches is not None:
            matches = matches.of_groups(self._supervised_places(predictions.groups))
        losses = self._matched_losses("", supervised, targets, num_boxes, matches)
        if predictions.denoised is not None and predictions.denoising is not None:
            denoised, denoising = self._supervised(predictions.denoised), predictions.denoising
            parts = self.criterion.group_losses(
                denoised.logits,
                denoised.boxes,
                targets,
                denoising.matches.for_groups(len(denoised.groups)),
                num_boxes * denoising.groups,
            )
            losses |= self._weighted("_dn", parts, denoised.groups)
        if predictions.proposals is not None:  # for which every target is of the first class
            targets = [t | {"labels": torch.zeros_like(t["labels"])} for t in targets]
            losses |= self._matched_losses("_enc", predictions.proposals, targets, num_boxes)
        return losses

    def inference(
        self,
        predictions: Predictions,
        image_sizes: Sequence[tuple[int, int]],
        batched_inputs: list[dict],
    ) -> list[dict]:
        """Detections of the student's last layer, per image."""
        student = predictions.of_branch(0)
        scores, classes, boxes = self.select(student.logits[-1], student.boxes[-1])
        results = []
        for row, (size, item) in enumerate(zip(image_sizes, batched_inputs, strict=True)):
            height, width = int(size[0]), int(size[1])
            instances = Instances((height, width))
            instances.pred_boxes = Boxes(box_cxcywh_to_xyxy(boxes[row]))
            instances.pred_boxes.scale(scale_x=width, scale_y=height)
            instances.scores = scores[row]
            instances.pred_classes = classes[row]
            output_size = item.get("height", height), item.get("width", width)
            results.append({"instances": detector_postprocess(instances, *output_size)})
        return results

    def select(self, logits: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The detections among predictions (B, N, K) and (B, N, 4): scores, classes and boxes.

        The criterion knows what the logits mean. With focal loss the highest-scoring
        (query, class) pairs are detections, the best first. With cross entropy, where the last
        logit is the background's, every query is one, of its best class, in the queries' order.

        Returns:
            Scores (B, D), classes (B, D) and boxes (B, D, 4).
        """
        if self.criterion.loss_class_type == "ce_loss":
            scores, classes = logits.softmax(-1)[..., :-1].max(-1)
            return scores, classes, boxes
        scores = logits.sigmoid().flatten(1)
        kept = min(self.select_box_nums_for_evaluation, scores.shape[1])
        scores, indices = scores.topk(kept, dim=1)
        classes = indices % self.num_classes
        queries = torch.div(indices, self.num_classes, rounding_mode="floor")
        return scores, classes, boxes.gather(1, queries.unsqueeze(-1).expand(-1, -1, 4))

    def _padding(self, images: ImageList) -> Tensor | None:
        """Padding mask of the batch in pixels (B, H, W); None where there is nothing to mask."""
        padded = images.tensor.shape[-2:]
        if all(tuple(size) == tuple(padded) for size in images.image_sizes):
            return None
        if not self.follows_training and not self.mask_padding_at_inference:
            return None
        return padding_of(images)

    def _supervised(self, predictions: Predictions) -> Predictions:
        """Predictions of the groups that have losses."""
        if self.aux_loss:
            return predictions
        kept = self._supervised_places(predictions.groups)
        return Predictions(
            predictions.logits[kept],
            predictions.boxes[kept],
            tuple(predictions.groups[place] for place in kept),
        )

    def _supervised_places(self, groups: Sequence[Group]) -> list[int]:
        """Which of the groups have losses; found by number, as compilers cannot compare groups."""
        last = groups[-1].layer
        return [place for place, group in enumerate(groups) if self.aux_loss or group.layer == last]

    def _matched_losses(
        self,
        suffix: str,
        predictions: Predictions,
        targets: Targets,
        num_boxes: float,
        matches: Matches | None = None,
    ) -> dict[str, Tensor]:
        """Weighted losses of predictions whose targets are to be found, unless they are known."""
        logits, boxes = predictions.logits, predictions.boxes
        if matches is None:
            matches = self.criterion.match(logits, boxes, targets)
        parts = self.criterion.group_losses(logits, boxes, targets, matches, num_boxes)
        return self._weighted(suffix, parts, predictions.groups)

    def _weighted(
        self, suffix: str, parts: dict[str, Tensor], groups: Sequence[Group]
    ) -> dict[str, Tensor]:
        """Name and weigh the criterion's losses (G,)."""
        losses, last = {}, groups[-1].layer
        for kind, values in parts.items():
            for (branch, layer), value in zip(groups, values.unbind(), strict=True):
                name = kind + suffix + ("" if layer == last else f"_{layer}")
                weight = self.loss_weight(name) * branch.loss_weight
                losses[_branch_name(name, branch)] = value * weight
        return losses

    def loss_weight(self, name: str) -> float:
        """The criterion's weight of a loss, whose name ends with its layer's number or has none."""
        weights: dict[str, float] = self.criterion.weight_dict  # type: ignore[assignment]
        return weights.get(name, weights.get(re.sub(r"_\d+$", "", name), 1.0))


def _branch_name(loss: str, branch: Branch) -> str:
    """Put the branch before the number of the decoder layer: ``loss_class_share_v_0``."""
    if branch == STUDENT:
        return loss
    return re.sub(r"(_\d+)?$", lambda layer: f"_{branch.name}{layer.group()}", loss, count=1)
