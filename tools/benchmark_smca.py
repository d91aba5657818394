r"""Time SMCA on one level beside the released way and beside plain DETR, on the CPU, in turns.

    python tools/benchmark_smca.py
    python tools/benchmark_smca.py --only transformer --rounds 10 --threads 2

Same weights and inputs; dropout as in training. A ratio is of peer to ours, its median over the
rounds; what is required of it is in the last column.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import projects  # noqa: F401  (makes detrex importable)

# isort: split
import torch
from detectron2.config import instantiate
from detectron2.structures import Boxes, Instances
from tabulate import tabulate
from torch import Tensor, nn

from detectors.structures import FeatureMaps, Memory, Queries
from detectors.transformer import Transformer
from engine.config import load_config
from engine.errors import UserError, exit_code_of
from projects.smca.decoder import SMCADecoderLayer
from tools.benchmark_measure import Budget, interleave, ratios, spread
from tools.benchmark_memory import peak_of_process
from tools.benchmark_smca_peer import as_released

SMCA = "projects/smca/configs/smca_single_scale_r50_50ep.py"
DETR = "projects/baselines/configs/detr_r50_50ep.py"
SHAPE, BATCH, QUERIES = (25, 34), 2, 300
IMAGE = (800, 1088)
OURS = "ours"
MEMORY_REQUIRED = 0.85


@dataclass(frozen=True)
class Case:
    """What is timed.

    Attributes:
        name: of the case.
        peer: what ours is compared with.
        runs: ours and the peer's.
        required: of the ratio, at least.
    """

    name: str
    peer: str
    runs: Mapping[str, Callable[[], object]]
    required: float


# --- inputs ---------------------------------------------------------------------------------------


def build(path: str) -> nn.Module:
    """A full-size detector with fixed weights, in training mode."""
    torch.manual_seed(0)
    return instantiate(load_config(path, []).model).train()


def feature_maps() -> FeatureMaps:
    """A padded batch of random maps."""
    torch.manual_seed(1)
    level, position = torch.randn(2, BATCH, 256, *SHAPE)
    mask = torch.zeros(BATCH, *SHAPE, dtype=torch.bool)
    mask[1, :, 30:] = True
    sizes = [IMAGE, (IMAGE[0], 30 * 32)]
    return FeatureMaps((level.requires_grad_(),), (mask,), (position,), sizes, IMAGE)


def batched_inputs() -> list[dict]:
    """Two images with three objects each."""
    torch.manual_seed(2)
    items = []
    for _ in range(BATCH):
        instances = Instances(IMAGE)
        corners = torch.rand(3, 2) * 300
        instances.gt_boxes = Boxes(torch.cat([corners, corners + 200], dim=1))
        instances.gt_classes = torch.tensor([3, 17, 56])
        items.append({"image": torch.rand(3, *IMAGE) * 255, "instances": instances})
    return items


# --- cases ----------------------------------------------------------------------------------------


def run_transformer(
    transformer: Transformer, features: FeatureMaps, position: Tensor
) -> tuple[Tensor, ...]:
    """States, and the gradients of the sum of their cubes, of the maps and the queries."""
    memory = replace(transformer.encoder(features), image_sizes=features.sizes())
    rows = position.expand(BATCH, -1, -1)
    output = transformer.decoder(Queries(torch.zeros_like(rows), rows), memory)
    leaves = features.levels[0], position
    for tensor in (*leaves, *transformer.parameters()):
        tensor.grad = None
    output.states.pow(3).sum().backward()  # squares of normalised states are constant
    return output.states.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)


def run_cross_attention(
    transformer: Transformer, content: Tensor, position: Tensor, memory: Memory
) -> tuple[Tensor, ...]:
    """Modulation and cross-attention of one layer, forward and backward."""
    layer: SMCADecoderLayer = transformer.decoder.layers[1]  # type: ignore[assignment, index]
    assert memory.image_sizes is not None
    points = position[..., :2].sigmoid() * memory.image_sizes.flip(-1)[:, None]
    gaussians = layer.modulation(layer.modulation.observe(content, position), points)
    output = layer.attentions[1](content, position, memory, memory.padding_mask, gaussians)
    leaves = content, position, memory.tokens
    for tensor in (*leaves, *layer.parameters()):
        tensor.grad = None
    output.square().sum().backward()
    return output.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)


def transformers() -> tuple[dict[str, Transformer], Tensor]:
    """Ours and the released way's, and the positions of the queries."""
    model = build(SMCA)
    ours: Transformer = model.transformer  # type: ignore[assignment]
    position: Tensor = model.query_embed.weight  # type: ignore[assignment, union-attr]
    return {OURS: ours, "released": as_released(ours)}, position


