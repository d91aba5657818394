"""Position embeddings of feature maps and of points."""

import math

import torch
from torch import Tensor, nn

__all__ = ["PositionEmbeddingLearned", "PositionEmbeddingSine", "get_sine_pos_embed"]


def _sine_features(position: Tensor, num_feats: int, temperature: float) -> Tensor:
    """Sine and cosine, alternating, of ``position`` at ever lower frequencies: (...) to (..., F).

    Entries 2i and 2i + 1 share the wavelength ``2 pi * temperature ** (2 i / F)``.
    """
    entry = torch.arange(num_feats, dtype=torch.float32, device=position.device)
    wavelength = temperature ** (2 * (entry // 2) / num_feats)
    angle = position[..., None] / wavelength
    return torch.stack((angle[..., 0::2].sin(), angle[..., 1::2].cos()), dim=-1).flatten(-2)


class PositionEmbeddingSine(nn.Module):
    """Fixed sine embedding of each cell's row and column, counted over unpadded cells.

    Args:
        num_pos_feats: features per axis.
        temperature: wavelengths run from 2 pi to about 2 pi times this.
        scale: with ``normalize``, the coordinate of the last unpadded cell.
        eps: added to the number of unpadded cells before dividing by it.
        offset: with ``normalize``, added to the count, -0.5 for cell centres.
        normalize: divide the count by the number of unpadded cells and multiply by ``scale``.
    """

    def __init__(
        self,
        num_pos_feats: int = 64,
        temperature: int = 10000,
        scale: float = 2 * math.pi,
        eps: float = 1e-6,
        offset: float = 0.0,
        normalize: bool = False,
    ):
        super().__init__()
        self.num_pos_feats = num_pos_feats
        self.temperature = temperature
        self.scale = scale
        self.eps = eps
        self.offset = offset
        self.normalize = normalize

    def forward(self, mask: Tensor, **kwargs) -> Tensor:
        """Map a padding mask (B, H, W), True on padding, to (B, 2F, H, W): rows, then columns."""
        features = []
        for axis in (1, 2):
            position = (~mask).cumsum(axis, dtype=torch.float32)
            if self.normalize:
                count = position.narrow(axis, -1, 1)
                position = (position + self.offset) / (count + self.eps) * self.scale
            features.append(_sine_features(position, self.num_pos_feats, self.temperature))
        return torch.cat(features, dim=-1).permute(0, 3, 1, 2)


class PositionEmbeddingLearned(nn.Module):
    """One learned vector per row and per column, padding or not."""

    row_embed: nn.Embedding
    col_embed: nn.Embedding

    def __init__(self, num_pos_feats: int = 256, row_num_embed: int = 50, col_num_embed: int = 50):
        super().__init__()
        self.num_pos_feats = num_pos_feats
        self.row_num_embed, self.col_num_embed = row_num_embed, col_num_embed
        for axis, length in (("row", row_num_embed), ("col", col_num_embed)):
            self.add_module(f"{axis}_embed", nn.Embedding(length, num_pos_feats))
        self.reset_parameters()

    def reset_parameters(self):
        """Draw all vectors uniformly from [0, 1)."""
        for embedding in (self.row_embed, self.col_embed):
            nn.init.uniform_(embedding.weight)

    def forward(self, mask: Tensor) -> Tensor:
        """Map a mask (B, H, W), of which only the shape matters, to (B, 2F, H, W)."""
        batch, height, width = mask.shape
        columns = self.col_embed.weight[:width].T[:, None, :].expand(-1, height, -1)
        rows = self.row_embed.weight[:height].T[:, :, None].expand(-1, -1, width)
        return torch.cat((columns, rows)).expand(batch, -1, -1, -1)


def get_sine_pos_embed(
    pos_tensor: Tensor,
    num_pos_feats: int = 128,
    temperature: int = 10000,
    exchange_xy: bool = True,
) -> Tensor:
    """Sine embedding of coordinates, (..., D) in [0, 1] to (..., D * num_pos_feats).

    With ``exchange_xy`` the features of y come before those of x.
    """
    features = _sine_features(pos_tensor * (2 * math.pi), num_pos_feats, temperature)
    if exchange_xy:
        x, y, *others = features.unbind(-2)
        return torch.cat((y, x, *others), dim=-1)
    return features.flatten(-2)
