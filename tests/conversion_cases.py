"""Weights by recipe, images and tiny configs for conversions from other projects' layouts."""

import gzip
import json
import math
import re
import zlib

import numpy as np
import torch
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig, instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import BasicStem, ResNet
from detectron2.modeling.backbone.resnet import BottleneckBlock
from tiny_detectors import ROOT, pattern_image

# official.*: keys, shapes and aliases of the authors' models, built with their code at the commits
# named there with two layers each and the backbone below; with the recipe's weights, their logits
# and boxes of the batch below. full_size.*: keys and shapes of the models as released.
FACTS = ROOT / "tests" / "data" / "conversion"

SIZES = ((96, 128), (64, 100))
CHANNELS = {"res2": 32, "res3": 64, "res4": 96, "res5": 128}

ROWS = [row for row in range(1, 91) if row not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]
"""COCO's categories among the rows of a head that has one for every category id."""


EMBEDDING = re.compile(r".*(query_\w*embed\w*|refpoint_embed|tgt_embed|label_enc|patterns)\.weight")


def recipe(shapes, aliases=None):
    """Weights that depend on their names and shapes alone."""
    weights = {}
    for key, shape in shapes.items():
        rng = np.random.RandomState(zlib.crc32(key.encode()))
        norm = key.endswith("running_var") or (key.endswith("weight") and len(shape) == 1)
        std = 1.5 * math.prod(shape[1:]) ** -0.5 if len(shape) > 1 else 0.1
        if EMBEDDING.fullmatch(key):
            std = 1.0
        value = float(norm) + std * rng.standard_normal(shape)
        weights[key] = torch.from_numpy(np.abs(value) if norm else value).float()
    return weights | {alias: weights[key] for alias, key in (aliases or {}).items()}


def batch(count=2):
    """Images of different sizes, as a detector takes them."""
    return [{"image": pattern_image(index, *size)} for index, size in enumerate(SIZES[:count])]


def stage(index, norm):
    """One bottleneck block with a quarter of a ResNet's usual width or less."""
    widths = [16, *CHANNELS.values()]
    return L(ResNet.make_stage)(
        block_class=BottleneckBlock,
        num_blocks=1,
        stride_per_block=[1 if index == 0 else 2],
        in_channels=widths[index],
        bottleneck_channels=widths[index + 1] // 4,
        out_channels=widths[index + 1],
        norm=norm,
    )


def tiny_config(name, classes=80, norm="FrozenBN", project="baselines"):
    """A config's model with two layers each, seven queries and a narrow backbone."""
    model = LazyConfig.load(str(ROOT / f"projects/{project}/configs/{name}.py")).model
    features = list(model.backbone.out_features)
    model.backbone = L(ResNet)(
        stem=L(BasicStem)(in_channels=3, out_channels=16, norm=norm),
        stages=[stage(index, norm) for index in range(4)],
        out_features=features,
        freeze_at=0,
    )
    model.num_queries, model.num_classes = 7, classes
    encoder, decoder = model.transformer.encoder, model.transformer.decoder
    encoder = encoder.get("encoder", encoder)  # of one that shares knowledge
    decoder.num_layers, decoder.feedforward_dim = 2, 96
    if "layer" in encoder:
        encoder.num_layers, encoder.layer.feedforward_dim = 2, 96
    if "input_shapes" in model.get("neck", {}):
        model.neck.input_shapes = {
            name: ShapeSpec(channels=CHANNELS[name]) for name in model.neck.in_features
        }
    elif "in_channels" in model:
        model.in_channels = CHANNELS["res5"]
    return model


def build(config, weights):
    """A config's model with weights that have to be all of its own, ready to detect."""
    model = instantiate(config)
    model.load_state_dict(weights, strict=True)
    return model.eval()


def predict(model, inputs):
    """Logits (L, B, N, K) and boxes (L, B, N, 4) of all decoder layers."""
    with torch.no_grad():
        memory = model.encode(model.extract(model.preprocess(inputs)))
        predictions = model.predict(model.decode(memory, model.queries(memory)))
    return predictions.logits, predictions.boxes


def read_facts(name):
    """A compressed file of facts about the official models."""
    return json.loads(gzip.decompress((FACTS / f"{name}.json.gz").read_bytes()))
