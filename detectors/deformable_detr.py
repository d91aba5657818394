"""Deformable DETR (Zhu et al., ICLR 2021): attention at few sampled points of several levels."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from detrex.layers import MLP, get_sine_pos_embed
from detrex.modeling.neck import ChannelMapper
from torch import Tensor, nn

from .attention import QuerySelfAttention
from .decoder import CheckpointLayers, Decoder
from .deformable_attention import DeformableCrossAttention
from .detector import Detector
from .feed_forward import feed_forward
from .heads import decode_boxes, make_classes_rare, make_zero
from .structures import (
    STUDENT,
    AttentionMaps,
    DecoderOutput,
    FeatureMaps,
    Group,
    LearnedQueries,
    Memory,
    Predictions,
    Queries,
    Targets,
    repeat_rows,
)
from .transformer import Transformer


class DeformableDecoderLayer(nn.Module):
    """Post-norm layer: dense self-attention, deformable cross-attention, feed-forward."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_levels: int,
        num_points: int,
        attn_dropout: float,
        feedforward_dim: int,
        ffn_dropout: float,
        activation: nn.Module | None,
    ):
        super().__init__()
        self.attentions = nn.ModuleList(
            [
                QuerySelfAttention(embed_dim, num_heads, attn_dropout),
                DeformableCrossAttention(
                    embed_dim, num_heads, num_levels, num_points, attn_dropout
                ),
            ]
        )
        self.ffns = nn.ModuleList(
            [feed_forward(embed_dim, feedforward_dim, ffn_dropout, activation)]
        )
        self.norms = nn.ModuleList(nn.LayerNorm(embed_dim) for _ in range(3))

    def forward(
        self,
        content: Tensor,
        position: Tensor,
        references: Tensor,
        memory: Memory,
        padding_mask: Tensor | None,
        attention_mask: Tensor | None = None,
        attention: AttentionMaps | None = None,
    ) -> Tensor:
        """Content (B or R * B, N, C) to (R * B, N, C).

        Args:
            content: (B or R * B, N, C).
            position: (B or R * B, N, C).
            references: (B or R * B, N, V, 2 or 4) in the padded coordinates of every level.
            memory: what is sampled.
            padding_mask: (R * B, S), True on padding.
            attention_mask: (N, N), True where attending is forbidden.
            attention: collects attention weights and sampling locations.
        """
        self_maps = None if attention is None else attention.self_attention
        sampling = None if attention is None else attention.sampling
        self_attention, cross_attention = self.attentions
        content = self.norms[0](self_attention(content, position, attention_mask, self_maps))
        content = cross_attention(content, position, references, memory, padding_mask, sampling)
        return self.norms[2](self.ffns[0](self.norms[1](content)))


class DeformableDecoder(Decoder):
    """Decoder that samples around reference points or boxes, refined by every layer or kept.

    Args:
        embed_dim: C.
        num_heads: H, a divisor of C.
        attn_dropout: on the weights of the self-attention, on the output of the cross-attention.
        feedforward_dim: hidden width of the feed-forward networks.
        ffn_dropout: dropout of the feed-forward networks.
        activation: of the feed-forward networks; each layer owns a copy.
        num_layers: L, at least one.
        num_levels: V.
        num_points: P, sampling points per head and level.
        checkpoint_layers: see :class:`~detectors.decoder.Decoder`.
    """

    bbox_embed: nn.ModuleList | None
    """The detector's box heads if the layers refine the references."""

    def __init__(
        self,
        embed_dim: int = 256,
        num_heads: int = 8,
        attn_dropout: float = 0.1,
        feedforward_dim: int = 1024,
        ffn_dropout: float = 0.1,
        activation: nn.Module | None = None,
        num_layers: int = 6,
        num_levels: int = 4,
        num_points: int = 4,
        checkpoint_layers: CheckpointLayers = False,
    ):
        super().__init__(embed_dim, num_layers, checkpoint_layers)
        self.layers = self.stack(
            DeformableDecoderLayer(
                embed_dim, num_heads, num_levels, num_points, attn_dropout, feedforward_dim,
                ffn_dropout, activation,
            )
            for _ in range(num_layers)
        )  # fmt: skip
        self.bbox_embed = None

    def forward(
        self, queries: Queries, memory: Memory, attention: AttentionMaps | None = None
    ) -> DecoderOutput:
        """Decode all branches at once, from ``queries.references`` on."""
        if queries.references is None:
            raise ValueError("queries.references is None, a deformable decoder starts from them")
        padding = memory.padding_mask
        if padding is not None:
            padding = memory.for_branches(padding)
        ratios = memory.grid.valid_ratios.repeat(1, 1, 2)[:, None]
        references = [queries.references]
        content, states = queries.content, []
        for index, layer in enumerate(self.layers):
            current = references[-1]
            on_levels = current[:, :, None] * repeat_rows(ratios, current)[..., : current.shape[-1]]
            position = self.query_position(index, content, queries, current, on_levels)
            inputs = content, position, on_levels, memory, padding, queries.attention_mask
            content = self.run_layer(layer, *inputs, attention=attention)
            states.append(content)
            if self.bbox_embed is not None and index < len(self.layers) - 1:
                references.append(self._refine(self.bbox_embed[index], content, current))
        return DecoderOutput(
            torch.stack(states),
            _stack_references(references),
            memory.branches,
            attention,
            queries.denoising,
            queries.proposals,
        )

    def query_position(
        self,
        index: int,
        content: Tensor,
        queries: Queries,
        references: Tensor,
        on_levels: Tensor,
    ) -> Tensor:
        """Position embedding (B or R * B, N, C) of the queries in a layer: the same in all.

        Args:
            index: of the layer.
            content: (B or R * B, N, C).
            queries: what the decoder started with.
            references: (B or R * B, N, 2 or 4) in the unpadded image.
            on_levels: (B or R * B, N, V, 2 or 4), the same in the padded coordinates of every
                level.
        """
        return queries.position

    @staticmethod
    def _refine(head: nn.Module, content: Tensor, references: Tensor) -> Tensor:
        """Boxes (R * B, N, 4) of a layer; no gradient goes through them to the layers before."""
        with torch.no_grad(), torch.autocast(content.device.type, enabled=False):
            return decode_boxes(head(content.to(references.dtype)), references)


