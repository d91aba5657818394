"""Parameters and multiply-adds of a config's model, a table per module.

    python tools/analyze_model.py --config-file FILE [--size 800 1120] [--depth 3] [key=value ...]

GFLOPs are multiply-adds, as in the papers, of one image in evaluation. DETR's figures are averages
over the first 100 validation images of COCO, which are about as large as the default size.
"""

import argparse
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from math import prod
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import projects  # noqa: F401  (makes detectron2 importable)

# isort: split
import torch
from detectron2.config import instantiate
from fvcore.nn import FlopCountAnalysis
from tabulate import tabulate
from torch import nn

from engine.config import load_config
from engine.errors import UserError, exit_code_of

Shapes = list[list[int]]


def main() -> None:
    """Read the command line, count, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="FILE")
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1120), metavar=("H", "W"))
    parser.add_argument("--depth", type=int, default=3, help="how deep the table goes into modules")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    height, width = args.size
    if height < 1 or width < 1:
        raise UserError(f"--size is {height} {width}, expected two positive numbers")
    model = instantiate(load_config(args.config_file, args.overrides).model).eval()
    flops = count_multiply_adds(model, (height, width))
    print(table(model, flops, args.depth))
    unsupported = flops.unsupported_ops()
    if unsupported:
        names = ", ".join(f"{name} ({count})" for name, count in unsupported.most_common())
        print(f"Elementwise and not counted: {names}")


def count_multiply_adds(model: nn.Module, size: tuple[int, int]) -> FlopCountAnalysis:
    """Trace ``model`` on one image of ``size`` (h, w), the operators of this project included."""
    image = torch.zeros(3, *size)
    analysis = FlopCountAnalysis(_Tensors(model, size), (image,))
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    for operator, handle in HANDLES.items():
        analysis.set_op_handle(operator, handle)
    logging.getLogger("fvcore").setLevel(logging.ERROR)
    analysis.total()
    return analysis


class _Tensors(nn.Module):
    """What tracing needs: an image in, tensors out."""

    def __init__(self, model: nn.Module, size: tuple[int, int]):
        super().__init__()
        self.model = model
        self.height, self.width = size

    def forward(self, image: torch.Tensor) -> Any:
        record = {"image": image, "height": self.height, "width": self.width}
        result = self.model([record])[0]["instances"]
        return result.pred_boxes.tensor, result.scores, result.pred_classes


def table(model: nn.Module, flops: FlopCountAnalysis, depth: int) -> str:
    """Rows of modules with their parameters (each tensor once) and GFLOPs."""
    counts = flops.by_module()
    rows = []
    for name, module in model.named_modules():
        level = name.count(".") + 1 if name else 0
        if level > depth:
            continue
        total, trained = parameters(module.parameters())
        gflops = counts["model." + name if name else "model"] / 1e9
        if total or gflops:
            label = "  " * level + (name.rsplit(".", 1)[-1] or type(model).__name__)
            rows.append([label, f"{total / 1e6:.3f}", f"{trained / 1e6:.3f}", f"{gflops:.2f}"])
    headers = ["module", "parameters (M)", "trained (M)", "GFLOPs"]
    alignment = ("left", "right", "right", "right")
    return tabulate(
        rows, headers, colalign=alignment, disable_numparse=True, preserve_whitespace=True
    )


def parameters(given: Iterable[nn.Parameter]) -> tuple[int, int]:
    """How many numbers there are, and how many of them are trained."""
    counted: Counter[bool] = Counter()
    for parameter in given:
        counted[parameter.requires_grad] += parameter.numel()
    return counted[True] + counted[False], counted[True]


# --- multiply-adds of operators that fvcore does not know ----------------------------------------


def shapes_of(values: list[Any]) -> Shapes:
    """Sizes of a traced node's tensors; empty for what is no tensor."""
    return [value.type().sizes() or [] if value.isCompleteTensor() else [] for value in values]


def attention(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    """Products of ``scaled_dot_product_attention``: queries with keys, weights with values."""
    query, key, value = shapes_of(inputs)[:3]
    return Counter(attention=prod(query[:-1]) * key[-2] * (query[-1] + value[-1]))


def gaussian_attention(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    """The same, and five for the distance of each query and key."""
    query, key, value = shapes_of(inputs)[:3]
    pairs = prod(query[:-1]) * key[-2]
    return Counter(gaussian_attention=pairs * (query[-1] + value[-1] + 5))


def deformable_attention(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    """Four corners for each sampling point and channel."""
    value, _, _, weights = shapes_of(inputs)[:4]
    return Counter(deformable_attention=prod(weights) * 4 * value[-1])


HANDLES: dict[str, Callable[[list[Any], list[Any]], Counter[str]]] = {
    "aten::scaled_dot_product_attention": attention,
    "detr_methods::gaussian_attention": gaussian_attention,
    "detr_methods::multi_scale_deformable_attention": deformable_attention,
}


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
