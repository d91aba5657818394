"""``python -m ops``: which backend each operator uses here, and how it was built."""

from __future__ import annotations

import torch

from . import __all__ as names
from . import _library


def describe() -> list[str]:
    """The lines that are printed."""
    devices = ["cpu", "cuda"]
    lines = [f"{'operator':34}{''.join(f'{device:12}' for device in devices)}".rstrip()]
    for name in names:
        if hasattr(torch.ops.detr_methods, name):  # not layers, nor what is PyTorch's
            used = [backend(name, device) for device in devices]
            lines.append(f"{name:34}{''.join(f'{backend:12}' for backend in used)}".rstrip())
    lines.append("")
    if _library.COMPILED_PATH is None:
        lines.append(f"compiled library   missing: {_library.MISSING_REASON}")
    else:
        compiler, flags, built_with = torch.ops.detr_methods.build_information()
        lines += [
            f"compiled library   {_library.COMPILED_PATH}",
            f"compiler           {compiler}",
            f"flags              {flags}",
            f"built with torch   {built_with}",
            f"vectors in use     {_library.cpu_capability()}",
        ]
    cuda = torch.version.cuda or "not in this torch"
    visible = "available" if torch.cuda.is_available() else "no device"
    lines += [
        f"Triton             {_triton_version()}",
        f"torch              {torch.__version__}",
        f"CUDA               {cuda} ({visible})",
        f"threads            {torch.get_num_threads()}",
    ]
    return lines


def backend(name: str, device: str) -> str:
    """What runs an operator on a device type."""
    if device == "cuda" and name == "linear_sum_assignment":
        return "host"  # costs are copied there
    full_name = f"{_library.NAMESPACE}::{name}"
    if torch._C._dispatch_has_kernel_for_dispatch_key(full_name, device.upper()):
        return _library.backend(device)
    return "PyTorch"


def _triton_version() -> str:
    if not _library.HAS_TRITON:
        return "not installed"
    import triton

    return triton.__version__


if __name__ == "__main__":
    print("\n".join(describe()))
