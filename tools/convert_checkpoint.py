#!/usr/bin/env python
"""Convert weights of other projects' releases to those of a config's model.

    python tools/convert_checkpoint.py INPUT OUTPUT --config-file FILE [--from LAYOUT]
        [--overwrite] [key=value ...]

INPUT is a .pth, .bin or .safetensors file. Its layout is recognised by its keys. Every key and
shape is checked against the model before OUTPUT, a .pth file, is written.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import projects  # noqa: F401  (makes detectron2 importable)

# isort: split
from detectron2.config import instantiate

from detectors.conversion.adamixer import ADAMIXER
from detectors.conversion.convert import convert
from detectors.conversion.deformable import DEFORMABLE_DETR, DN_DEFORMABLE_DETR
from detectors.conversion.detrex import DETREX
from detectors.conversion.files import read_weights
from detectors.conversion.huggingface import (
    HF_CONDITIONAL_DETR,
    HF_DAB_DETR,
    HF_DEFORMABLE_DETR,
    HF_DETR,
)
from detectors.conversion.layout import ConversionError, Layout, recognise
from detectors.conversion.official import CONDITIONAL_DETR, DAB_DETR, DETR, DN_DETR
from engine.checkpoint import save_atomically
from engine.config import load_config
from engine.errors import UserError, exit_code_of
from projects.ks_detr.checkpoint import KS_DETR
from projects.smca.checkpoint import SMCA

LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        DETREX,
        DETR,
        CONDITIONAL_DETR,
        DAB_DETR,
        DN_DETR,
        DEFORMABLE_DETR,
        DN_DEFORMABLE_DETR,
        ADAMIXER,
        SMCA,
        KS_DETR,
        HF_DETR,
        HF_CONDITIONAL_DETR,
        HF_DAB_DETR,
        HF_DEFORMABLE_DETR,
    )
}
"""By their names on the command line."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="layouts: " + "; ".join(f"{x.name} ({x.origin})" for x in LAYOUTS.values()),
    )
    parser.add_argument("input", type=Path, help="the file to convert")
    parser.add_argument("output", type=Path, help="the .pth file to write")
    parser.add_argument("--config-file", required=True, metavar="FILE", help="of the model")
    parser.add_argument(
        "--from", dest="layout", choices=LAYOUTS, metavar="LAYOUT", help="the input's, see below"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUTPUT if it exists")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes of the config")
    return exit_code_of(lambda: run(parser.parse_intermixed_args(arguments)))


def run(args: argparse.Namespace) -> None:
    """Read, convert, check, write.

    Raises:
        UserError: a file or the config is unusable, or the weights do not fit the model.
    """
    check_output(args.output, overwrite=args.overwrite)
    config = load_config(args.config_file, args.overrides)
    try:
        weights = read_weights(args.input)
        layout = LAYOUTS[args.layout] if args.layout else recognise(weights, LAYOUTS.values())
        converted = convert(weights, layout, instantiate(config.model), report=print)
    except ConversionError as error:
        raise UserError(str(error)) from error
    save_atomically({"model": converted}, args.output)
    print(f"{args.input}: {layout.name} ({layout.origin}), {len(weights)} weights")
    print(f"{args.output}: {len(converted)} weights, all that the model has")


def check_output(path: Path, *, overwrite: bool) -> None:
    """Refuse an output before any work is done for it."""
    if path.suffix != ".pth":
        raise UserError(f"the output is {path}, expected a .pth file")
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists: use --overwrite to replace it")
    if not path.parent.is_dir():
        raise UserError(f"folder {path.parent} not found")


if __name__ == "__main__":
    sys.exit(main())
