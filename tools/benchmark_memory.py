r"""Peak extra memory of a forward call.

As a command it measures one contender in a process of its own, on the CPU:

    python tools/benchmark_memory.py \
        '{"contender": "ours", "dtype": "float32", "threads": 2, "quick": false}'
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import projects  # noqa: F401  (makes detrex importable)

# isort: split
import torch

from ops import multi_scale_deformable_attention
from tools.benchmark_cases import DTYPES, OURS
from tools.benchmark_inputs import QUICK, Sizes, deformable_inputs
from tools.benchmark_peers import Unavailable, sampled_by_grid

CONTENDERS = {OURS: multi_scale_deformable_attention, "grid_sample": sampled_by_grid}


def encoder_peak(
    contender: str, dtype: str, device: str, *, quick: bool = False
) -> tuple[int, int]:
    """Measure deformable attention in an encoder of one image, forward.

    Args:
        contender: a key of :data:`CONTENDERS`.
        dtype: of the values, such as ``"float32"``.
        device: ``"cpu"``, measured in a process of its own, or ``"cuda"``, measured here.
        quick: small shapes, for a trial.

    Returns:
        bytes of the peak beyond what there was before the call, and of the output.

    Raises:
        Unavailable: if the system does not tell.
    """
    if device == "cuda":
        return _measure(contender, dtype, device, quick)
    request = {
        "contender": contender,
        "dtype": dtype,
        "quick": quick,
        "threads": torch.get_num_threads(),
    }
    result = subprocess.run(
        [sys.executable, __file__, json.dumps(request)],
        # Every block of 64 KiB or more is mapped and unmapped by itself. Otherwise the allocator
        # would keep what the inputs have freed, and the call would fill it unnoticed.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        lines = result.stderr.strip().splitlines()
        raise Unavailable(lines[-1] if lines else f"exit status {result.returncode}")
    peak, output = json.loads(result.stdout.splitlines()[-1])
    return peak, output


def _measure(contender: str, dtype: str, device: str, quick: bool) -> tuple[int, int]:
    function = CONTENDERS[contender]
    with torch.no_grad():
        arguments = _arguments(QUICK if quick else Sizes(), dtype, device)
        # The first call starts threads and loads libraries; it must not leave memory that the
        # second could use again. On CUDA, where tensors are counted, it also tunes the kernels.
        function(*(arguments if device == "cuda" else _arguments(QUICK, dtype, device)))
        output: list[torch.Tensor] = []
        peak = (_peak_on_cuda if device == "cuda" else peak_of_process)(
            lambda: output.append(function(*arguments))
        )
    return peak, output[0].numel() * output[0].element_size()


def _arguments(sizes: Sizes, dtype: str, device: str) -> tuple:
    value, locations, weights = deformable_inputs(sizes, 1, None, DTYPES[dtype], device)
    return value, sizes.levels, locations, weights


def _peak_on_cuda(run: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def peak_of_process(run: Callable[[], object]) -> int:
    """Highest resident size during a call less the resident size before it.

    This counts whatever the call touches, also the scratch of C++ that no profiler of tensors sees.
    Writing 5 to ``clear_refs`` sets the high-water mark back to the present size (see proc(5)).
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        run()
        return _status("VmHWM") - before
    except OSError as error:
        raise Unavailable(f"{error.filename}: {error.strerror}") from None


def _status(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.M)
    if found is None:
        raise Unavailable(f"no {name} in /proc/self/status")
    return int(found[1]) * 1024


def main() -> None:
    """Measure what the argument asks for and print it as JSON."""
    request = json.loads(sys.argv[1])
    torch.set_num_threads(request["threads"])
    try:
        print(json.dumps(_measure(request["contender"], request["dtype"], "cpu", request["quick"])))
    except Unavailable as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