def _stack_references(references: list[Tensor]) -> Tensor:
    """(L, R * B, N, 2 or 4), or (1, B, N, 2 or 4) if there is one for all layers.

    A point among boxes is one that lets the sizes start from 0.5.
    """
    last = references[-1]
    padded = [F.pad(r, (0, last.shape[-1] - r.shape[-1]), value=0.5) for r in references]
    return torch.stack([repeat_rows(r, last) for r in padded])


class MultiLevelTransformer(Transformer):
    """Encoder and decoder, and what tells the levels apart.

    Args:
        encoder: see :class:`~detectors.transformer.Transformer`.
        decoder: likewise.
        num_levels: V.
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module, num_levels: int = 4):
        super().__init__(encoder, decoder)
        self.level_embeds = nn.Parameter(torch.randn(num_levels, self.embed_dim))


class DeformableTransformer(MultiLevelTransformer):
    """Adds what makes the first references: of learned positions, or of the encoder's output.

    Args:
        encoder: see :class:`~detectors.transformer.Transformer`.
        decoder: likewise.
        num_levels: V.
        as_two_stage: whether the queries come from the encoder's output.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        num_levels: int = 4,
        as_two_stage: bool = False,
    ):
        super().__init__(encoder, decoder, num_levels)
        self.as_two_stage = as_two_stage
        channels = self.embed_dim
        if as_two_stage:
            self.enc_output = nn.Linear(channels, channels)
            self.enc_output_norm = nn.LayerNorm(channels)
            self.pos_trans = nn.Linear(2 * channels, 2 * channels)
            self.pos_trans_norm = nn.LayerNorm(2 * channels)
            for layer in (self.enc_output, self.pos_trans):
                nn.init.xavier_uniform_(layer.weight)
        else:
            self.reference_points = nn.Linear(channels, 2)
            nn.init.xavier_normal_(self.reference_points.weight)
            nn.init.zeros_(self.reference_points.bias)

    def locate(self, position: Tensor) -> Tensor:
        """Reference points (B, N, 2) of position embeddings (B, N, C)."""
        with torch.autocast(position.device.type, enabled=False):
            return self.reference_points(position).sigmoid()

    def candidates(self, memory: Memory) -> tuple[Tensor, Tensor]:
        """Tokens of the student that may become queries, and their boxes' logits.

        A cell of level v starts from a box around it with sides 0.05 * 2^v. Cells on the border or
        in the padding are no candidates: their tokens are those of nothing, their logits infinite.

        Returns:
            (B, S, C) and (B, S, 4).
        """
        centers = memory.grid.centers
        sides = [
            centers.new_full((height * width, 2), 0.05 * 2.0**level)
            for level, (height, width) in enumerate(memory.spatial_shapes)
        ]
        boxes = torch.cat([centers, torch.cat(sides).expand_as(centers)], dim=-1)
        inside = ((boxes > 0.01) & (boxes < 0.99)).all(-1, keepdim=True)
        logits = torch.where(inside, boxes.logit(), math.inf)
        tokens = memory.tokens[: memory.batch].masked_fill(~inside, 0)
        return self.enc_output_norm(self.enc_output(tokens)), logits

    def embed_boxes(self, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Content and position (B, N, C) of queries that start from boxes (B, N, 4)."""
        sine = get_sine_pos_embed(boxes, self.embed_dim // 2, exchange_xy=False)
        position, content = self.pos_trans_norm(self.pos_trans(sine)).chunk(2, dim=-1)
        return content, position


class DeformableDetector(Detector):
    """What deformable detectors have in common: the neck, level embeddings and heads in lists.

    Args:
        neck: makes V maps of the transformer's width of the backbone's maps.
        embed_dim: C.
        with_box_refine: every layer has its own heads and refines the references for the next one;
            otherwise all share the heads, which are listed once for each.
        as_two_stage: the lists have one more head, which finds objects in the encoder's output.
        detector: the arguments of :class:`~detectors.detector.Detector`; ``in_features`` are the
            neck's.
    """

    transformer: MultiLevelTransformer
    class_embed: nn.ModuleList
    bbox_embed: nn.ModuleList

    def __init__(
        self,
        *,
        neck: ChannelMapper,
        embed_dim: int,
        with_box_refine: bool = False,
        as_two_stage: bool = False,
        **detector,
    ):
        super().__init__(in_features=neck.in_features, **detector)
        if as_two_stage and not with_box_refine:
            raise ValueError("as_two_stage needs with_box_refine, whose heads it uses")
        self.neck = neck
        for module in neck.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        decoder: DeformableDecoder = self.transformer.decoder  # type: ignore[assignment]
        class_embed, bbox_embed = _new_heads(embed_dim, self.num_classes)
        count = len(decoder.layers) + as_two_stage
        copied = copy.deepcopy if with_box_refine else lambda head: head
        self.class_embed = nn.ModuleList(copied(class_embed) for _ in range(count))
        self.bbox_embed = nn.ModuleList(copied(bbox_embed) for _ in range(count))
        if not as_two_stage:  # whose first boxes have a size already
            first: MLP = self.bbox_embed[0]  # type: ignore[assignment]
            nn.init.constant_(first.layers[-1].bias[2:], -2.0)  # type: ignore[index, arg-type]
        if with_box_refine:
            decoder.bbox_embed = self.bbox_embed
        if as_two_stage:
            decoder.class_embed = self.class_embed  # only for the names in the state dict

    def project(self, features: dict[str, Tensor]) -> list[Tensor]:
        """The neck's V maps."""
        return list(self.neck(features))

    def encode(self, features: FeatureMaps, targets: Targets | None = None) -> Memory:
        """Run the encoder on positions that know their level."""
        features = features.with_level_embeds(self.transformer.level_embeds)
        return super().encode(features, targets)


def _new_heads(embed_dim: int, num_classes: int) -> tuple[nn.Linear, MLP]:
    """A class head for which every class is rare and a box head that moves nothing."""
    class_embed = nn.Linear(embed_dim, num_classes)
    bbox_embed = MLP(embed_dim, embed_dim, 4, 3)
    make_classes_rare(class_embed)
    make_zero(bbox_embed.layers[-1])
    return class_embed, bbox_embed


class DeformableDETR(DeformableDetector):
    """Multi-scale detector with learned queries or, in two stages, queries of the encoder's output.

    Args:
        num_queries: N.
        as_two_stage: needs a transformer that is built for it, and ``with_box_refine``.
        detector: the arguments of :class:`DeformableDetector`.
    """

    transformer: DeformableTransformer

    def __init__(self, *, num_queries: int, as_two_stage: bool = False, **detector):
        super().__init__(as_two_stage=as_two_stage, **detector)
        if self.transformer.as_two_stage != as_two_stage:
            raise ValueError(
                f"as_two_stage is {as_two_stage} in the detector, "
                f"{self.transformer.as_two_stage} in its transformer"
            )
        self.num_queries = num_queries
        self.as_two_stage = as_two_stage
        if not as_two_stage:
            self.query_embedding = nn.Embedding(num_queries, 2 * self.transformer.embed_dim)

    def queries(self, memory: Memory, targets: Targets | None = None) -> Queries:
        """Learned positions and content, or those of the best proposals."""
        return self._propose(memory) if self.as_two_stage else super().queries(memory)

    def learned_queries(self) -> LearnedQueries:
        """Positions and contents."""
        if self.as_two_stage:
            raise ValueError("DeformableDETR has as_two_stage, its queries are not learned")
        position, content = self.query_embedding.weight.chunk(2, dim=-1)
        return LearnedQueries(content, position)

    def start(self, learned: LearnedQueries, memory: Memory) -> Queries:
        """Queries for every image of the memory, with the reference points of their positions."""
        queries = super().start(learned, memory)
        return replace(queries, references=self.transformer.locate(queries.position))

    def _propose(self, memory: Memory) -> Queries:
        """Queries that start from the encoder's detections with the highest first class."""
        tokens, start = self.transformer.candidates(memory)
        with torch.autocast(tokens.device.type, enabled=False):
            tokens = tokens.to(next(self.class_embed.parameters()).dtype)  # float32 in AMP
            logits = self.class_embed[-1](tokens)
            boxes = (self.bbox_embed[-1](tokens) + start).sigmoid()
        scores = logits[..., 0]
        if memory.padding_mask is not None and not self.follows_training:
            # else padding, which depends on the other images, could displace border cells
            scores = scores.masked_fill(memory.padding_mask, -math.inf)
        best = scores.topk(min(self.num_queries, scores.shape[1]), dim=1).indices
        references = boxes.detach().gather(1, best.unsqueeze(-1).expand(-1, -1, 4))
        content, position = self.transformer.embed_boxes(references)
        proposals = Predictions(logits[None], boxes[None], (Group(STUDENT, 0),))
        return Queries(content, position, references=references, proposals=proposals)
