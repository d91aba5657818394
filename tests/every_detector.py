"""A tiny detector of every kind, for tests of what all of them do alike."""

import tiny_adamixer
import tiny_dab
import tiny_deformable
import torch
from tiny_detectors import (
    SETTINGS,
    StridedBackbone,
    build_conditional,
    build_single_scale,
    cross_entropy_criterion,
    focal_criterion,
    instances,
    pattern_image,
)
from tiny_smca import build_multi_scale_smca, build_single_scale_smca

from detectors.deformable_detr import MultiLevelTransformer
from detectors.detr import DETR, DETRDecoder
from detectors.dn_deformable_detr import DNDeformableDecoder, DNDeformableDETR
from detectors.dn_detr import DNDETR

BOXES = ((4.0, 4.0, 60.0, 30.0), (30.0, 20.0, 70.0, 60.0))


def _detr(criterion=focal_criterion):
    return build_single_scale(DETR, DETRDecoder, criterion(SETTINGS), SETTINGS, {})


def _deformable(**options):
    return tiny_deformable.build_deformable(tiny_deformable.SETTINGS, {}, **options)


def _dn_deformable():
    settings = tiny_deformable.SETTINGS
    transformer = MultiLevelTransformer(
        tiny_deformable.deformable_encoder(settings),
        tiny_deformable.decoder(settings, DNDeformableDecoder),
    )
    parts = tiny_deformable.common_parts(settings, {})
    return DNDeformableDETR(**parts | {"transformer": transformer})


SINGLE_SCALE = {
    "detr": _detr,
    "detr_cross_entropy": lambda: _detr(cross_entropy_criterion),
    "conditional": lambda: build_conditional(SETTINGS, {}),
    "dab": tiny_dab.tiny_detector,
    "dn": lambda: tiny_dab.tiny_detector(DNDETR),
}
MULTI_SCALE = {
    "deformable": _deformable,
    "refining": lambda: _deformable(refine=True),
    "two_stage": lambda: _deformable(refine=True, two_stage=True),
    "dn_deformable": _dn_deformable,
}
OTHERS = {
    "smca": build_single_scale_smca,
    "multi_scale_smca": build_multi_scale_smca,
    "adamixer": tiny_adamixer.build_adamixer,
}
BUILDERS = SINGLE_SCALE | MULTI_SCALE | OTHERS


def build(name):
    """A detector in training, without dropout, whose backbone learns nothing."""
    torch.manual_seed(0)
    model = BUILDERS[name]()
    if name in SINGLE_SCALE:
        model.backbone = StridedBackbone()
    elif name in MULTI_SCALE:
        model.backbone = tiny_deformable.PyramidBackbone()
    model.backbone.requires_grad_(False)
    return model.train()


def batch(boxes=BOXES, sizes=((64, 96), (96, 80))):
    """Two images, of different sizes unless told otherwise; the boxes are on the first."""
    classes = [1, 0][: len(boxes)]
    return [
        {"image": pattern_image(0, *sizes[0]), "instances": instances(sizes[0], boxes, classes)},
        {"image": pattern_image(1, *sizes[1]), "instances": instances(sizes[1], [], [])},
    ]
