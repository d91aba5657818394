r"""Peak memory of a detector's training step or inference beyond the model.

As a command it measures one contender in a process of its own:

    python tools/benchmark_detector_memory.py '{"subject": "detr", "contender": "ours", ...}'

with what :func:`peak` puts into the request.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import projects  # noqa: F401  (makes detrex importable)

# isort: split
import torch

from tools.benchmark_detector_cases import Case, Subject, prepare, run_of
from tools.benchmark_memory import peak_of_process
from tools.benchmark_peers import Unavailable

WARM_UP = (128, 128)


def peak(case: Case, contender: str, detrex_root: Path | None) -> int:
    """Bytes of the highest use during a call beyond what there was before it.

    A training step starts without gradients, so theirs count.

    Raises:
        Unavailable: the contender cannot be built, or the system does not tell.
    """
    request = {
        "subject": asdict(case.subject),
        "contender": contender,
        "size": case.size,
        "images": case.images,
        "work": case.work,
        "detrex_root": None if detrex_root is None else str(detrex_root),
        "threads": torch.get_num_threads(),
    }
    result = subprocess.run(
        [sys.executable, __file__, json.dumps(request)],
        # so that the allocator keeps nothing which the call could fill unnoticed
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        lines = result.stderr.strip().splitlines()
        raise Unavailable(lines[-1] if lines else f"exit status {result.returncode}")
    return json.loads(result.stdout.splitlines()[-1])


def main() -> None:
    """Measure what the argument asks for and print it as JSON."""
    request = json.loads(sys.argv[1])
    torch.set_num_threads(request["threads"])
    subject = Subject(**request["subject"])
    root, contender = request["detrex_root"], request["contender"]
    try:
        contest = prepare(subject, Path(root) if root else None, (contender,))
        if contender in contest.unavailable:
            raise Unavailable(contest.unavailable[contender])
        model = contest.models[contender]
        images, work = request["images"], request["work"]
        run_of(model, contest.items(WARM_UP, images), work)()  # starts threads and loads libraries
        model.zero_grad(set_to_none=True)
        print(peak_of_process(run_of(model, contest.items(request["size"], images), work)))
    except Unavailable as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
