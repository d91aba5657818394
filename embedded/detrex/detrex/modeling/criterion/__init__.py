"""Training losses of whole detectors."""

from detrex.modeling.criterion.base_criterion import BaseCriterion
from detrex.modeling.criterion.criterion import SetCriterion

__all__ = ["BaseCriterion", "SetCriterion"]
