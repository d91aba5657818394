#!/usr/bin/env python
"""What a distillation step costs beside the student's own step and the teacher's inference.

    python tools/benchmark_distillation.py --config-file FILE
    python tools/benchmark_distillation.py --config-file FILE --each --size 480 640 --rounds 7
    python tools/benchmark_distillation.py --config-file FILE --only-memory --size 800 1066

Steps are forward and backward on random images with random weights. Cases are timed in turns, on
the CPU in seconds of the process, which do not grow with what else the machine does. Peaks are
resident memory beyond that before the step, on the CPU, each case in a process of its own. "maps
kept" is the step that keeps all attention weights, as plain operations would. It and "student"
compute nothing twice, whatever the student's decoder.checkpoint_layers says of the others.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import projects  # noqa: F401  (makes detectron2 importable)

# isort: split
import torch
from detectron2.config import instantiate
from detectron2.structures import Boxes, Instances
from omegaconf import DictConfig
from tabulate import tabulate

from detectors.decoder import CheckpointLayers, Decoder
from detectors.structures import AttentionMaps
from engine.config import load_config
from engine.errors import UserError, exit_code_of
from engine.settings import resolve_device
from projects.detr_distill.attention_maps import AttentionDistillation
from projects.detr_distill.distiller import Distiller
from tools.benchmark_measure import Budget, interleave, spread
from tools.benchmark_memory import peak_of_process
from tools.benchmark_peers import Unavailable

STUDENT, TEACHER, STEP, KEPT = "student", "teacher", "distillation", "maps kept"
BOXES = 7
"""In an image, as COCO has them on average."""
MIB = 2**20


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="FILE", help="of a distillation")
    parser.add_argument("--size", type=int, nargs=2, default=(480, 640), metavar=("H", "W"))
    parser.add_argument("--batch", type=int, default=2, help="images (%(default)s)")
    parser.add_argument("--each", action="store_true", help="also each objective by itself")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="of the timing (%(default)s)")
    parser.add_argument("--only-memory", action="store_true", help="do not time")
    parser.add_argument("--only-time", action="store_true", help="do not measure memory")
    parser.add_argument("--cases", nargs="+", metavar="NAME", help="(all)")
    parser.add_argument("--peak-of", metavar="NAME", help="print one case's peak in bytes")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser.parse_intermixed_args(arguments)


class KeepingDistiller(Distiller):
    """Attention weights are kept from where they are made to the end of the backward pass."""

    @staticmethod
    def new_maps() -> AttentionMaps:
        """Collects weights as they are made."""
        return AttentionMaps()


class Bench:
    """The cases of a config.

    Args:
        config: whose model is a distillation; its teacher needs no checkpoint here.
        batch: images of a step.
        size: (h, w) of each.
        device: where the detectors live.
    """

    def __init__(self, config: DictConfig, batch: int, size: Sequence[int], device: str):
        self.nodes = config.model.objectives
        self.batch = batch
        self.student = instantiate(config.model.student).to(device).train()
        self.teacher = instantiate(config.model.teacher.detector).to(device).eval()
        self.checkpoint_layers = self.decoder.checkpoint_layers
        self.set_size(size)

    @property
    def decoder(self) -> Decoder:
        """The student's."""
        return self.student.transformer.decoder

    def set_size(self, size: Sequence[int]) -> None:
        """Take images of another (h, w)."""
        self.inputs = make_inputs(self.batch, size, self.student.num_classes)

    def names(self, each: bool) -> list[str]:
        """What can be measured."""
        objectives = instantiate(self.nodes)
        names = [STUDENT, TEACHER, STEP]
        if each:
            names += [_label(place, part) for place, part in enumerate(objectives)]
        if any(isinstance(part, AttentionDistillation) for part in objectives):
            names.append(KEPT)
        return names

    def case(self, name: str) -> Callable[[], None]:
        """A case, ready to be called."""
        if name == TEACHER:
            return torch.no_grad()(lambda: self.teacher(self.inputs))
        if name == STUDENT:
            return lambda: self._step(self.student, False)
        objectives = list(instantiate(self.nodes))
        if name == KEPT:
            for part in objectives:
                if isinstance(part, AttentionDistillation):
                    part.recomputed_loss = part.layer_loss  # type: ignore[method-assign]
        elif name != STEP:
            objectives = [part for i, part in enumerate(objectives) if _label(i, part) == name]
        kind = KeepingDistiller if name == KEPT else Distiller
        model = kind(self.student, self.teacher, objectives).to(self.student.device).train()
        checkpointed = False if name == KEPT else self.checkpoint_layers
        return lambda: self._step(model, checkpointed)

    def _step(self, model: torch.nn.Module, checkpoint_layers: CheckpointLayers) -> None:
        self.decoder.checkpoint_layers = checkpoint_layers
        model.zero_grad(set_to_none=True)
        torch.stack(list(model(self.inputs).values())).sum().backward()


