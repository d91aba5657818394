"""SMCA's encoder of several levels: within levels, over all of them, shared weights or not."""

import pytest
import torch
import torch.nn.functional as F

from detectors.attention import SelfAttention
from detectors.structures import FeatureMaps
from detectors.transformer import Encoder, EncoderLayer
from projects.ks_detr.encoder import share_knowledge
from projects.smca.encoder import MultiScaleEncoder

SHAPES = ((4, 6), (2, 3), (1, 2))
DIM, HEADS, WIDTH = 8, 2, 12


def features(seed=0):
    """Random maps of two images, the second of which is padded on the right."""
    torch.manual_seed(seed)
    levels, positions = (
        tuple(torch.randn(2, DIM, *shape, dtype=torch.float64) for shape in SHAPES)
        for _ in range(2)
    )
    masks = []
    for height, width in SHAPES:
        mask = torch.zeros(2, height, width, dtype=torch.bool)
        mask[1, :, (width + 1) // 2 :] = True
        masks.append(mask)
    return FeatureMaps(levels, tuple(masks), positions, [(64, 96), (64, 48)], (64, 96))


def prototype():
    torch.manual_seed(1)
    layer = EncoderLayer(SelfAttention(DIM, HEADS), WIDTH, ffn_dropout=0.0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return layer.double()


def encoder(blocks, share="ffn_and_attention", **options):
    return MultiScaleEncoder(prototype(), blocks, len(SHAPES), share, **options).double()


def plain(maps):
    """Output of the plain encoder's layer for some maps as one sequence."""
    return Encoder(prototype(), 1)(maps).tokens


def one_level(maps, level):
    return FeatureMaps(
        maps.levels[level : level + 1],
        maps.padding_masks[level : level + 1],
        maps.positions[level : level + 1],
        maps.image_sizes,
        maps.padded_size,
    )


@pytest.mark.parametrize("share", ["ffn_and_attention", "ffn", "attention", "none"])
def test_blocks_with_equal_weights_are_plain_layers(share):
    """Copies of one layer, however many, do within a level and over all what that layer does."""
    maps = features()
    within = torch.cat([plain(one_level(maps, level)) for level in range(3)], dim=1)
    torch.testing.assert_close(encoder(["intra"], share)(maps).tokens, within)
    torch.testing.assert_close(encoder(["multi"], share)(maps).tokens, plain(maps))


@pytest.mark.parametrize("block", ["intra", "multi"])
def test_unshared_weights_belong_to_levels(block):
    """Against a dense formula in which every token uses its level's projections and FFN."""
    torch.manual_seed(2)
    model = encoder([block], "none")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    maps, layer = features(), model.layers[0]
    sizes = [h * w for h, w in SHAPES]
    owner = [level for level, size in enumerate(sizes) for _ in range(size)]
    tokens, positions, padding = maps.tokens(), maps.token_positions(), maps.token_padding()
    projected = []
    for s, level in enumerate(owner):
        attn = layer.attentions[0].parts[level].attn
        weights, biases = attn.in_proj_weight.chunk(3), attn.in_proj_bias.chunk(3)
        given = [tokens[:, s] + positions[:, s]] * 2 + [tokens[:, s]]
        projected.append(
            [F.linear(x, w, b) for x, w, b in zip(given, weights, biases, strict=True)]
        )
    expected = []
    for s, level in enumerate(owner):
        seen = [t for t in range(len(owner)) if block == "multi" or owner[t] == level]
        heads = []
        for head in range(HEADS):
            part = slice(head * DIM // HEADS, (head + 1) * DIM // HEADS)
            logits = torch.stack(
                [(projected[s][0][:, part] * projected[t][1][:, part]).sum(-1) for t in seen],
                dim=-1,
            )
            logits = (logits / (DIM / HEADS) ** 0.5).masked_fill(padding[:, seen], -torch.inf)
            values = torch.stack([projected[t][2][:, part] for t in seen], dim=1)
            heads.append((logits.softmax(-1)[:, :, None] * values).sum(1))
        found = layer.attentions[0].parts[level].attn.out_proj(torch.cat(heads, dim=-1))
        found = layer.norms[0](tokens[:, s] + found)
        expected.append(layer.norms[1](layer.ffns[level](found)))
    torch.testing.assert_close(model(maps).tokens, torch.stack(expected, dim=1))


def test_only_multi_blocks_carry_news_between_levels():
    maps = features()
    changed = FeatureMaps(
        (maps.levels[0] + 1, *maps.levels[1:]),
        maps.padding_masks,
        maps.positions,
        maps.image_sizes,
        maps.padded_size,
    )
    rest = SHAPES[0][0] * SHAPES[0][1]
    for blocks, equal in ((["intra"] * 3, True), (["intra", "multi"], False)):
        model = encoder(blocks)
        first, second = (model(given).tokens[:, rest:] for given in (maps, changed))
        assert torch.allclose(first, second) == equal


def test_order_of_blocks_matters():
    maps = features()
    first, second = (
        encoder(blocks)(maps).tokens for blocks in (["intra", "multi"], ["multi", "intra"])
    )
    assert not torch.allclose(first, second)


@pytest.mark.parametrize(
    ("share", "attentions", "ffns"),
    [("ffn_and_attention", 1, 1), ("ffn", 3, 1), ("attention", 1, 3), ("none", 3, 3)],
)
def test_what_is_shared(share, attentions, ffns):
    layer = encoder(["intra"], share).layers[0]
    assert (len(layer.attentions[0].parts), len(layer.ffns), len(layer.norms)) == (
        attentions,
        ffns,
        2,
    )


def test_contradictions_are_refused_in_one_line():
    with pytest.raises(ValueError, match="blocks has 'inter'"):
        encoder(["inter"])
    with pytest.raises(ValueError, match="share is 'all', expected one of"):
        encoder(["intra"], "all")
    with pytest.raises(ValueError, match="num_layers is 0"):
        encoder([])
    with pytest.raises(TypeError, match="encoder layer has LevelAttention, knowledge is shared"):
        share_knowledge(encoder(["intra"]))
    shared = share_knowledge(Encoder(prototype(), 1)).layers[0]
    with pytest.raises(TypeError, match="the layer has KnowledgeSharingAttention"):
        MultiScaleEncoder(shared, ["intra"])
