"""Assignment of predictions to targets."""

from detrex.modeling.matcher.match_cost import CrossEntropyCost, FocalLossCost, GIoUCost, L1Cost
from detrex.modeling.matcher.matcher import HungarianMatcher
from detrex.modeling.matcher.modified_matcher import HungarianMatcher as ModifedMatcher

__all__ = [
    "CrossEntropyCost",
    "FocalLossCost",
    "GIoUCost",
    "HungarianMatcher",
    "L1Cost",
    "ModifedMatcher",
]
