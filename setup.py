"""Build of the compiled operators; all other facts about the package stand in pyproject.toml.

All sources below ``ops/csrc`` go into one extension, ``ops._C``. It is optional: without sources,
torch or a working compiler the package installs all the same and runs its pure-PyTorch path.
"""

import os
import runpy
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).resolve().parent
# OpenMP is what torch's parallel loops are made of. Vector types never cross a call, so that what
# GCC says about their calling convention (-Wpsabi) does not apply.
COMPILE_FLAGS = ["-O3", "-std=c++20", "-fopenmp", "-Wall", "-Wno-psabi", "-Wno-unknown-pragmas"]
COMPILE_FLAGS += ["-Wno-unknown-warning-option", "-Wno-maybe-uninitialized"]  # GCC 12's headers


def warn(reason: str) -> None:
    """Say once, in one line, that the compiled operators will be missing."""
    print(
        f"warning: compiled operators were not built ({reason}); the pure-PyTorch path is used",
        file=sys.stderr,
    )


def _literal(text: str) -> str:
    """A string of C++."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def build_arguments() -> dict:
    """Return ``setup``'s arguments for the extension; none where it cannot or need not be built."""
    sources = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("ops/csrc/**/*.cpp"))
    if not sources:
        return {}
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        warn(f"{error}; install torch first, then this project with --no-build-isolation")
        return {}

    class OptionalBuild(BuildExtension):
        """Compile the operators; a failure costs speed, never the installation."""

        def run(self) -> None:
            try:
                super().run()
            except Exception as error:
                self.extensions: list[Extension] = []  # what is not built is not installed either
                suffix = sysconfig.get_config_var("EXT_SUFFIX")
                for stale in ROOT.glob(f"ops/_C*{suffix}"):  # from other sources or another torch
                    stale.unlink()
                lines = str(error).strip().splitlines()
                warn(lines[0] if lines else type(error).__name__)

    flags = " ".join([*COMPILE_FLAGS, os.environ.get("CFLAGS", "")]).strip()
    digest = runpy.run_path(str(ROOT / "ops/_sources.py"))["sources_digest"](ROOT / "ops/csrc")
    extension = CppExtension(
        "ops._C",
        sources,
        depends=sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("ops/csrc/**/*.h")),
        define_macros=[
            ("DETR_METHODS_FLAGS", _literal(flags)),
            ("DETR_METHODS_SOURCES", _literal(digest)),
        ],
        extra_compile_args=COMPILE_FLAGS,
        extra_link_args=["-fopenmp"],
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": OptionalBuild}}


setup(**build_arguments())
