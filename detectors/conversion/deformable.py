"""Layouts of the authors' releases of Deformable DETR and DN-Deformable DETR."""

from __future__ import annotations

from .layout import Layout, Rule, layers, modules
from .official import BACKBONE, FEED_FORWARD

# three maps of the backbone; what follows them is made of the last by the neck
NECK = {
    r"input_proj\.([0-2])\.0": r"neck.convs.\1.conv",
    r"input_proj\.([0-2])\.1": r"neck.convs.\1.norm",
    r"input_proj\.3\.0": "neck.extra_convs.0.conv",
    r"input_proj\.3\.1": "neck.extra_convs.0.norm",
}

_SHARED = (
    *BACKBONE,
    *modules(NECK),
    *layers(
        r"transformer\.encoder\.layers",
        "transformer.encoder.layers",
        {"self_attn": "attentions.0", "norm1": "norms.0", "norm2": "norms.1", **FEED_FORWARD},
    ),
    *layers(
        r"transformer\.decoder\.layers",
        "transformer.decoder.layers",
        {
            "self_attn": "attentions.0.attn",
            "cross_attn": "attentions.1",
            "norm2": "norms.0",  # after the self-attention, which comes first
            "norm1": "norms.1",
            "norm3": "norms.2",
            **FEED_FORWARD,
        },
    ),
    Rule(r"transformer\.level_embed", "transformer.level_embeds"),
    Rule(r"((transformer\.decoder\.)?(class_embed|bbox_embed)\..+)", r"\1"),
)

DEFORMABLE_DETR = Layout(
    name="deformable-detr",
    origin="fundamentalvision/Deformable-DETR",
    has=(r"transformer\.decoder\.layers\.0\.cross_attn\.sampling_offsets\.weight",),
    lacks=(r"refpoint_embed\.weight",),
    rules=(
        *_SHARED,
        Rule(r"query_embed\.weight", "query_embedding.weight"),
        Rule(r"(transformer\.(reference_points|enc_output|enc_output_norm)\..+)", r"\1"),
        Rule(r"(transformer\.(pos_trans|pos_trans_norm)\..+)", r"\1"),
    ),
)

DN_DEFORMABLE_DETR = Layout(
    name="dn-deformable-detr",
    origin="IDEA-Research/DN-DETR",
    has=(
        r"transformer\.decoder\.layers\.0\.cross_attn\.sampling_offsets\.weight",
        r"label_enc\.weight",
    ),
    rules=(
        *_SHARED,
        Rule(r"((tgt_embed|refpoint_embed)\.weight)", r"\1"),
        Rule(r"(transformer\.decoder\.(query_scale|ref_point_head)\..+)", r"\1"),
        Rule(r"label_enc\.weight", "denoising_generator.label_encoder.weight"),
    ),
)
