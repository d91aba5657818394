"""Swin Transformer: hierarchical vision transformer using shifted windows (Liu et al., 2021).

Maps are kept channels-last, (B, height, width, C). A window is M x M tokens; W counts the windows
of a map and S = M * M the tokens of a window.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from detectron2.modeling.backbone.backbone import Backbone

__all__ = ["SwinTransformer"]

_Norm = Callable[[int], nn.Module]
_INIT_STD = 0.02
# Added to the logits of pairs that must not see each other; published weights learned with it.
_MASKED = -100.0


def _pad(x: Tensor, size: int) -> Tensor:
    """Zero-pad (B, height, width, C) at the bottom and right to multiples of a size."""
    return F.pad(x, (0, 0, 0, -x.shape[2] % size, 0, -x.shape[1] % size))


def _split(x: Tensor, window: int) -> Tensor:
    """Cut a map (B, height, width, C) into windows (B, W, S, C), row by row."""
    x = x.unflatten(2, (-1, window)).unflatten(1, (-1, window))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _join(windows: Tensor, window: int, height: int, width: int) -> Tensor:
    """Undo :func:`_split`."""
    rows, columns = height // window, width // window
    x = windows.unflatten(2, (window, window)).unflatten(1, (rows, columns))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _shift_mask(x: Tensor, window: int, shift: int) -> Tensor:
    """What to add to the logits (W, S, S) of the shifted windows of a map.

    Rolling brings the first ``shift`` rows and columns behind the last ones; within a window these
    strangers and the others stay apart.
    """
    height, width = (size + -size % window for size in x.shape[1:3])
    wrapped_y = torch.arange(height, device=x.device) >= height - shift
    wrapped_x = torch.arange(width, device=x.device) >= width - shift
    region = 2 * wrapped_y[:, None] + wrapped_x
    region = _split(region[None, :, :, None], window)[0, :, :, 0]
    apart = region[:, :, None] != region[:, None, :]
    return torch.zeros_like(apart, dtype=x.dtype).masked_fill(apart, _MASKED)


class _DropPath(nn.Module):
    """Stochastic depth: in training, drop the whole branch of an image and scale up the others."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        kept = x.new_ones(len(x), *[1] * (x.dim() - 1))
        return x * F.dropout(kept, self.rate, self.training)


class _MLP(nn.Module):
    def __init__(self, dim: int, hidden_dim: int, drop: float):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(F.gelu(self.fc1(x)))))


class _WindowAttention(nn.Module):
    """``softmax(scale * Q K^t + bias) V`` in every window, with a bias per relative position."""

    relative_position_index: Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: int,
        qkv_bias: bool,
        qk_scale: float | None,
        attn_drop: float,
        drop: float,
    ):
        super().__init__()
        assert dim % num_heads == 0, f"SwinTransformer: {dim} channels in {num_heads} heads"
        self.num_heads = num_heads
        self.qk_scale = qk_scale
        self.attn_drop = attn_drop
        span = 2 * window - 1  # offsets along one axis
        self.relative_position_bias_table = nn.Parameter(torch.empty(span**2, num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=_INIT_STD)
        y, x = (i.flatten() for i in torch.meshgrid(*[torch.arange(window)] * 2, indexing="ij"))
        dy, dx = (i[:, None] - i + window - 1 for i in (y, x))
        self.register_buffer("relative_position_index", dy * span + dx)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, windows: Tensor, mask: Tensor | None) -> Tensor:
        """Windows (B, W, S, C) to the same, with ``mask`` (W, S, S) added to the logits."""
        qkv = self.qkv(windows).unflatten(3, (3, self.num_heads, -1))
        qkv = qkv.permute(3, 0, 1, 4, 2, 5)  # (3, B, W, H, S, D)
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)
        # Fused attention takes one batch axis: the one along which the bias is the same.
        if mask is None:
            query, key, value = qkv.flatten(1, 2)
        else:
            query, key, value = qkv.flatten(2, 3)
            bias = (bias + mask[:, None]).flatten(0, 1)
        out = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=bias[None],
            dropout_p=self.attn_drop if self.training else 0.0,
            scale=self.qk_scale,
        )
        out = out.view(qkv.shape[1:]).transpose(2, 3).flatten(3)
        return self.drop(self.proj(out))


