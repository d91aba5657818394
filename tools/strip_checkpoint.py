#!/usr/bin/env python
"""Write the plain detector's checkpoint: without what only KS-DETR's training uses.

    python tools/strip_checkpoint.py output/run/model_final.pth plain.pth

The weights stay as they are, averaged ones too; optimiser and training state are left out.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import projects  # noqa: F401  (makes detectron2 importable)

# isort: split
import torch

from engine.checkpoint import save_atomically
from engine.errors import UserError, exit_code_of
from projects.ks_detr.checkpoint import plain_state_dict

WEIGHTS = ("model", "ema_state")


def read_weights(path: Path) -> dict[str, dict[str, Any]]:
    """Read a checkpoint's weights, and their averages if it holds some.

    Raises:
        UserError: no such file, or it is not a checkpoint.
    """
    if not path.is_file():
        raise UserError(f"checkpoint {path} not found")
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # torch raises many types on damaged files
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"cannot read checkpoint {path}: {reason}") from error
    if isinstance(content, dict) and "model" not in content:
        content = {"model": content}
    if not isinstance(content, dict) or not isinstance(content["model"], dict):
        raise UserError(f"{path} is not a checkpoint: it holds no dict of weights")
    return {name: content[name] for name in WEIGHTS if content.get(name)}


def strip(source: Path, target: Path, *, overwrite: bool = False) -> list[str]:
    """Write ``source`` without the training-only weights to ``target``; return their keys.

    Raises:
        UserError: there is nothing to drop, or ``target`` exists and is not to be replaced.
    """
    if target.exists() and not overwrite:
        raise UserError(f"{target} exists: use --overwrite to replace it")
    if not target.parent.is_dir():
        raise UserError(f"folder {target.parent} not found")
    weights = read_weights(source)
    plain = {name: plain_state_dict(state) for name, state in weights.items()}
    dropped = [key for key in weights["model"] if key not in plain["model"]]
    if not dropped:
        raise UserError(f"{source} holds no weight that only KS-DETR's training uses")
    save_atomically(plain, target)
    return dropped


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("input", type=Path, help="a checkpoint of a KS-DETR training")
    parser.add_argument("output", type=Path, help="the file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it exists")
    args = parser.parse_args(arguments)

    def run() -> None:
        dropped = strip(args.input, args.output, overwrite=args.overwrite)
        print(f"dropped {len(dropped)} weights:", *dropped, sep="\n  ")
        print(f"plain checkpoint: {args.output}")

    return exit_code_of(run)


if __name__ == "__main__":
    sys.exit(main())
