"""The parts of DETRDistill and of D3ETR."""

from detectron2.config import LazyCall as L

from projects.detr_distill.attention_maps import (
    CrossAttentionDistillation,
    SelfAttentionDistillation,
)
from projects.detr_distill.logits import LogitsDistillation
from projects.detr_distill.prediction import PredictionDistillation
from projects.detr_distill.query_prior import QueryPriorAssignment
from projects.detr_distill.target_aware import TargetAwareDistillation


def detrdistill(place="neck"):
    """Logits, target-aware features of a place, and query-prior assignment."""
    return [
        L(LogitsDistillation)(),
        L(TargetAwareDistillation)(place=place),
        L(QueryPriorAssignment)(),
    ]


def d3etr(group):
    """Self-attention, cross-attention and predictions of a group, "adaptive" or "fixed"."""
    return [
        L(SelfAttentionDistillation)(group=group),
        L(CrossAttentionDistillation)(group=group),
        L(PredictionDistillation)(group=group),
    ]


def mixed_matching():
    """D3ETR whole: both groups, and the ground truth for the fixed one."""
    return [*d3etr("adaptive"), *d3etr("fixed"), L(QueryPriorAssignment)(assignment="last")]
