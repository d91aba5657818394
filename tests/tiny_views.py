"""What tests of attention pictures look at."""

import torch
from tiny_detectors import pattern_image

from tools.attention_views import View


def images(*sizes):
    return [{"image": pattern_image(i, *size)} for i, size in enumerate(sizes)]


def made_view(cells, **parts):
    """A view of two queries, the second of which is worse."""
    return View(
        cells,
        torch.tensor([0.9, 0.3]),
        torch.tensor([1, 0]),
        torch.tensor([[2.0, 3.0, 12.0, 9.0], [0.0, 0.0, 5.0, 5.0]]),
        torch.tensor([[[0.25, 0.75], [0.5, 0.5]]]),
        **parts,
    )
