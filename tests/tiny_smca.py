"""Tiny SMCA detectors for tests, and the recorded ones."""

import json
import re

import numpy as np
import torch
from detrex.layers import PositionEmbeddingSine, ShapeSpec
from detrex.modeling.neck import ChannelMapper
from tiny_deformable import PyramidBackbone
from tiny_detectors import SETTINGS, focal_criterion

from detectors.attention import SelfAttention
from detectors.structures import FeatureMaps
from detectors.transformer import Encoder, EncoderLayer, Transformer
from projects.smca.attention import Modulation
from projects.smca.checkpoint import SMCA as RELEASED
from projects.smca.decoder import SMCADecoder
from projects.smca.detector import SMCA, MultiScaleSMCA
from projects.smca.encoder import MultiScaleEncoder

SINGLE_SCALE = {"strides": (32,), "level_factors": (1.0,)}
MULTI_SCALE = {"strides": (8, 16, 32), "level_factors": (0.5, 1.0, 2.0)}
BLOCKS = {"I": "intra", "M": "multi"}


def transformer(settings, modulation, blocks=None, dropout=0.0, **encoder_options):
    """An encoder for one level, or for several if there are blocks, and SMCA's decoder."""
    dim, heads, width = (settings[k] for k in ("embed_dim", "num_heads", "feedforward_dim"))
    layer = EncoderLayer(SelfAttention(dim, heads, dropout), width, dropout)
    if blocks is None:
        encoder = Encoder(layer, settings["num_encoder_layers"], **encoder_options)
    else:
        encoder = MultiScaleEncoder(layer, [BLOCKS[b] for b in blocks], **encoder_options)
    decoder = SMCADecoder(
        Modulation(dim, heads, **modulation),
        dim,
        heads,
        dropout,
        width,
        dropout,
        num_layers=settings["num_decoder_layers"],
    )
    return Transformer(encoder, decoder)


class TwoMaps(PyramidBackbone):
    """The maps that a neck for three levels takes."""

    def forward(self, images):
        features = super().forward(images)
        return {name: features[name] for name in ("res3", "res4")}


def common_parts(settings):
    """What the constructors of both detectors take."""
    dim = settings["embed_dim"]
    return {
        "backbone": PyramidBackbone(),
        "embed_dim": dim,
        "num_queries": settings["num_queries"],
        "num_classes": settings["num_classes"],
        "position_embedding": PositionEmbeddingSine(dim // 2, normalize=True),
        "criterion": focal_criterion(settings),
        "select_box_nums_for_evaluation": settings["select_box_nums_for_evaluation"],
    }


def build_single_scale_smca(settings=SETTINGS, encoder_options=None, **modulation):
    """SMCA on a map of stride 32."""
    modulation = SINGLE_SCALE | modulation
    return SMCA(
        in_features=["res5"],
        in_channels=8,
        transformer=transformer(settings, modulation, **encoder_options or {}),
        **common_parts(settings),
    )


def build_multi_scale_smca(
    settings=SETTINGS,
    blocks="IMI",
    encoder_options=None,
    level_embeddings=True,
    **modulation,
):
    """SMCA on maps of stride 8, 16 and, by a convolution, 32."""
    modulation = MULTI_SCALE | modulation
    shapes = {"res3": ShapeSpec(channels=4), "res4": ShapeSpec(channels=6)}
    return MultiScaleSMCA(
        **common_parts(settings) | {"backbone": TwoMaps()},
        neck=ChannelMapper(shapes, ["res3", "res4"], settings["embed_dim"], 1, num_outs=3),
        transformer=transformer(settings, modulation, blocks, **encoder_options or {}),
        level_embeddings=level_embeddings,
    )


class RecordedSMCA:
    """A pair of npz and json files: weights, maps, outputs and gradients of several variants."""

    def __init__(self, folder, name):
        self.facts = json.loads((folder / f"{name}.json").read_text())
        self.arrays = np.load(folder / f"{name}.npz")
        self.settings = SETTINGS | {
            "embed_dim": self.facts["E"],
            "num_heads": self.facts["heads"],
            "feedforward_dim": self.facts["ffn"],
            "num_encoder_layers": self.facts.get("enc"),
            "num_decoder_layers": self.facts["dec"],
            "num_classes": self.facts["ncls"],
            "num_queries": self.facts["N"],
        }

    def tensor(self, key):
        """One array."""
        return torch.from_numpy(self.arrays[key])

    def under(self, prefix):
        """The arrays of a folder by the rest of their names."""
        names = [key for key in self.arrays.files if key.startswith(prefix + "/")]
        return {key[len(prefix) + 1 :]: self.tensor(key) for key in names}

    def features(self, dtype):
        """The recorded maps, which ask for gradients."""
        given = self.under("in")
        names = sorted(key[3:] for key in given if key.startswith("src"))
        return FeatureMaps(
            tuple(given[f"src{n}"].to(dtype).requires_grad_() for n in names),
            tuple(given[f"mask{n}"] for n in names),
            tuple(given[f"pos{n}"].to(dtype) for n in names),
            [tuple(size) for size in given["image_sizes_hw"].tolist()],
            tuple(self.facts["pad"]),
        )

    def load(self, model, rename):
        """Give a model the recorded weights; the maps are already projected."""
        names = {key: rename(key) for key in self.under("state")}
        state = {names[key]: value for key, value in self.under("state").items() if names[key]}
        missing = model.load_state_dict(state, strict=False).missing_keys
        assert all(key.startswith(("input_proj", "neck")) for key in missing), missing


OFFICIAL = (
    ("attn.out_proj_", "attn.out_proj."),
    ("ffn_in", "linear1"),
    ("ffn_out", "linear2"),
    ("norm_after_self_attn", "norm1"),
    ("norm_after_attn", "norm1"),
    ("norm_after_cross_attn", "norm2"),
    ("cross_attn", "multihead_attn"),
    ("norm_query", "norm4"),
    ("center_mlp", "point1.layers"),
    ("center_offset", "point2"),
    ("box_mlp", "bbox_embed.layers"),
    ("class_head", "class_embed"),
    ("decoder.final_norm", "decoder.norm"),
)


def official_name(key):
    """The released code's name of a parameter that is recorded under a plain name."""
    for plain, official in OFFICIAL:
        key = key.replace(plain, official)
    for stack, norm in (("encoder", "norm2"), ("decoder", "norm3")):
        if key.startswith(stack + "."):
            key = f"transformer.{key}".replace("norm_after_ffn", norm)
            head, _, rest = key.partition(f"{stack}.")
            key = f"{head}{stack}.layers.{rest}" if rest[0].isdigit() else key
    return "query_embed.weight" if key == "query_embed" else key


def our_name(key, scales):
    """Our name of such a parameter, None if the mode of the scales has none."""
    if key == "level_embed":
        return "level_embeds"
    if "scale_predictor" in key:
        if f"scale_predictor_{scales}" not in key:
            return None
        key = key.replace(f"scale_predictor_{scales}", "point3")
    selection = "scale_selection" in key  # of which the released single-scale model has none
    name = RELEASED.target(official_name(key.replace("scale_selection", "point2"))).key
    return name.replace("modulation.offsets", "modulation.selection") if selection else name


def for_levels(name):
    """The name of an encoder layer's parameter where levels share a plain layer."""
    return re.sub(r"(encoder\.layers\.\d\.attentions\.0)\.attn", r"\1.parts.0.attn", name)
