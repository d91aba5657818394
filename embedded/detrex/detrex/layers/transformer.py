"""Transformer layers put together from attention, feed-forward and normalisation modules."""

import copy

from torch import Tensor, nn

__all__ = ["BaseTransformerLayer", "TransformerLayerSequence"]

_OPERATIONS = {"self_attn", "cross_attn", "ffn", "norm"}


class BaseTransformerLayer(nn.Module):
    """One transformer layer, whose operations run in the order that is given.

    Args:
        attn: one attention module per ``self_attn`` and ``cross_attn``, or one to be copied.
        ffn: feed-forward module, copied for each ``ffn``.
        norm: normalisation module, copied for each ``norm``.
        operation_order: names out of self_attn, cross_attn, ffn and norm. If norm comes first, the
            residual connections carry the tensor from before each norm (pre-norm).
    """

    def __init__(
        self,
        attn: list[nn.Module],
        ffn: nn.Module,
        norm: nn.Module,
        operation_order: tuple[str, ...] | None = None,
    ):
        super().__init__()
        order = tuple(operation_order or ())
        assert _OPERATIONS.issuperset(order), (
            f"BaseTransformerLayer: found operation_order {order}, expected {sorted(_OPERATIONS)}"
        )
        self.num_attn = order.count("self_attn") + order.count("cross_attn")
        self.operation_order = order
        self.pre_norm = order[:1] == ("norm",)
        if isinstance(attn, nn.Module):
            attn = [copy.deepcopy(attn) for _ in range(self.num_attn)]
        assert len(attn) == self.num_attn, (
            f"BaseTransformerLayer: found {len(attn)} attention modules, expected {self.num_attn}"
        )
        self.attentions = nn.ModuleList(attn)
        self.embed_dim = self.attentions[0].embed_dim
        self.ffns = nn.ModuleList(copy.deepcopy(ffn) for _ in range(order.count("ffn")))
        self.norms = nn.ModuleList(copy.deepcopy(norm) for _ in range(order.count("norm")))

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        query_pos: Tensor | None = None,
        key_pos: Tensor | None = None,
        attn_masks: list[Tensor] | None = None,
        query_key_padding_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        **kwargs,
    ) -> Tensor:
        """Run the operations on ``query``, shaped as the attention modules want it.

        Args:
            query: content of the queries.
            key: memory that cross-attention attends to.
            value: values that belong to ``key``.
            query_pos: position embedding of the queries.
            key_pos: position embedding of ``key``.
            attn_masks: one mask per attention module, or one for all of them.
            query_key_padding_mask: (B, N), True on padding among the queries.
            key_padding_mask: (B, S), True on padding in ``key``.
            kwargs: passed on to every attention module.
        """
        masks = (
            attn_masks if isinstance(attn_masks, (list, tuple)) else [attn_masks] * self.num_attn
        )
        assert len(masks) == self.num_attn, (
            f"BaseTransformerLayer: found {len(masks)} masks, expected {self.num_attn}"
        )
        memory = {"key": key, "value": value, "key_pos": key_pos}
        attentions = zip(self.attentions, masks, strict=True)
        ffns, norms = iter(self.ffns), iter(self.norms)
        residual = query
        for operation in self.operation_order:
            identity = residual if self.pre_norm else None
            if operation == "norm":
                query = next(norms)(query)
            elif operation == "ffn":
                query = next(ffns)(query, identity)
            else:
                source, padding = memory, key_padding_mask
                if operation == "self_attn":
                    source = {"key": query, "value": query, "key_pos": query_pos}
                    padding = query_key_padding_mask
                attention, mask = next(attentions)
                query = residual = attention(
                    query,
                    identity=identity,
                    query_pos=query_pos,
                    attn_mask=mask,
                    key_padding_mask=padding,
                    **source,
                    **kwargs,
                )
        return query


class TransformerLayerSequence(nn.Module):
    """Base of encoders and decoders: ``layers`` holds copies of one layer, or a given list."""

    def __init__(self, transformer_layers=None, num_layers=None):
        super().__init__()
        self.num_layers = num_layers
        if isinstance(transformer_layers, nn.Module):
            transformer_layers = [copy.deepcopy(transformer_layers) for _ in range(num_layers)]
        layers = transformer_layers or ()
        assert len(layers) == num_layers, (
            f"{type(self).__name__}: found {len(layers)} layers, expected {num_layers}"
        )
        self.layers = nn.ModuleList(layers)

    def forward(self):
        """Run the layers; left to the subclass."""
        raise NotImplementedError
