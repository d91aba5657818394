"""AdaMixer (Gao et al., CVPR 2022): queries sample the backbone's maps and mix what they find."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from detectron2.structures import ImageList
from detrex.layers import box_cxcywh_to_xyxy
from torch import Tensor, nn

from .adamixer_layer import AdaMixerLayer, Pyramid, refine, to_boxes, whole_image
from .boxes import generalized_iou
from .criterion import SetCriterion, average_count
from .decoder import CheckpointLayers, Decoder
from .detector import Detector
from .heads import make_classes_rare, make_zero
from .structures import (
    STUDENT,
    AttentionMaps,
    DecoderOutput,
    FeatureMaps,
    LearnedQueries,
    Matches,
    Memory,
    Queries,
    Targets,
)
from .transformer import Transformer


class AdaMixerDecoder(Decoder):
    """Layers that move the queries' positions; each starts where the one before has left them.

    Args:
        embed_dim: C, a multiple of 4.
        num_heads: H, a divisor of C.
        feedforward_dim: hidden width of the feed-forward networks.
        num_layers: L, at least one.
        strides: of the V levels, in pixels.
        num_groups: G, a divisor of C: groups of channels with points of their own.
        in_points: P, points of a query and group.
        out_points: what mixing makes of them.
        checkpoint_layers: see :class:`~detectors.decoder.Decoder`.
    """

    def __init__(
        self,
        embed_dim: int = 256,
        num_heads: int = 8,
        feedforward_dim: int = 2048,
        num_layers: int = 6,
        strides: Sequence[int] = (4, 8, 16, 32),
        num_groups: int = 4,
        in_points: int = 32,
        out_points: int = 128,
        checkpoint_layers: CheckpointLayers = False,
    ):
        super().__init__(embed_dim, num_layers, checkpoint_layers)
        if embed_dim % num_groups:
            raise ValueError(f"num_groups {num_groups} does not divide embed_dim {embed_dim}")
        self.strides = tuple(strides)
        self.layers = self.stack(
            AdaMixerLayer(embed_dim, num_heads, feedforward_dim, num_groups, in_points, out_points)
            for _ in range(num_layers)
        )

    def forward(
        self,
        queries: Queries,
        memory: Memory,
        bbox_embed: nn.ModuleList,
        attention: AttentionMaps | None = None,
    ) -> DecoderOutput:
        """Decode all branches at once; the box heads, one a layer, move the positions."""
        if memory.image_sizes is None:
            raise ValueError("memory.image_sizes is None, AdaMixer's boxes are in pixels")
        content = memory.for_branches(queries.content)
        position = memory.for_branches(queries.position)
        pyramid = Pyramid(memory.tokens, memory.spatial_shapes, self.strides, position.dtype)
        states, positions = [], []
        for layer, head in zip(self.layers, bbox_embed, strict=True):
            inputs = content, position, pyramid, queries.attention_mask
            content = self.run_layer(layer, *inputs, attention=attention)
            states.append(content)
            positions.append(position)
            with torch.no_grad(), torch.autocast(content.device.type, enabled=False):
                position = refine(position, head(content.to(position.dtype)))
        return DecoderOutput(
            torch.stack(states),
            torch.stack(positions),
            memory.branches,
            attention,
            queries.denoising,
            image_sizes=memory.image_sizes,
        )


class NoEncoder(nn.Module):
    """Hands the neck's maps to the decoder as they are.

    Args:
        embed_dim: C.
    """

    def __init__(self, embed_dim: int = 256):
        super().__init__()
        self.embed_dim = embed_dim

    def forward(self, features: FeatureMaps, targets: Targets | None = None) -> Memory:
        """The levels' cells, one after the other."""
        tokens, positions = features.tokens(), features.token_positions()
        return Memory(
            tokens,
            features.token_padding(),
            positions,
            features.spatial_shapes,
            (STUDENT,),
            features.sizes(),
        )


class NoPositions(nn.Module):
    """Position encodings without channels, for detectors whose memory needs none."""

    def forward(self, mask: Tensor) -> Tensor:
        """Masks (B, H, W) to encodings (B, 0, H, W)."""
        return mask.new_zeros(mask.shape[0], 0, *mask.shape[1:])


