"""DAB-DETR (Liu et al., ICLR 2022): queries are boxes that every decoder layer refines."""

from __future__ import annotations

from dataclasses import replace

import torch
from detrex.layers import MLP, get_sine_pos_embed
from detrex.utils import inverse_sigmoid
from torch import Tensor, nn

from .conditional_detr import ConditionalDecoder
from .detr import SingleScaleDetector
from .heads import decode_boxes
from .structures import (
    AttentionMaps,
    DecoderOutput,
    EncoderContext,
    LearnedQueries,
    Memory,
    Queries,
    repeat_rows,
)
from .transformer import Encoder, EncoderLayer, Transformer


class DABEncoder(Encoder):
    """Encoder whose layers see position encodings that are scaled by the tokens' content.

    Args:
        layer: prototype, copied ``num_layers`` times.
        num_layers: at least one.
        checkpoint_layers: see :class:`~detectors.transformer.Encoder`.
    """

    def __init__(self, layer: EncoderLayer, num_layers: int = 6, checkpoint_layers: bool = False):
        super().__init__(layer, num_layers, checkpoint_layers)
        self.query_scale = MLP(self.embed_dim, self.embed_dim, self.embed_dim, 2)

    def layer_context(self, tokens: Tensor, context: EncoderContext) -> EncoderContext:
        """The context with positions as the layer's input ``tokens`` (R * B, S, C) scale them."""
        positions = repeat_rows(context.positions, tokens) * self.query_scale(tokens)
        return replace(context, positions=positions)


class DABDecoder(ConditionalDecoder):
    """Conditional decoder whose reference points are the centres of boxes (Sec. 4 of the paper).

    A layer's positional query is ``MLP(PE(x, y, w, h))`` of the current box (Eq. 3); its spatial
    query is the centre's sine embedding, scaled by content and, axis by axis, by ``w_ref / w`` and
    ``h_ref / h`` (Eq. 6), where the reference size is predicted from the content.

    Args:
        embed_dim: C.
        decoder: the other arguments of :class:`~detectors.conditional_detr.ConditionalDecoder`.
        modulate_hw_attn: scale the spatial attention by width and height.
    """

    bbox_embed: nn.Module
    """The box head, which the detector shares with its decoder."""

    def __init__(
        self, embed_dim: int = 256, *decoder, modulate_hw_attn: bool = True, **named_decoder
    ):
        super().__init__(embed_dim, *decoder, **named_decoder)
        self.modulate_hw_attn = modulate_hw_attn
        self.ref_point_head = MLP(2 * embed_dim, embed_dim, embed_dim, 2)
        if modulate_hw_attn:
            self.ref_anchor_head = MLP(embed_dim, embed_dim, 2, 2)

    def forward(
        self, queries: Queries, memory: Memory, attention: AttentionMaps | None = None
    ) -> DecoderOutput:
        """Decode all branches at once; ``queries.position`` are anchors' logits (B, N, 4).

        The references of a layer still depend on the box head in the layer before it, but no
        further: what goes on to the next layer is detached.
        """
        padding = self.padding(memory)
        references = [queries.position.sigmoid()]
        content, states = queries.content, []
        for index, layer in enumerate(self.layers):
            boxes = references[-1].detach() if index else references[-1]
            sine = get_sine_pos_embed(boxes, self.embed_dim // 2, self.temperature)
            positioned = Queries(content, self.ref_point_head(sine), queries.attention_mask)
            spatial = self._spatial_query(sine[..., : self.embed_dim], content, boxes, index == 0)
            inputs = content, positioned, spatial, memory, padding
            content = self.run_layer(layer, *inputs, attention=attention)
            states.append(self.post_norm_layer(content))
            if index < len(self.layers) - 1:
                references.append(self._refine(content, boxes))
        return DecoderOutput(
            torch.stack(states),
            torch.stack([repeat_rows(boxes, content) for boxes in references]),
            memory.branches,
            attention,
            queries.denoising,
        )

    def _spatial_query(
        self, sine: Tensor, content: Tensor, boxes: Tensor, first_layer: bool
    ) -> Tensor:
        """The centre's sine embedding (R * B, N, C), first half y, transformed by the content."""
        if not first_layer:  # whose content says nothing about scale yet
            sine = sine * self.query_scale(content)
        if not self.modulate_hw_attn:
            return sine
        ratio = self.ref_anchor_head(content).sigmoid() / boxes[..., 2:]  # (w, h)
        y_and_x = sine.unflatten(-1, (2, -1))
        return (y_and_x * ratio.flip(-1).unsqueeze(-1)).flatten(-2)

    def _refine(self, content: Tensor, boxes: Tensor) -> Tensor:
        """Boxes (R * B, N, 4) moved by the head; it sees content that is not post-normed."""
        with torch.autocast(content.device.type, enabled=False):
            return decode_boxes(self.bbox_embed(content.to(boxes.dtype)), boxes)


class DABTransformer(Transformer):
    """Encoder, decoder and the content that queries start with.

    Args:
        encoder: see :class:`~detectors.transformer.Transformer`.
        decoder: likewise.
        num_patterns: learned contents that every anchor is combined with (Anchor DETR); without
            them queries start empty.
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module, num_patterns: int = 0):
        super().__init__(encoder, decoder)
        if num_patterns < 0:
            raise ValueError(f"num_patterns is {num_patterns}, expected 0 or more")
        self.num_patterns = num_patterns
        if num_patterns:
            self.patterns = nn.Embedding(num_patterns, self.embed_dim)
            nn.init.xavier_uniform_(self.patterns.weight)


class DABDETR(SingleScaleDetector):
    """Single-scale detector whose queries are learned anchors; its decoder refines them.

    Args:
        num_queries: anchors. There are as many queries for each pattern of the transformer, those
            of the first pattern first.
        uniform_anchor_centers: centres start uniform in the image instead of around its middle.
            This is detrex's ``freeze_anchor_box_centers``, under which they are trained as well.
        detector: the arguments of :class:`~detectors.detr.SingleScaleDetector`, with a
            :class:`DABTransformer`.
    """

    def __init__(self, *, num_queries: int, uniform_anchor_centers: bool = True, **detector):
        super().__init__(**detector)
        self.transformer.decoder.bbox_embed = self.bbox_embed
        self.anchor_box_embed = nn.Embedding(num_queries, 4)
        if uniform_anchor_centers:
            with torch.no_grad():
                centers = self.anchor_box_embed.weight[:, :2]
                centers.copy_(inverse_sigmoid(torch.rand_like(centers)))

    def contents(self) -> Tensor:
        """What queries start with, (P, C): nothing, or each of the patterns."""
        transformer: DABTransformer = self.transformer  # type: ignore[assignment]
        if transformer.num_patterns:
            return transformer.patterns.weight
        return self.anchor_box_embed.weight.new_zeros(1, transformer.embed_dim)

    def learned_queries(self) -> LearnedQueries:
        """Every anchor with every content."""
        contents, anchors = self.contents(), self.anchor_box_embed.weight
        content = contents.repeat_interleave(len(anchors), dim=0)
        return LearnedQueries(content, anchors.repeat(len(contents), 1))
