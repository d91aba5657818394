"""The operator library: its namespace, the compiled kernels, and which backend runs where."""

from __future__ import annotations

import glob
import importlib.util
import os
import platform
import warnings
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

from ._autograd import is_forward_mode
from ._sources import why_unfit

NAMESPACE = "detr_methods"
library = torch.library.Library(NAMESPACE, "DEF")
"""Holds the schemas of all operators, which stand beside their Python functions."""
WAITS_FOR_HOST = tuple(
    getattr(torch.Tag, name) for name in ("cudagraph_unsafe",) if hasattr(torch.Tag, name)
)
"""Tags of operators that no CUDA graph can hold, where this torch has such a tag."""


_OWN_SUFFIX = EXTENSION_SUFFIXES[0]
_BUILD = "`python setup.py build_ext --inplace`"


class OperatorWarning(UserWarning):
    """The compiled operators are missing; PyTorch does the same work, slower."""


def _load_compiled() -> tuple[str | None, str]:
    """Load ``ops/_C*.so``: its path and an empty reason, or None and why not.

    The variable ``DETR_METHODS_OPS`` names another build, such as one with sanitizers.
    """
    pattern = os.environ.get("DETR_METHODS_OPS", str(Path(__file__).with_name("_C*.so")))
    # this Python's own comes first: others' may lie beside it
    found = sorted(glob.glob(pattern), key=lambda path: (not path.endswith(_OWN_SUFFIX), path))
    if not found:
        return None, f"no {Path(pattern).name}: run {_BUILD}"
    reasons = []
    for path in found:
        reason = _load(path)
        if not reason:
            return path, ""
        reasons.append(reason)
    return None, reasons[0]


def _load(path: str) -> str:
    """Load one library: why it cannot be, or an empty reason."""
    unfit = why_unfit(Path(path), Path(__file__).with_name("csrc"), torch.__version__)
    if unfit:
        return f"{path} {unfit}: run {_BUILD}"
    try:
        torch.ops.load_library(path)
    except (OSError, RuntimeError) as error:
        cause = str(error.__cause__ or error).strip().splitlines()[0]
        return f"{path} does not load: {cause}"
    return ""


COMPILED_PATH, MISSING_REASON = _load_compiled()
if COMPILED_PATH is None:
    warnings.warn(
        f"compiled operators are missing ({MISSING_REASON}); the pure-PyTorch path is used",
        OperatorWarning,
        stacklevel=2,
    )
HAS_TRITON = platform.system() == "Linux" and importlib.util.find_spec("triton") is not None


def backend(device_type: str) -> str:
    """What runs an operator on a device type: ``"C++"``, ``"Triton"`` or ``"PyTorch"``."""
    if device_type == "cpu" and COMPILED_PATH is not None:
        return "C++"
    if device_type == "cuda" and HAS_TRITON:
        return "Triton"
    return "PyTorch"


def has_kernels(tensor: torch.Tensor) -> bool:
    """Tell whether an operator has kernels of its own where ``tensor`` lives."""
    return backend(tensor.device.type) != "PyTorch"


def is_eager_in_float32_on_cpu(*tensors: torch.Tensor) -> bool:
    """Whether it may depend on the sizes of tensors which way of computing is taken.

    In traced and compiled graphs other sizes may come, and compilers choose themselves.
    Differentiation in forward mode knows PyTorch's operators alone.
    """
    if torch.jit.is_tracing() or torch.compiler.is_compiling() or is_forward_mode():
        return False
    return not torch.is_autocast_enabled("cpu") and all(
        tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in tensors
    )


def cpu_capability() -> str:
    """Vector instructions that the compiled CPU kernels use here: avx512, avx2 or baseline."""
    return torch.ops.detr_methods.cpu_capability("")


def is_intel() -> bool:
    """Whether the processor is Intel's; unknown, and no, without the compiled operators."""
    return COMPILED_PATH is not None and torch.ops.detr_methods.is_intel()


def set_cpu_capability(name: str) -> None:
    """Use narrower vector instructions than the processor has.

    Args:
        name: ``"avx512"``, ``"avx2"`` or ``"baseline"``.

    Raises:
        ValueError: if the name is unknown or this processor lacks the instructions.
    """
    torch.ops.detr_methods.cpu_capability(name)