class _Block(nn.Module):
    """Pre-norm layer: attention in (shifted) windows, then a two-layer perceptron."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        window: int,
        shift: int,
        mlp_ratio: float,
        qkv_bias: bool,
        qk_scale: float | None,
        drop: float,
        attn_drop: float,
        drop_path: float,
        norm_layer: _Norm,
    ):
        super().__init__()
        self.window = window
        self.shift = shift
        self.norm1 = norm_layer(dim)
        self.attn = _WindowAttention(dim, num_heads, window, qkv_bias, qk_scale, attn_drop, drop)
        self.drop_path = _DropPath(drop_path)
        self.norm2 = norm_layer(dim)
        self.mlp = _MLP(dim, int(dim * mlp_ratio), drop)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Map (B, height, width, C) to the same; ``mask`` is for a shifted block."""
        x = x + self.drop_path(self._attend(self.norm1(x), mask))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def _attend(self, x: Tensor, mask: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        x = _pad(x, self.window)
        padded_size = x.shape[1:3]
        if self.shift:
            x = x.roll((-self.shift, -self.shift), (1, 2))
        windows = self.attn(_split(x, self.window), mask if self.shift else None)
        x = _join(windows, self.window, *padded_size)
        if self.shift:
            x = x.roll((self.shift, self.shift), (1, 2))
        return x[:, :height, :width]


class _PatchMerging(nn.Module):
    """Join 2 x 2 neighbours: half the resolution, twice the channels."""

    def __init__(self, dim: int, norm_layer: _Norm):
        super().__init__()
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = norm_layer(4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, height, width, C) to (B, ceil(height / 2), ceil(width / 2), 2 C)."""
        x = _pad(x, 2)
        # the published weights expect the upper left, lower left, upper right, lower right one
        neighbours = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        return self.reduction(self.norm(torch.cat(neighbours, -1)))


class _Stage(nn.Module):
    """Blocks of one resolution, every second one shifted, and the way to the next stage."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        drop_paths: Sequence[float],
        last: bool,
        *,
        window: int,
        norm_layer: _Norm,
        use_checkpoint: bool,
        **block: Any,
    ):
        super().__init__()
        self.window = window
        self.shift = window // 2
        self.use_checkpoint = use_checkpoint
        block.update(window=window, norm_layer=norm_layer)
        self.blocks = nn.ModuleList(
            _Block(dim, num_heads, shift=(i % 2) * self.shift, drop_path=drop_path, **block)
            for i, drop_path in enumerate(drop_paths)
        )
        self.downsample = None if last else _PatchMerging(dim, norm_layer)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map (B, height, width, C) to itself after the blocks, and to the next stage's input."""
        mask = _shift_mask(x, self.window, self.shift)
        for block in self.blocks:
            if self.use_checkpoint and self.training:
                x = checkpoint(block, x, mask, use_reentrant=False)
            else:
                x = block(x, mask)
        return x, x if self.downsample is None else self.downsample(x)


