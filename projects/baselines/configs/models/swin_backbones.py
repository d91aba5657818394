"""Swin backbones with windows of 7 x 7; each feature ``p{i}`` has stride ``4 * 2**i``."""

from detectron2.config import LazyCall as L
from detectron2.modeling.backbone import SwinTransformer

swin_tiny = L(SwinTransformer)(
    embed_dim=96,
    depths=(2, 2, 6, 2),
    num_heads=(3, 6, 12, 24),
    drop_path_rate=0.1,
    out_indices=(3,),
)

swin_small = L(SwinTransformer)(
    embed_dim=96,
    depths=(2, 2, 18, 2),
    num_heads=(3, 6, 12, 24),
    drop_path_rate=0.2,
    out_indices=(3,),
)

swin_base = L(SwinTransformer)(
    embed_dim=128,
    depths=(2, 2, 18, 2),
    num_heads=(4, 8, 16, 32),
    drop_path_rate=0.4,
    out_indices=(3,),
)
