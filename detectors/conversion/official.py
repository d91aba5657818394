"""Layouts of the authors' releases of DETR, Conditional DETR, DAB-DETR and DN-DETR."""

from __future__ import annotations

from .layout import Layout, Rule, layers, modules

BACKBONE = modules({r"backbone\.0\.body": "backbone.body"})

FEED_FORWARD = {"linear1": "ffns.0.layers.0.0", "linear2": "ffns.0.layers.1"}

PRELU = {"activation": "ffns.0.activation"}

ENCODER = layers(
    r"transformer\.encoder\.layers",
    "transformer.encoder.layers",
    {"self_attn": "attentions.0.attn", "norm1": "norms.0", "norm2": "norms.1", **FEED_FORWARD},
)

DECODER_NORMS = {"norm1": "norms.0", "norm2": "norms.1", "norm3": "norms.2"}

# what every projection of the separate content and position is called
SELF_ATTENTION = {
    "sa_qcontent_proj": "attentions.0.query_content_proj",
    "sa_qpos_proj": "attentions.0.query_pos_proj",
    "sa_kcontent_proj": "attentions.0.key_content_proj",
    "sa_kpos_proj": "attentions.0.key_pos_proj",
    "sa_v_proj": "attentions.0.value_proj",
}
CROSS_ATTENTION = {
    "ca_qcontent_proj": "attentions.1.query_content_proj",
    "ca_qpos_proj": "attentions.1.query_pos_proj",
    "ca_qpos_sine_proj": "attentions.1.query_pos_sine_proj",
    "ca_kcontent_proj": "attentions.1.key_content_proj",
    "ca_kpos_proj": "attentions.1.key_pos_proj",
    "ca_v_proj": "attentions.1.value_proj",
}

CONDITIONAL_DECODER = layers(
    r"transformer\.decoder\.layers",
    "transformer.decoder.layers",
    {
        **SELF_ATTENTION,
        **CROSS_ATTENTION,
        r"self_attn\.out_proj": "attentions.0.out_proj",
        r"cross_attn\.out_proj": "attentions.1.out_proj",
        **DECODER_NORMS,
        **FEED_FORWARD,
    },
)

SINGLE_SCALE = (
    *BACKBONE,
    *ENCODER,
    *modules({r"transformer\.decoder\.norm": "transformer.decoder.post_norm_layer"}),
    Rule(r"((input_proj|class_embed|bbox_embed)\..+)", r"\1"),
)

DETR = Layout(
    name="detr",
    origin="facebookresearch/detr",
    has=(r"transformer\.decoder\.layers\.0\.multihead_attn\.in_proj_weight",),
    lacks=(r"transformer\.decoder\.layers\.0\.point1\..+",),  # SMCA's centres
    rules=(
        *SINGLE_SCALE,
        *layers(
            r"transformer\.decoder\.layers",
            "transformer.decoder.layers",
            {
                "self_attn": "attentions.0.attn",
                "multihead_attn": "attentions.1.attn",
                **DECODER_NORMS,
                **FEED_FORWARD,
            },
        ),
        Rule(r"query_embed\.weight", "query_embed.weight"),
    ),
)

CONDITIONAL_DETR = Layout(
    name="conditional-detr",
    origin="Atten4Vis/ConditionalDETR",
    has=(r"transformer\.decoder\.layers\.0\.ca_qpos_sine_proj\.weight", r"query_embed\.weight"),
    rules=(
        *SINGLE_SCALE,
        *CONDITIONAL_DECODER,
        Rule(r"(transformer\.decoder\.(query_scale|ref_point_head)\..+)", r"\1"),
        Rule(r"query_embed\.weight", "query_embed.weight"),
    ),
)

_DAB_RULES = (
    *SINGLE_SCALE,
    *CONDITIONAL_DECODER,
    *layers(r"transformer\.encoder\.layers", "transformer.encoder.layers", PRELU),
    *layers(r"transformer\.decoder\.layers", "transformer.decoder.layers", PRELU),
    Rule(r"(transformer\.encoder\.query_scale\..+)", r"\1"),
    Rule(
        r"(transformer\.decoder\.(query_scale|ref_point_head|ref_anchor_head|bbox_embed)\..+)",
        r"\1",
    ),
    Rule(r"refpoint_embed\.weight", "anchor_box_embed.weight"),
)

DAB_DETR = Layout(
    name="dab-detr",
    origin="IDEA-Research/DAB-DETR",
    has=(r"transformer\.decoder\.layers\.0\.ca_qpos_sine_proj\.weight", r"refpoint_embed\.weight"),
    lacks=(r"label_enc\.weight",),
    rules=(*_DAB_RULES, Rule(r"(transformer\.patterns\.weight)", r"\1")),
)

DN_DETR = Layout(
    name="dn-detr",
    origin="IDEA-Research/DN-DETR",
    has=(r"transformer\.decoder\.layers\.0\.ca_qpos_sine_proj\.weight", r"label_enc\.weight"),
    rules=(
        *_DAB_RULES,
        Rule(r"label_enc\.weight", "denoising_generator.label_encoder.weight"),
    ),
)
