"""The dataset mapper of the DETR recipes."""

from .detr_dataset_mapper import DetrDatasetMapper

__all__ = ["DetrDatasetMapper"]
