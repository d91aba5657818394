"""Learning-rate rules that the configs name."""


def backbone_lr_factor(name: str) -> float:
    """DETR's rule: parameters of the backbone learn at a tenth of the rate."""
    return 0.1 if "backbone" in name else 1.0
