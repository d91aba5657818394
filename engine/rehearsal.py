"""What an evaluation would stumble over, found before training begins."""

from typing import Any

from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from omegaconf import DictConfig
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from .annotations import check_evaluable
from .building import build, construction
from .datasets import build_loader, check_class_count, check_datasets, dataset_names
from .rng import preserve_rng

__all__ = ["check_evaluator", "rehearse_evaluation"]


def rehearse_evaluation(config: DictConfig, model: nn.Module) -> None:
    """Build the test loader and the evaluator once, and load the first image.

    Raises:
        UserError: one of them cannot be built, the image cannot be loaded, or the data sets have
            another number of classes than the model.
    """
    node = config.dataloader.get("evaluator")
    if node is None:
        return
    name = node.get("dataset_name") if isinstance(node, DictConfig) else None
    check_datasets([name] if isinstance(name, str) else [])
    with preserve_rng():  # as if there had been no rehearsal
        loader = build_loader(config.dataloader.test)
        check_evaluator(node)
        with construction("a sample of dataloader.test"):
            load_first(loader)
    check_class_count(dataset_names(config.dataloader.test), model, exactly=True)


def check_evaluator(node: Any) -> None:
    """Build an evaluator; stop if it is COCO's and its ground truth lacks what that needs."""
    evaluator = build("dataloader.evaluator", node)
    if isinstance(evaluator, COCOEvaluator) and isinstance(node, DictConfig):
        path = MetadataCatalog.get(node.dataset_name).get("json_file", None)
        if path:
            check_evaluable(path)


def load_first(loader: Any) -> None:
    """Load the first sample, in this process, of a loader that can tell it apart."""
    if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
        loader.dataset[0]