class ChannelMapping(nn.Module):
    """One convolution per level, and a group normalisation that all levels share.

    Args:
        in_features: names of the V feature maps, from high to low resolution.
        in_channels: of each of them.
        out_channels: C, a multiple of ``num_groups``.
        num_groups: of the normalisation.
    """

    def __init__(
        self,
        in_features: Sequence[str],
        in_channels: Sequence[int],
        out_channels: int = 256,
        num_groups: int = 32,
    ):
        super().__init__()
        if len(in_features) != len(in_channels):
            raise ValueError(
                f"in_features names {len(in_features)} maps, in_channels has {len(in_channels)}"
            )
        self.in_features = list(in_features)
        self.lateral_convs = nn.ModuleList(
            nn.Conv2d(channels, out_channels, kernel_size=1) for channels in in_channels
        )
        self.norm = nn.GroupNorm(num_groups, out_channels)
        for conv in self.lateral_convs:
            nn.init.xavier_uniform_(conv.weight)  # type: ignore[arg-type]
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]

    def forward(self, features: dict[str, Tensor]) -> list[Tensor]:
        """Project V maps to (B, C, H, W) each, not yet normalised."""
        maps = [features[name] for name in self.in_features]
        return [conv(level) for conv, level in zip(self.lateral_convs, maps, strict=True)]

    def normalize(self, level: Tensor, sizes: Sequence[tuple[int, int]] | None = None) -> Tensor:
        """Normalise a level (B, C, H, W).

        Args:
            level: as :meth:`forward` returns it.
            sizes: per image the (h, w) that is not padding. Padding then has no part in the
                statistics and becomes zero. By default all cells are treated alike.
        """
        if sizes is None:
            return self.norm(level)
        height, width = level.shape[-2:]
        images = []
        for image, (h, w) in zip(level, sizes, strict=True):
            normal = self.norm(image[None, :, :h, :w])
            rest = 0, width - normal.shape[-1], 0, height - normal.shape[-2]
            images.append(F.pad(normal, rest))
        return torch.cat(images)


