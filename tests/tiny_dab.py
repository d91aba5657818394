"""Tiny DAB-DETR and DN-DETR for tests, on one feature map."""

import torch
from detrex.layers import PositionEmbeddingSine
from detrex.modeling import HungarianMatcher
from tiny_detectors import SETTINGS, StridedBackbone, StubBackbone, instances, pattern_image
from torch import nn

from detectors.attention import SelfAttention
from detectors.criterion import SetCriterion
from detectors.dab_detr import DABDETR, DABDecoder, DABEncoder, DABTransformer
from detectors.dn_detr import DNDETR
from detectors.transformer import EncoderLayer

WEIGHTS = {"loss_class": 1.0, "loss_bbox": 5.0, "loss_giou": 2.0}


def build(kind, settings, features, *, decoder_options=None, **options):
    """A detector of the given kind and settings on recorded features."""
    dim, heads = settings["embed_dim"], settings["num_heads"]
    attention = SelfAttention(dim, heads)
    layer = EncoderLayer(attention, settings["feedforward_dim"], 0.0, nn.PReLU())
    decoder = DABDecoder(
        dim,
        heads,
        attn_dropout=0.0,
        feedforward_dim=settings["feedforward_dim"],
        ffn_dropout=0.0,
        activation=nn.PReLU(),
        num_layers=settings["num_decoder_layers"],
        **decoder_options or {},
    )
    encoder = DABEncoder(layer, settings["num_encoder_layers"])
    criterion = SetCriterion(
        num_classes=settings["num_classes"],
        matcher=HungarianMatcher(cost_class=2.0, cost_bbox=5.0, cost_giou=2.0),
        weight_dict=WEIGHTS | {f"{name}_dn": value for name, value in WEIGHTS.items()},
        loss_class_type="focal_loss",
        alpha=0.25,
        gamma=2.0,
    )
    temperature = settings.get("position_temperature", 20)
    return kind(
        backbone=StubBackbone(features),
        in_features=["res5"],
        in_channels=settings["c5"],
        embed_dim=dim,
        num_queries=settings["num_queries"],
        num_classes=settings["num_classes"],
        position_embedding=PositionEmbeddingSine(dim // 2, temperature=temperature, normalize=True),
        transformer=DABTransformer(encoder, decoder, settings.get("num_patterns", 0)),
        criterion=criterion,
        select_box_nums_for_evaluation=settings["select_box_nums_for_evaluation"],
        **options,
    )


def build_recorded(recorded):
    """The detector of a recording, with its weights and without noise."""
    settings, options = recorded.settings, {}
    if "denoising_groups" in settings:
        options = {
            "denoising_groups": settings["denoising_groups"],
            "label_noise_prob": 0.0,
            "box_noise_scale": 0.0,
        }
    kind = DNDETR if options else DABDETR
    model = build(kind, settings, recorded.features, mask_padding_at_inference=False, **options)
    return recorded.load(model)


def tiny_detector(kind=DABDETR, settings=SETTINGS, **options):
    """A detector whose box heads move boxes already."""
    torch.manual_seed(0)
    model = build(kind, settings, {}, **options)
    model.backbone = StridedBackbone()
    nn.init.normal_(model.bbox_embed.layers[-1].weight, std=0.1)
    return model


def batch(boxes=((4, 4, 60, 30), (30, 20, 90, 60))):
    """Two images of different sizes; the boxes are on the first."""
    first, second = (64, 96), (96, 80)
    return [
        {"image": pattern_image(0, *first), "instances": instances(first, boxes, [1] * len(boxes))},
        {"image": pattern_image(1, *second), "instances": instances(second, [], [])},
    ]
