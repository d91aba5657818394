"""Draw losses, learning rate and AP, also by branch, over the iterations of a run.

python tools/plot_metrics.py --output-dir output/quickstart
"""

import argparse
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from engine.errors import UserError, exit_code_of

# A decoder layer's loss is a term of its branch's curve, not a curve.
_LAYER = re.compile(r"_\d+(?=_|$)")
_TERM = re.compile(r"loss_(class|bbox|giou)")
_BRANCH_AP = re.compile(r"(?!ema/)(\w+)/bbox/AP")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read ``metrics.json``: one record per iteration, in order.

    A line cut off by an interruption, or damaged, is skipped. Where a resumed run has written an
    iteration again, the later values count.
    """
    records: dict[int, dict[str, Any]] = {}
    for line in path.read_bytes().splitlines():
        try:
            record = json.loads(line)
            iteration = int(record["iteration"])
        except (ValueError, KeyError, TypeError, OverflowError):
            continue
        if "total_loss" in record:  # resumed from here: what lay beyond was lost
            records = {i: r for i, r in records.items() if i <= iteration}
        records.setdefault(iteration, {}).update(record, iteration=iteration)
    return [records[iteration] for iteration in sorted(records)]


def series(records: Iterable[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Iterations that have a number under `key`, and those numbers."""
    found = [(r["iteration"], r[key]) for r in records if _is_number(r.get(key))]
    return [iteration for iteration, _ in found], [value for _, value in found]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def loss_groups(record: dict[str, Any]) -> dict[str, list[str]]:
    """Loss names by curve: each term of each branch, its decoder layers together."""
    groups: dict[str, list[str]] = {}
    for key in sorted(record):
        if key.startswith("loss_"):
            groups.setdefault(_LAYER.sub("", key), []).append(key)
    return groups


def branch_of(curve: str) -> str:
    """What a curve's name adds to its term: ``share_v`` in ``loss_class_share_v``."""
    return _TERM.sub("", curve).strip("_") or "student"


def evaluated_branches(records: Iterable[dict[str, Any]]) -> list[str]:
    """Branches whose AP was measured, the student first."""
    keys = dict.fromkeys(key for record in records for key in record)
    names = [found[1] for found in map(_BRANCH_AP.fullmatch, keys) if found]
    return sorted(names, key=lambda name: (name != "student", name))  # as among the losses


def _plot_losses(axes: Axes, records: list[dict[str, Any]]) -> None:
    axes.plot(*series(records, "total_loss"), color="black", linewidth=1.8, label="total")
    every = loss_groups({key: None for record in records for key in record})
    branches = list(dict.fromkeys(branch_of(curve) for curve in every))
    branches.sort(key=lambda name: name != "student")
    terms = list(dict.fromkeys(_term_of(curve) for curve in every))
    for curve, keys in every.items():
        summed = [
            {"iteration": r["iteration"], curve: sum(r[k] for k in keys if _is_number(r.get(k)))}
            for r in records
            if any(_is_number(r.get(k)) for k in keys)
        ]
        axes.plot(
            *series(summed, curve),
            color=f"C{branches.index(branch_of(curve)) % 10}",
            linestyle=("-", "--", ":", "-.")[terms.index(_term_of(curve)) % 4],
            linewidth=1,
            label=curve.removeprefix("loss_"),
        )
    axes.set(yscale="log", ylabel="loss (log scale)")
    axes.legend(fontsize="small", ncols=2)
    axes.grid(alpha=0.3)
    rate = axes.twinx()
    rate.plot(*series(records, "lr"), color="grey", linewidth=0.8, alpha=0.8)
    rate.set_ylabel("learning rate", color="grey")
    rate.set_ylim(bottom=0)


def _term_of(curve: str) -> str:
    found = _TERM.match(curve)
    return found[1] if found else curve


def _plot_precision(axes: Axes, records: list[dict[str, Any]]) -> None:
    drawn = False
    for name in ("AP", "AP50", "AP75"):
        iterations, values = series(records, f"bbox/{name}")
        if iterations:
            drawn = True
            axes.plot(iterations, values, marker="o", markersize=4, label=name)
            place = iterations[-1], values[-1]
            axes.annotate(f"{values[-1]:.1f}", place, (5, 3), textcoords="offset points")
    if drawn:
        axes.legend(fontsize="small")
    else:
        axes.text(0.5, 0.5, "no evaluation yet", ha="center", transform=axes.transAxes)
    _finish_precision(axes, "COCO box AP")


def _finish_precision(axes: Axes, label: str) -> None:
    axes.set_ylabel(label)
    axes.margins(x=0.06, y=0.12)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)


def _plot_branches(axes: Axes, records: list[dict[str, Any]], branches: list[str]) -> None:
    student = dict(zip(*series(records, "student/bbox/AP"), strict=True))
    for name in branches:
        iterations, values = series(records, f"{name}/bbox/AP")
        if not values:
            continue
        label = f"{name} {values[-1]:.1f}"  # at the curves' ends they would cover one another
        if name != "student" and iterations[-1] in student:
            label += f" ({values[-1] - student[iterations[-1]]:+.1f})"
        axes.plot(iterations, values, marker="o", markersize=4, label=label)
    axes.legend(fontsize="small")
    _finish_precision(axes, "COCO box AP by branch")


def plot(records: list[dict[str, Any]], path: Path) -> None:
    """Write the picture of all curves."""
    branches = evaluated_branches(records)
    panels = 3 if branches else 2
    figure, axes = plt.subplots(
        panels,
        1,
        figsize=(9, 8 if panels == 2 else 11),
        sharex=True,
        height_ratios=(3, 2, 2)[:panels],
        layout="constrained",
    )
    _plot_losses(axes[0], records)
    _plot_precision(axes[1], records)
    if branches:
        _plot_branches(axes[2], records, branches)
    axes[-1].set_xlabel("iteration")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", type=Path, required=True, help="folder with metrics.json")
    args = parser.parse_args(arguments)
    try:
        records = read_metrics(args.output_dir / "metrics.json")
    except OSError as error:
        raise UserError(str(error)) from None
    if not records:
        raise UserError(f"{args.output_dir / 'metrics.json'} holds no record")
    path = args.output_dir / "curves.png"
    plot(records, path)
    print(f"curves: {path}")


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