class CornerCriterion(SetCriterion):
    """Compares boxes by their corners, in matching and losses alike, and counts what is matched."""

    cost_epsilon = 1e-12
    area_epsilon: ClassVar[float] = 1e-12
    """Of the image's area, small enough that overlaps are those of boxes in pixels."""

    def compare(self, found: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """L1 distance of the corners and generalised IoU (...) of boxes (..., 4) cxcywh."""
        found, wanted = box_cxcywh_to_xyxy(found), box_cxcywh_to_xyxy(wanted)
        return (found - wanted).abs().sum(-1), generalized_iou(found, wanted, self.area_epsilon)

    def group_losses(
        self,
        logits: Tensor,
        boxes: Tensor,
        targets: Targets,
        matches: Matches,
        num_boxes: float,
    ) -> dict[str, Tensor]:
        """As in :class:`SetCriterion`, per matched query instead of per box."""
        matched = average_count(len(matches.images), logits.device)
        return super().group_losses(logits, boxes, targets, matches, matched)


class AdaMixer(Detector):
    """Multi-scale detector without encoder; all queries start from the whole image.

    Where the backbone has batch normalisation, its statistics stay fixed in training, while its
    weights learn.

    Args:
        neck: makes V maps of the transformer's width of the backbone's maps.
        embed_dim: C.
        num_queries: N.
        mask_padding_in_training: keep padded cells out of the neck's normalisation and of what is
            sampled in training too. The paper's weights are trained without. In evaluation padding
            is masked with ``mask_padding_at_inference``.
        detector: the arguments of :class:`~detectors.detector.Detector`; ``in_features`` are the
            neck's.
    """

    padding_options = ("mask_padding_in_training",)
    transformer: Transformer
    class_embed: nn.ModuleList
    bbox_embed: nn.ModuleList

    def __init__(
        self,
        *,
        neck: ChannelMapping,
        embed_dim: int,
        num_queries: int,
        mask_padding_in_training: bool = False,
        **detector,
    ):
        super().__init__(in_features=neck.in_features, position_embedding=NoPositions(), **detector)
        self.neck = neck
        self.mask_padding_in_training = mask_padding_in_training
        self.query_embed = nn.Embedding(num_queries, embed_dim)
        layers = range(len(self.decoder.layers))
        self.class_embed = nn.ModuleList(_class_head(embed_dim, self.num_classes) for _ in layers)
        self.bbox_embed = nn.ModuleList(_box_head(embed_dim) for _ in layers)
        self.train()

    @property
    def decoder(self) -> AdaMixerDecoder:
        """The transformer's decoder."""
        return self.transformer.decoder  # type: ignore[return-value]

    def train(self, mode: bool = True) -> AdaMixer:
        """Set the mode of all but the backbone's batch normalisation."""
        super().train(mode)
        for module in self.backbone.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def project(self, features: dict[str, Tensor]) -> list[Tensor]:
        """The neck's V maps before their normalisation."""
        return self.neck(features)

    def extract(self, images: ImageList) -> FeatureMaps:
        """Backbone, neck and padding masks."""
        features = super().extract(images)
        strides = self.decoder.strides
        if len(features.levels) != len(strides):
            raise ValueError(
                f"the neck gives {len(features.levels)} levels, "
                f"the decoder has {len(strides)} strides"
            )
        masked = features.padding_masks is not None
        if self.follows_training or not self.separate_at_inference:
            masked = masked and self.mask_padding_in_training
        levels = []
        for level, stride in zip(features.levels, strides, strict=True):
            cells = [(-(-h // stride), -(-w // stride)) for h, w in features.image_sizes]
            levels.append(self.neck.normalize(level, cells if masked else None))
        return dataclasses.replace(features, levels=tuple(levels))

    def learned_queries(self) -> LearnedQueries:
        """Contents; where they look depends on the image."""
        embedded = self.query_embed.weight
        content = F.layer_norm(embedded, embedded.shape[-1:])
        return LearnedQueries(content, content.new_zeros(len(content), 0))

    def start(self, learned: LearnedQueries, memory: Memory) -> Queries:
        """Queries for every image of the memory, all on the whole image."""
        if memory.image_sizes is None:
            raise ValueError("memory.image_sizes is None, AdaMixer's queries cover the image")
        whole = whole_image(memory.image_sizes)
        queries = super().start(learned, memory)
        position = whole[:, None].expand(-1, len(learned.content), -1)
        return dataclasses.replace(queries, position=position)

    def decode(
        self, memory: Memory, queries: Queries, attention: AttentionMaps | None = None
    ) -> DecoderOutput:
        """Run the decoder on all branches at once; ``attention`` collects its attention maps."""
        return self.decoder(queries, memory, self.bbox_embed, attention)

    def boxes(self, offsets: Tensor, output: DecoderOutput) -> Tensor:
        """Boxes (G, B, N, 4) at the moved positions, divided by the image's size."""
        references = output.group_references
        if references is None or output.image_sizes is None:
            raise ValueError("the output has no references or no image_sizes to start from")
        scale = output.image_sizes.flip(-1).repeat(1, 2)[:, None]
        return to_boxes(refine(references, offsets)) / scale


def _class_head(embed_dim: int, num_classes: int) -> nn.Sequential:
    """A head for which every class starts rare, as the focal loss wants it."""
    output = nn.Linear(embed_dim, num_classes)
    nn.init.xavier_uniform_(output.weight)
    make_classes_rare(output)
    return _head(embed_dim, output)


def _box_head(embed_dim: int) -> nn.Sequential:
    """A head that moves nothing at first."""
    output = nn.Linear(embed_dim, 4)
    make_zero(output)
    return _head(embed_dim, output)


def _head(embed_dim: int, output: nn.Linear) -> nn.Sequential:
    hidden = nn.Linear(embed_dim, embed_dim)
    nn.init.xavier_uniform_(hidden.weight)
    return nn.Sequential(hidden, nn.LayerNorm(embed_dim), nn.ReLU(), output)
