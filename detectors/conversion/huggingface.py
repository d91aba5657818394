"""Layouts of Hugging Face's transformers, as its models save themselves and its hub holds them."""

from __future__ import annotations

from .deformable import NECK
from .layout import Layout, Rule, joined, layers, modules
from .official import CROSS_ATTENTION, SELF_ATTENTION

_RESNET = r"model\.backbone\.conv_encoder\.model"

# with timm's ResNet the names are torchvision's, with their own they are these
BACKBONE = modules(
    {
        rf"{_RESNET}\.embedder\.embedder\.convolution": "backbone.body.conv1",
        rf"{_RESNET}\.embedder\.embedder\.normalization": "backbone.body.bn1",
        **{
            rf"{_RESNET}\.encoder\.stages\.{stage}\.layers\.(\d+)\.{theirs}": (
                rf"backbone.body.layer{stage + 1}.\1.{ours}"
            )
            for stage in range(4)
            for theirs, ours in {
                r"shortcut\.convolution": "downsample.0",
                r"shortcut\.normalization": "downsample.1",
                **{rf"layer\.{index}\.convolution": f"conv{index + 1}" for index in range(3)},
                **{rf"layer\.{index}\.normalization": f"bn{index + 1}" for index in range(3)},
            }.items()
        },
        rf"{_RESNET}\.(conv1|bn1|layer[1-4])": r"backbone.body.\1",
    }
)

FEED_FORWARD = {"fc1": "ffns.0.layers.0.0", "fc2": "ffns.0.layers.1"}

_ENCODER_LAYERS = r"model\.encoder\.layers", "transformer.encoder.layers"
_DECODER_LAYERS = r"model\.decoder\.layers", "transformer.decoder.layers"

ENCODER_NORMS = {"self_attn_layer_norm": "norms.0", "final_layer_norm": "norms.1"}

DECODER_NORMS = {
    "self_attn_layer_norm": "norms.0",
    "encoder_attn_layer_norm": "norms.1",
    "final_layer_norm": "norms.2",
}

ENCODER = (
    *joined(*_ENCODER_LAYERS, {"self_attn": "attentions.0.attn"}),
    *layers(
        *_ENCODER_LAYERS,
        {r"self_attn\.out_proj": "attentions.0.attn.out_proj", **ENCODER_NORMS, **FEED_FORWARD},
    ),
)

SINGLE_SCALE = (
    *BACKBONE,
    *ENCODER,
    *modules(
        {
            r"model\.input_projection": "input_proj",
            r"model\.decoder\.layernorm": "transformer.decoder.post_norm_layer",
            "class_labels_classifier": "class_embed",
            "bbox_predictor": "bbox_embed",
        }
    ),
    Rule(r"model\.query_position_embeddings\.weight", "query_embed.weight"),
)

HF_DETR = Layout(
    name="hf-detr",
    origin="transformers' DetrForObjectDetection",
    has=(
        r"model\.decoder\.layers\.0\.encoder_attn\.q_proj\.weight",
        r"class_labels_classifier\.weight",
    ),
    rules=(
        *SINGLE_SCALE,
        *joined(
            *_DECODER_LAYERS,
            {"self_attn": "attentions.0.attn", "encoder_attn": "attentions.1.attn"},
        ),
        *layers(
            *_DECODER_LAYERS,
            {
                r"self_attn\.out_proj": "attentions.0.attn.out_proj",
                r"encoder_attn\.out_proj": "attentions.1.attn.out_proj",
                **DECODER_NORMS,
                **FEED_FORWARD,
            },
        ),
    ),
)

HF_CONDITIONAL_DETR = Layout(
    name="hf-conditional-detr",
    origin="transformers' ConditionalDetrForObjectDetection",
    has=(r"model\.decoder\.layers\.0\.ca_qpos_sine_proj\.weight",),
    rules=(
        *SINGLE_SCALE,
        *layers(
            *_DECODER_LAYERS,
            {
                **SELF_ATTENTION,
                **CROSS_ATTENTION,
                r"self_attn\.out_proj": "attentions.0.out_proj",
                r"encoder_attn\.out_proj": "attentions.1.out_proj",
                **DECODER_NORMS,
                **FEED_FORWARD,
            },
        ),
        Rule(r"model\.(decoder\.(query_scale|ref_point_head)\..+)", r"transformer.\1"),
    ),
)