def cross_attention_case() -> Case:
    """One layer's cross-attention."""
    both, position = transformers()
    features = feature_maps()
    memory = Memory(
        features.tokens().detach().requires_grad_(),
        features.token_padding(),
        features.token_positions(),
        (SHAPE,),
        image_sizes=features.sizes(),
    )
    content = torch.randn(BATCH, QUERIES, 256, requires_grad=True)
    rows = position.detach().expand(BATCH, -1, -1).clone().requires_grad_()
    runs = {
        name: partial(run_cross_attention, part, content, rows, memory)
        for name, part in both.items()
    }
    check(both, runs)
    return Case("decoder cross-attention, forward and backward", "released", runs, 3.0)


def transformer_case() -> Case:
    """Encoder and decoder."""
    both, position = transformers()
    features = feature_maps()
    runs = {name: partial(run_transformer, part, features, position) for name, part in both.items()}
    check(both, runs)
    return Case("transformer, forward and backward", "released", runs, 1.4)


def check(modules: Mapping[str, nn.Module], runs: Mapping[str, Callable[[], tuple]]) -> None:
    """Without dropout, both give the same, but for what float32 rounds off the gradients."""
    for module in modules.values():
        module.eval()
    for ours, theirs in zip(runs[OURS](), runs["released"](), strict=True):
        difference, norm = (ours - theirs).norm().item(), theirs.norm().item()
        if not difference <= 1e-3 * norm:
            raise UserError(f"ours and the released way differ by {difference:.3g} of {norm:.3g}")
    for module in modules.values():
        module.train()


def training_case() -> Case:
    """A detector's losses and their gradients."""
    models, inputs = {OURS: build(SMCA), "DETR": build(DETR)}, batched_inputs()

    def step(model: nn.Module) -> None:
        model.zero_grad()
        sum(model(inputs).values()).backward()

    runs = {name: partial(step, model) for name, model in models.items()}
    return Case("detector, training step", "DETR", runs, 1 / 1.05)


def inference_case() -> Case:
    """A detector's results."""
    models = {OURS: build(SMCA).eval(), "DETR": build(DETR).eval()}
    inputs = batched_inputs()

    def detect(model: nn.Module) -> None:
        with torch.no_grad():
            model(inputs)

    runs = {name: partial(detect, model) for name, model in models.items()}
    return Case("detector, inference", "DETR", runs, 1 / 1.05)


CASES = {
    "cross_attention": cross_attention_case,
    "transformer": transformer_case,
    "training": training_case,
    "inference": inference_case,
}


# --- memory ---------------------------------------------------------------------------------------


def peak(contender: str, threads: int) -> int:
    """Peak extra bytes of the transformer's forward and backward, in a process of its own."""
    request = json.dumps({"contender": contender, "threads": threads})
    result = subprocess.run(
        [sys.executable, __file__, "--measure-memory", request],
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},  # see benchmark_memory.py
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        raise UserError(f"memory of {contender}: {result.stderr.strip().splitlines()[-1]}")
    return int(result.stdout.splitlines()[-1])


def measure_memory(request: str) -> None:
    """What :func:`peak` asks for, printed."""
    wanted = json.loads(request)
    torch.set_num_threads(wanted["threads"])
    both, position = transformers()
    transformer, features = both[wanted["contender"]], feature_maps()
    print(peak_of_process(lambda: run_transformer(transformer, features, position)))


# --- command line ---------------------------------------------------------------------------------


def main() -> None:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=[*CASES, "memory"], help="one case")
    parser.add_argument("--rounds", type=int, help="by default as many as 10 s allow, at least 7")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--measure-memory", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure_memory:
        measure_memory(args.measure_memory)
        return
    if args.threads < 1 or (args.rounds is not None and args.rounds < 1):
        raise UserError("--threads and --rounds have to be positive")
    torch.set_num_threads(args.threads)
    rows = []
    for name, make in CASES.items():
        if args.only in (None, name):
            rows.append(time_row(make(), Budget(args.rounds)))
    if args.only in (None, "memory"):
        rows.append(memory_row(args.threads))
    headers = ["case", "ours", "peer", "", "ratio (quartiles)", "required"]
    print(tabulate(rows, headers, disable_numparse=True))


def time_row(case: Case, budget: Budget) -> list[str]:
    """A line of the table."""
    times = interleave(case.runs, budget)
    ours, peer = (f"{spread(times[name]).median * 1e3:.1f} ms" for name in (OURS, case.peer))
    ratio = ratios(times[OURS], times[case.peer])
    found = f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"
    return [case.name, ours, peer, case.peer, found, f">= {case.required:.2f}"]


def memory_row(threads: int) -> list[str]:
    """The last line of the table, where the ratio is of ours to the peer."""
    ours, peer = (peak(name, threads) for name in (OURS, "released"))
    found, required = f"{ours / peer:.2f}", f"<= {MEMORY_REQUIRED}"
    name = "transformer, peak memory"
    return [name, f"{ours / 2**20:.0f} MiB", f"{peer / 2**20:.0f} MiB", "released", found, required]


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
