"""SMCA on one level, and on several."""

from __future__ import annotations

from dataclasses import replace

import torch
from detrex.modeling.neck import ChannelMapper
from torch import Tensor, nn

from detectors.detr import DETR
from detectors.heads import decode_boxes
from detectors.structures import DecoderOutput, FeatureMaps, Memory, Targets


class SMCA(DETR):
    """DETR whose queries look around centres; a plug for its decoder.

    Args:
        detector: the arguments of :class:`~detectors.detr.DETR`; the transformer's decoder is an
            :class:`~projects.smca.decoder.SMCADecoder`.
    """

    def encode(self, features: FeatureMaps, targets: Targets | None = None) -> Memory:
        """Run the encoder; centres need to know how large the images are."""
        return replace(super().encode(features, targets), image_sizes=features.sizes())

    def boxes(self, offsets: Tensor, output: DecoderOutput) -> Tensor:
        """Boxes (G, B, N, 4) around the initial centres, which may lie on the very border."""
        return decode_boxes(offsets, output.group_references, epsilon=1e-7)


class MultiScaleSMCA(SMCA):
    """SMCA on several levels.

    Args:
        neck: makes V maps of the transformer's width of the backbone's maps.
        embed_dim: C.
        level_embeddings: add a learned embedding of its level to every cell's position.
        detector: the other arguments of :class:`~detectors.detr.DETR`; ``in_features`` and
            ``in_channels`` are the neck's.
    """

    def __init__(
        self, *, neck: ChannelMapper, embed_dim: int, level_embeddings: bool = True, **detector
    ):
        super().__init__(
            in_features=neck.in_features, in_channels=None, embed_dim=embed_dim, **detector
        )
        self.neck = neck
        self.level_embeds: nn.Parameter | None = None
        if level_embeddings:
            strides: tuple[int, ...] = self.transformer.decoder.strides  # type: ignore[assignment]
            self.level_embeds = nn.Parameter(torch.randn(len(strides), embed_dim))

    def project(self, features: dict[str, Tensor]) -> list[Tensor]:
        """The neck's V maps."""
        return list(self.neck(features))

    def encode(self, features: FeatureMaps, targets: Targets | None = None) -> Memory:
        """Run the encoder on positions that know their level."""
        if self.level_embeds is not None:
            features = features.with_level_embeds(self.level_embeds)
        return super().encode(features, targets)