def _label(place: int, objective: torch.nn.Module) -> str:
    group = " (fixed)" if getattr(objective, "needs_group", False) else ""
    return f"{place}: {type(objective).__name__}{group}"


def make_inputs(batch: int, size: Sequence[int], num_classes: int) -> list[dict]:
    """Images of noise with random ground truth."""
    generator = torch.Generator().manual_seed(0)
    height, width = size
    inputs = []
    for _ in range(batch):
        instances = Instances((height, width))
        corners = torch.rand(BOXES, 4, generator=generator).view(-1, 2, 2).sort(1).values
        scale = torch.tensor([width, height, width, height])
        instances.gt_boxes = Boxes(corners.flatten(1) * scale)
        instances.gt_classes = torch.randint(num_classes, (BOXES,), generator=generator)
        image = torch.rand(3, height, width, generator=generator) * 255
        inputs.append({"image": image, "instances": instances})
    return inputs


def own_peak(bench: Bench, name: str, size: Sequence[int]) -> int:
    """Peak of a case in this process, after a step on small images has loaded what stays."""
    run = bench.case(name)
    bench.set_size((64, 64))
    run()
    bench.set_size(size)
    bench.student.zero_grad(set_to_none=True)
    try:
        return peak_of_process(run)
    except Unavailable as error:
        raise UserError(f"the system does not tell the memory: {error}") from error


def peaks(names: Sequence[str]) -> dict[str, int]:
    """Peak of every case, in bytes, by this command in processes of their own."""
    found = {}
    for name in names:
        result = subprocess.run(
            [sys.executable, *sys.argv, f"--peak-of={name}", "--device=cpu"],
            env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},  # freed blocks are given back
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        if result.returncode:
            raise UserError(f"measuring the memory of '{name}' ended with {result.returncode}")
        found[name] = int(result.stdout.splitlines()[-1])
    return found


def time_table(times: Mapping[str, Sequence[float]]) -> str:
    """Seconds of every case, and its ratio to student and teacher."""
    rows = []
    base = None
    if STUDENT in times and TEACHER in times:
        base = [a + b for a, b in zip(times[STUDENT], times[TEACHER], strict=True)]
    for name, seconds in times.items():
        row = [name, f"{spread(seconds).median:.3f}"]
        if base is not None:
            ratio = spread([own / both for own, both in zip(seconds, base, strict=True)])
            row.append(f"{ratio.median:.3f} ({ratio.low:.3f} to {ratio.high:.3f})")
        rows.append(row)
    return tabulate(rows, ["step", "seconds", "of student + teacher"], tablefmt="github")


def memory_table(found: Mapping[str, int]) -> str:
    """Peak of every case, what it adds to the student's, and both as shares of "maps kept"."""
    alone, kept = found.get(STUDENT), found.get(KEPT)
    rows = []
    for name, peak in found.items():
        row = [name, f"{peak / MIB:.0f}"]
        row.append("" if alone is None else f"{(peak - alone) / MIB:.0f}")
        row.append("" if kept is None else f"{peak / kept:.2f}")
        comparable = alone is not None and kept is not None and kept > alone
        row.append(f"{(peak - alone) / (kept - alone):.2f}" if comparable else "")  # type: ignore[operator]
        rows.append(row)
    headers = ["step", "peak, MiB", "beyond the student", "of maps kept", "beyond, of maps kept"]
    return tabulate(rows, headers, tablefmt="github")


def main(args: argparse.Namespace) -> None:
    """Measure and print.

    Raises:
        UserError: the config is of no distillation, or there is no such case.
    """
    config = load_config(args.config_file, args.overrides)
    if "objectives" not in config.model:
        raise UserError(f"{args.config_file} trains no student: its model has no objectives")
    torch.manual_seed(0)
    device = resolve_device(args.device)
    bench = Bench(config, args.batch, args.size, device)
    known = bench.names(args.each or bool(args.peak_of))
    names = args.cases or known
    for name in [*names, *filter(None, [args.peak_of])]:
        if name not in known:
            raise UserError(f"there is no case '{name}', expected one of {', '.join(known)}")
    if args.peak_of:
        print(own_peak(bench, args.peak_of, args.size))
        return
    height, width = args.size
    print(f"{args.batch} x {height} x {width}, {torch.get_num_threads()} threads\n")
    if not args.only_memory:
        runs = {name: bench.case(name) for name in names}
        if device == "cuda":
            times = interleave(runs, Budget(args.rounds), synchronize=torch.cuda.synchronize)
        else:
            times = interleave(runs, Budget(args.rounds), clock=time.process_time)
        print(time_table(times) + "\n")
    if not args.only_time:
        print(memory_table(peaks(names)))


if __name__ == "__main__":
    args = parse()
    sys.exit(exit_code_of(lambda: main(args)))