_CONTENT_AND_POSITION = (
    "query_content_proj",
    "query_pos_proj",
    "key_content_proj",
    "key_pos_proj",
    "value_proj",
)

HF_DAB_DETR = Layout(
    name="hf-dab-detr",
    origin="transformers' DabDetrForObjectDetection",
    has=(r"model\.query_refpoint_embeddings\.weight",),
    rules=(
        *SINGLE_SCALE,
        *layers(*_ENCODER_LAYERS, {"activation_fn": "ffns.0.activation"}),
        *layers(
            *_DECODER_LAYERS,
            {
                **{
                    rf"self_attn\.self_attn_{name}": f"attentions.0.{name}"
                    for name in _CONTENT_AND_POSITION
                },
                **{
                    rf"cross_attn\.cross_attn_{name}": f"attentions.1.{name}"
                    for name in (*_CONTENT_AND_POSITION, "query_pos_sine_proj")
                },
                r"self_attn\.self_attn\.output_proj": "attentions.0.out_proj",
                r"cross_attn\.cross_attn\.output_proj": "attentions.1.out_proj",
                r"self_attn\.self_attn_layer_norm": "norms.0",
                r"cross_attn\.cross_attn_layer_norm": "norms.1",
                r"mlp\.final_layer_norm": "norms.2",
                r"mlp\.activation_fn": "ffns.0.activation",
                **{rf"mlp\.{theirs}": ours for theirs, ours in FEED_FORWARD.items()},
            },
        ),
        *modules({"class_embed": "class_embed", r"model\.patterns": "transformer.patterns"}),
        Rule(r"model\.(encoder\.query_scale\..+)", r"transformer.\1"),
        Rule(
            r"model\.(decoder\.(query_scale|ref_point_head|ref_anchor_head|bbox_embed)\..+)",
            r"transformer.\1",
        ),
        Rule(r"model\.query_refpoint_embeddings\.weight", "anchor_box_embed.weight"),
    ),
)

HF_DEFORMABLE_DETR = Layout(
    name="hf-deformable-detr",
    origin="transformers' DeformableDetrForObjectDetection",
    has=(r"model\.decoder\.layers\.0\.encoder_attn\.sampling_offsets\.weight",),
    # version 5 has but one class head, also where the layers refine boxes
    tied=(Rule(r"class_embed\.\d+\.(weight|bias)", r"class_embed.0.\1"),),
    rules=(
        *BACKBONE,
        *modules({rf"model\.{theirs}": ours for theirs, ours in NECK.items()}),
        *layers(*_ENCODER_LAYERS, {"self_attn": "attentions.0", **ENCODER_NORMS, **FEED_FORWARD}),
        *joined(*_DECODER_LAYERS, {"self_attn": "attentions.0.attn"}),
        *layers(
            *_DECODER_LAYERS,
            {
                r"self_attn\.out_proj": "attentions.0.attn.out_proj",
                "encoder_attn": "attentions.1",
                **DECODER_NORMS,
                **FEED_FORWARD,
            },
        ),
        Rule(r"model\.level_embed", "transformer.level_embeds"),
        Rule(r"model\.query_position_embeddings\.weight", "query_embedding.weight"),
        Rule(r"model\.(reference_points\..+)", r"transformer.\1"),
        Rule(
            r"model\.((enc_output|enc_output_norm|pos_trans|pos_trans_norm)\..+)", r"transformer.\1"
        ),
        Rule(r"model\.(decoder\.(class_embed|bbox_embed)\..+)", r"transformer.\1"),
        Rule(r"((class_embed|bbox_embed)\..+)", r"\1"),
    ),
)
