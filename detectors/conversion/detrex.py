"""The layout of detrex and of this project: nothing is called otherwise."""

from __future__ import annotations

from .layout import Layout, Rule

DETREX = Layout(
    name="detrex",
    origin="detrex, and this project itself",
    has=(r"transformer\.decoder\.layers\.0\.(attentions\.1|mixing)\..+",),
    lacks=(r"ksgt\..+",),  # of KS-DETR's release, whose other names are detrex's
    rules=(Rule(r"(.+)", r"\1"),),
)