class _PatchEmbed(nn.Module):
    """Turn every patch of the image into one token."""

    def __init__(
        self, patch_size: tuple[int, int], in_chans: int, dim: int, norm_layer: _Norm | None
    ):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, dim, kernel_size=patch_size, stride=patch_size)
        self.norm = None if norm_layer is None else norm_layer(dim)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, height, width) to tokens (B, rows, columns, C)."""
        height, width = self.patch_size
        images = F.pad(images, (0, -images.shape[3] % width, 0, -images.shape[2] % height))
        x = self.proj(images).permute(0, 2, 3, 1)
        return x if self.norm is None else self.norm(x)


class SwinTransformer(Backbone):
    """Stages of window attention; stage i yields ``p{i}`` at stride ``patch_size * 2**i``.

    Any image size will do: patches, windows and pairs of tokens are completed with zeros.

    Args:
        pretrain_img_size: image size, or (height, width), of the absolute position embedding.
        patch_size: size, or (height, width), of the patches.
        in_chans: channels of the image.
        embed_dim: channels of the first stage; each stage doubles them.
        depths: number of blocks of each stage.
        num_heads: number of attention heads of each stage.
        window_size: tokens along each side of a window; every second block shifts by half of it.
        mlp_ratio: hidden width of the perceptrons, as a multiple of their channels.
        qkv_bias: give queries, keys and values a bias.
        qk_scale: factor of the attention logits; ``None`` for ``D ** -0.5``.
        drop_rate: dropout of tokens, projections and perceptrons.
        attn_drop_rate: dropout of attention weights.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 at the first.
        norm_layer: takes the number of channels and builds a normalisation of the last axis.
        ape: add an absolute position embedding, resized to the map, to the tokens.
        patch_norm: normalise the tokens.
        out_indices: stages whose (normalised) output is returned.
        frozen_stages: from 0 on, the patch embedding gets no gradients; from 1 on, neither does the
            absolute position embedding; from 2 on, nor do the first ``frozen_stages - 1`` stages.
            What is frozen starts in eval mode, which a later ``train()`` ends.
        use_checkpoint: in training, compute each block again in the backward pass: less memory for
            more time.
    """

    def __init__(
        self,
        pretrain_img_size: int | Sequence[int] = 224,
        patch_size: int | Sequence[int] = 4,
        in_chans: int = 3,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.2,
        norm_layer: _Norm = nn.LayerNorm,
        ape: bool = False,
        patch_norm: bool = True,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        frozen_stages: int = -1,
        use_checkpoint: bool = False,
    ):
        super().__init__()
        assert len(depths) == len(num_heads), (
            f"SwinTransformer: found {len(num_heads)} num_heads, expected {len(depths)}, as depths"
        )
        patch = _pair(patch_size)
        norm = norm_layer if patch_norm else None
        self.patch_embed = _PatchEmbed(patch, in_chans, embed_dim, norm)
        grid = [size // p for size, p in zip(_pair(pretrain_img_size), patch, strict=True)]
        self.absolute_pos_embed = _position_embedding(embed_dim, grid) if ape else None
        self.pos_drop = nn.Dropout(drop_rate)

        stage = partial(
            _Stage,
            window=window_size,
            mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias,
            qk_scale=qk_scale,
            drop=drop_rate,
            attn_drop=attn_drop_rate,
            norm_layer=norm_layer,
            use_checkpoint=use_checkpoint,
        )
        growth = drop_path_rate / max(sum(depths) - 1, 1)
        drop_paths = [growth * i for i in range(sum(depths))]
        self.layers = nn.ModuleList()
        for i, (depth, heads) in enumerate(zip(depths, num_heads, strict=True)):
            start, last = sum(depths[:i]), i == len(depths) - 1
            rates = drop_paths[start : start + depth]
            self.layers.append(stage(embed_dim * 2**i, heads, rates, last))

        self._add_outputs(out_indices, embed_dim, patch[0], norm_layer)
        self.apply(_initialise)
        self._freeze(frozen_stages)

    def _add_outputs(self, indices: Sequence[int], dim: int, stride: int, norm: _Norm) -> None:
        stages = len(self.layers)
        assert set(indices) <= set(range(stages)), (
            f"SwinTransformer: found out_indices {indices}, expected some of 0..{stages - 1}"
        )
        self._out_features = [f"p{i}" for i in indices]
        self._out_feature_channels = {f"p{i}": dim * 2**i for i in indices}
        self._out_feature_strides = {f"p{i}": stride * 2**i for i in indices}
        for i in indices:
            self.add_module(f"norm{i}", norm(dim * 2**i))

    def _freeze(self, frozen_stages: int) -> None:
        frozen: list[nn.Module] = [self.patch_embed] if frozen_stages >= 0 else []
        if frozen_stages >= 2:
            frozen += [self.pos_drop, *self.layers[: frozen_stages - 1]]
        for module in frozen:
            module.eval().requires_grad_(False)
        if frozen_stages >= 1 and self.absolute_pos_embed is not None:
            self.absolute_pos_embed.requires_grad_(False)

    def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        """Map images (B, 3, H, W) to the features named by ``out_indices``, (B, C, H', W')."""
        assert x.dim() == 4, (
            f"SwinTransformer: found an input of shape {tuple(x.shape)}, expected 4 axes"
        )
        x = self.patch_embed(x)
        if self.absolute_pos_embed is not None:
            position = F.interpolate(self.absolute_pos_embed, size=x.shape[1:3], mode="bicubic")
            x = x + position.permute(0, 2, 3, 1)
        x = self.pos_drop(x)
        outputs = {}
        for i, stage in enumerate(self.layers):
            out, x = stage(x)
            if f"p{i}" in self._out_features:
                out = self.get_submodule(f"norm{i}")(out)
                outputs[f"p{i}"] = out.permute(0, 3, 1, 2).contiguous()
        return outputs


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def _position_embedding(dim: int, grid: Sequence[int]) -> nn.Parameter:
    position = nn.Parameter(torch.empty(1, dim, *grid))
    nn.init.trunc_normal_(position, std=_INIT_STD)
    return position


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=_INIT_STD)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
