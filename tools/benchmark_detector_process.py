r"""Contenders in processes of their own: time of their calls and of a step's parts, or memory.

A process has one allocator. This project's runs have it keep what is freed; other packages' do not.

As a command it runs one contender:

    python tools/benchmark_detector_process.py '{"subject": "detr", "contender": "ours", ...}'

with what :func:`_start` puts into the request.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, astuple
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import projects  # noqa: F401  (makes detrex importable)

# isort: split
import torch

from engine.errors import UserError
from engine.memory import keep_freed_memory
from tools.benchmark_detector_cases import (
    BASELINE,
    OURS,
    STEPS,
    TIME,
    Case,
    Subject,
    prepare,
    run_of,
)
from tools.benchmark_detector_steps import StepTime, busiest_operators, step_times
from tools.benchmark_memory import peak_of_process
from tools.benchmark_peers import Unavailable

WARM_UP = (128, 128)
READY, DONE = "ready", "done"


def peak(case: Case, contender: str, detrex_root: Path | None) -> int:
    """Bytes of the highest use during a call beyond what there was before it.

    A training step starts without gradients, so theirs count.

    Raises:
        Unavailable: the contender cannot be built, or the system does not tell.
    """
    # so that the allocator keeps nothing which the call could fill unnoticed
    environment = {"MALLOC_MMAP_THRESHOLD_": "65536"}
    with _start(case, contender, detrex_root, environment) as (process, why):
        output, _ = process.communicate()
        if process.returncode:
            raise Unavailable(why())
    return json.loads(output.splitlines()[-1])


def steps(case: Case, repeats: int) -> tuple[list[list[StepTime]], list[tuple[str, float]]]:
    """Our times of a training step's parts in each round, and its busiest operators.

    Raises:
        UserError: the process ended.
    """
    options = {"keep": True, "repeats": repeats}
    with _start(case, OURS, None, {}, options) as (process, why):
        output, _ = process.communicate()
        if process.returncode:
            raise UserError(f"{case.name}: the process of {OURS} ended: {why()}")
    rounds, operators = json.loads(output.splitlines()[-1])
    return [[StepTime(*time) for time in times] for times in rounds], [*map(tuple, operators)]


@contextmanager
def callers(
    case: Case, contenders: tuple[str, ...], detrex_root: Path | None, all_keep: bool
) -> Iterator[dict[str, Callable[[], None]]]:
    """What makes each contender's process do the case's work once, by contender.

    Args:
        case: the work and its input.
        contenders: which can be built.
        detrex_root: a checkout of detrex.
        all_keep: whether peers keep freed memory as well.

    Raises:
        UserError: a process ended.
    """
    with ExitStack() as stack:
        calls: dict[str, Callable[[], None]] = {}
        for name in contenders:
            keeps = {"keep": all_keep or name in (OURS, BASELINE)}
            started = _start(case, name, detrex_root, {}, keeps)
            process, why = stack.enter_context(started)
            _wait(READY, case, name, process, why)
            calls[name] = partial(_call, case, name, process, why)
        yield calls


def _call(case: Case, name: str, process: subprocess.Popen, why: Callable[[], str]) -> None:
    with suppress(BrokenPipeError):  # of a process that has ended, which is found out next
        process.stdin.write("\n")  # type: ignore[union-attr]
        process.stdin.flush()  # type: ignore[union-attr]
    _wait(DONE, case, name, process, why)


def _wait(
    word: str, case: Case, name: str, process: subprocess.Popen, why: Callable[[], str]
) -> None:
    """Read until a process says the word; packages print other lines."""
    for line in process.stdout:  # type: ignore[union-attr]
        if line.strip() == word:
            return
    process.wait()
    raise UserError(f"{case.name}: the process of {name} ended: {why()}")


@contextmanager
def _start(
    case: Case,
    contender: str,
    detrex_root: Path | None,
    environment: Mapping[str, str],
    options: Mapping[str, Any] | None = None,
) -> Iterator[tuple[subprocess.Popen, Callable[[], str]]]:
    """A process, and what tells why it ended."""
    request = {
        "measure": case.measure,
        "subject": asdict(case.subject),
        "contender": contender,
        "size": case.size,
        "images": case.images,
        "work": case.work,
        "amp": case.amp,
        "detrex_root": None if detrex_root is None else str(detrex_root),
        "threads": torch.get_num_threads(),
        **(options or {}),
    }
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, __file__, json.dumps(request)],
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )

        def why() -> str:
            errors.seek(0)
            lines = errors.read().strip().splitlines()
            return lines[-1] if lines else f"exit status {process.returncode}"

        try:
            yield process, why
        finally:
            process.kill()
            process.communicate()


# --- in the process -----------------------------------------------------------------------------


def main() -> None:
    """Do what the argument asks for."""
    request = json.loads(sys.argv[1])
    torch.set_num_threads(request["threads"])
    if request.get("keep"):
        keep_freed_memory()
    subject = Subject(**request["subject"])
    root, contender = request["detrex_root"], request["contender"]
    try:
        contest = prepare(subject, Path(root) if root else None, (contender,))
        if contender in contest.unavailable:
            raise Unavailable(contest.unavailable[contender])
        model = contest.models[contender]
        images, work, amp = request["images"], request["work"], request["amp"]
        run = run_of(model, contest.items(request["size"], images), work, amp)
        if request["measure"] == TIME:
            _serve(run)
        elif request["measure"] == STEPS:
            items = contest.items(request["size"], images)
            step_times(contest.ours, items, amp)  # warms up
            rounds = [step_times(contest.ours, items, amp) for _ in range(request["repeats"])]
            times = [[astuple(time) for time in times] for times in rounds]
            print(json.dumps([times, busiest_operators(run)]))
        else:
            # starts threads and loads libraries
            run_of(model, contest.items(WARM_UP, images), work, amp)()
            model.zero_grad(set_to_none=True)
            print(peak_of_process(run))
    except Unavailable as error:
        sys.exit(str(error))


def _serve(run: Callable[[], object]) -> None:
    """Run once for every line of the input."""
    print(READY, flush=True)
    for _ in sys.stdin:
        run()
        print(DONE, flush=True)


if __name__ == "__main__":
    main()
