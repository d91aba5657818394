"""Tiny deformable detectors for tests."""

import json

import torch
from detectron2.config import LazyConfig, instantiate
from detrex.layers import PositionEmbeddingSine, ShapeSpec
from detrex.modeling import HungarianMatcher
from detrex.modeling.neck import ChannelMapper
from tiny_detectors import ROOT, StubBackbone, pattern_image
from torch import nn

from detectors.criterion import SetCriterion
from detectors.deformable_attention import DeformableSelfAttention
from detectors.deformable_detr import (
    DeformableDecoder,
    DeformableDETR,
    DeformableTransformer,
)
from detectors.transformer import Encoder, EncoderLayer

SETTINGS = {
    "embed_dim": 32,
    "num_heads": 4,
    "feedforward_dim": 48,
    "num_encoder_layers": 2,
    "num_decoder_layers": 3,
    "num_classes": 5,
    "num_queries": 6,
    "c3": 4,
    "c4": 6,
    "c5": 8,
    "gn_groups": 4,
    "select_box_nums_for_evaluation": 10,
    "weight_base": {"loss_class": 1.0, "loss_bbox": 5.0, "loss_giou": 2.0},
}
SUFFIXES = ("", "_enc", "_dn")
"""Of the losses that share a weight: those of queries, proposals and noised targets."""


class PyramidBackbone(nn.Module):
    """Average pooling by 8, 16 and 32 that keeps padded cells exactly zero."""

    def forward(self, images):
        features = {}
        for name, stride, channels in (("res3", 8, 4), ("res4", 16, 6), ("res5", 32, 8)):
            pooled = nn.functional.avg_pool2d(
                images, stride, ceil_mode=True, count_include_pad=False
            )
            features[name] = torch.cat([pooled, pooled**2, pooled**3], dim=1)[:, :channels]
        return features


def deformable_encoder(settings):
    """Deformable layers of the given settings."""
    attention = DeformableSelfAttention(settings["embed_dim"], settings["num_heads"], dropout=0.0)
    layer = EncoderLayer(attention, settings["feedforward_dim"], ffn_dropout=0.0)
    return Encoder(layer, settings["num_encoder_layers"])


def decoder(settings, kind=DeformableDecoder, **options):
    """A decoder of the given settings without dropout."""
    return kind(
        settings["embed_dim"],
        settings["num_heads"],
        attn_dropout=0.0,
        feedforward_dim=settings["feedforward_dim"],
        ffn_dropout=0.0,
        num_layers=settings["num_decoder_layers"],
        **options,
    )


def common_parts(settings, features, norm=True):
    """What the constructors of all deformable detectors take."""
    dim = settings["embed_dim"]
    weights = settings["weight_base"]
    levels = ["res3", "res4", "res5"]
    return {
        "backbone": StubBackbone(features),
        "neck": ChannelMapper(
            {name: ShapeSpec(channels=settings[f"c{name[-1]}"]) for name in levels},
            levels,
            dim,
            kernel_size=1,
            num_outs=4,
            norm_layer=nn.GroupNorm(settings["gn_groups"], dim) if norm else None,
        ),
        "embed_dim": dim,
        "num_queries": settings["num_queries"],
        "num_classes": settings["num_classes"],
        "position_embedding": PositionEmbeddingSine(dim // 2, normalize=True, offset=-0.5),
        "criterion": SetCriterion(
            num_classes=settings["num_classes"],
            matcher=HungarianMatcher(cost_class=2.0, cost_bbox=5.0, cost_giou=2.0),
            weight_dict={
                name + suffix: value for name, value in weights.items() for suffix in SUFFIXES
            },
            loss_class_type="focal_loss",
            alpha=0.25,
            gamma=2.0,
        ),
        "select_box_nums_for_evaluation": settings["select_box_nums_for_evaluation"],
    }


def build_deformable(
    settings, features, *, refine=False, two_stage=False, norm=True, encoder=None, **options
):
    """A Deformable-DETR of the given settings on recorded features."""
    parts = common_parts(settings, features, norm) | options
    if "transformer" not in parts:
        encoder = deformable_encoder(settings) if encoder is None else encoder
        parts["transformer"] = DeformableTransformer(
            encoder, decoder(settings), as_two_stage=two_stage
        )
    return DeformableDETR(with_box_refine=refine, as_two_stage=two_stage, **parts)


def check_single_results(model):
    """A batch of images of different sizes gives each image's result on its own."""
    sizes = [(64, 192), (128, 96), (96, 96)]
    inputs = [{"image": pattern_image(i, *size)} for i, size in enumerate(sizes)]
    with torch.no_grad():
        together = model(inputs)
        alone = [model([item])[0] for item in inputs]
    for batched, single in zip(together, alone, strict=True):
        for field in ("scores", "pred_classes"):
            torch.testing.assert_close(
                batched["instances"].get(field), single["instances"].get(field), rtol=0, atol=1e-4
            )
        torch.testing.assert_close(
            batched["instances"].pred_boxes.tensor,
            single["instances"].pred_boxes.tensor,
            rtol=1e-4,
            atol=1e-2,
        )


def check_initialisation(reference_dir, name, keys):
    """Statistics of freshly initialised parameters of a baseline config are detrex's."""
    torch.manual_seed(0)
    config = LazyConfig.load(str(ROOT / f"projects/baselines/configs/{name}.py"))
    state = instantiate(config.model).state_dict()
    recorded = json.loads((reference_dir / "detrex/initialisation.json").read_text())
    for key in keys:
        value, expected = state[key], recorded["models"][name][key]
        if "constant" in expected:
            assert (value == expected["constant"]).all(), key
            continue
        error = expected["std"] / value.numel() ** 0.5
        assert abs(value.mean() - expected["mean"]) < 8 * error, key
        assert abs(value.std(correction=0) - expected["std"]) < 8 * error, key
