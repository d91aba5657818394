"""Layout of the authors' release of AdaMixer, which is written on mmdetection."""

from __future__ import annotations

from .layout import Layout, Rule, layers, modules

_STAGES = r"roi_head\.bbox_head"

ADAMIXER = Layout(
    name="adamixer",
    origin="MCG-NJU/AdaMixer",
    has=(r"roi_head\.bbox_head\.0\.sampling_n_mixing\.sampling_offset_generator\.0\.weight",),
    rules=(
        Rule(r"backbone\.((conv1|bn1|layer[1-4])\..+)", r"backbone.body.\1"),
        *modules(
            {
                r"neck\.lateral_convs\.(\d+)\.conv": r"neck.lateral_convs.\1",
                r"neck\.gn_out": "neck.norm",
            }
        ),
        Rule(r"rpn_head\.init_content_features\.weight", "query_embed.weight"),
        Rule(r"rpn_head\.init_proposal_bboxes\.weight", None),  # the whole image, never trained
        Rule(_STAGES + r"\.(\d+)\.iof_tau", r"transformer.decoder.layers.\1.attention.iof_tau"),
        *layers(
            _STAGES,
            "transformer.decoder.layers",
            {
                r"attention\.attn": "attention.attn",
                "attention_norm": "attention_norm",
                r"sampling_n_mixing\.sampling_offset_generator\.0": "sampling_offsets",
                r"sampling_n_mixing\.adaptive_mixing\.parameter_generator\.0": (
                    "mixing.parameter_generator"
                ),
                r"sampling_n_mixing\.adaptive_mixing\.out_proj": "mixing.out_proj",
                r"sampling_n_mixing\.norm": "mixing_norm",
                "ffn": "ffn",
                "ffn_norm": "ffn_norm",
            },
        ),
        *layers(_STAGES, "class_embed", {r"cls_fcs\.0": "0", r"cls_fcs\.1": "1", "fc_cls": "3"}),
        *layers(_STAGES, "bbox_embed", {r"reg_fcs\.0": "0", r"reg_fcs\.1": "1", "fc_reg": "3"}),
    ),
)
