"""Fully connected networks."""

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["FFN", "MLP"]


class MLP(nn.Module):
    """``num_layers`` linear layers with ReLU between them."""

    def __init__(self, input_dim: int, hidden_dim: int, output_dim: int, num_layers: int):
        super().__init__()
        self.num_layers = num_layers
        widths = [input_dim, *[hidden_dim] * (num_layers - 1), output_dim]
        self.layers = nn.ModuleList(nn.Linear(*io) for io in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., input_dim) to (..., output_dim)."""
        *hidden, last = self.layers
        for layer in hidden:
            x = F.relu(layer(x))
        return last(x)


class FFN(nn.Module):
    """A transformer's feed-forward part: ``num_fcs`` linear layers, dropout and a residual.

    ``activation`` is one module, shared by all hidden layers.
    """

    def __init__(
        self,
        embed_dim=256,
        feedforward_dim=1024,
        output_dim=None,
        num_fcs=2,
        activation=nn.ReLU(inplace=True),  # noqa: B008
        ffn_drop=0.0,
        fc_bias=True,
        add_identity=True,
    ):
        super().__init__()
        assert num_fcs >= 2, f"FFN: found num_fcs={num_fcs}, expected at least 2"
        self.embed_dim = embed_dim
        self.feedforward_dim = feedforward_dim
        self.num_fcs = num_fcs
        self.activation = activation
        self.add_identity = add_identity

        hidden_inputs = [embed_dim, *[feedforward_dim] * (num_fcs - 2)]
        self.layers = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Linear(width, feedforward_dim, fc_bias), activation, nn.Dropout(ffn_drop)
                )
                for width in hidden_inputs
            ),
            nn.Linear(feedforward_dim, embed_dim if output_dim is None else output_dim, fc_bias),
            nn.Dropout(ffn_drop),
        )

    def forward(self, x: Tensor, identity: Tensor | None = None) -> Tensor:
        """Map (..., embed_dim) to (..., output_dim); ``identity`` (default ``x``) is added."""
        out = self.layers(x)
        if not self.add_identity:
            return out
        return out + (x if identity is None else identity)
