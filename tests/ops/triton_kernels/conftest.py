"""Kernel modules on a machine without a GPU: to be compiled, or run by Triton's interpreter."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

KERNELS = Path(__file__).resolve().parents[3] / "ops" / "triton_kernels"

Loader = Callable[[str], ModuleType]


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Loader]:
    """Give what loads ``ops/triton_kernels/<name>.py`` with kernels that take CPU tensors.

    Triton decides when a function is decorated whether it is compiled or interpreted. Its own
    functions, ``tl.sum`` for one, are interpreted until the test is over.
    """
    language = triton_module("triton.language")
    interpreter = triton_module("triton.runtime.interpreter")
    jit = triton_module("triton.runtime.jit")
    mend(interpreter, language, monkeypatch)
    with contextlib.suppress(ImportError):
        # The interpreter would import it at its first launch, while the language is patched.
        importlib.import_module("triton.experimental.gluon")
    core = language.core
    # The interpreter leaves patches behind from functions that a kernel calls.
    with unchanged(language, core, language.math, core.tensor, core.dtype):
        for name, function in list(vars(language).items()):
            if isinstance(function, jit.JITFunction):
                setattr(language, name, interpreter.InterpretedFunction(function.fn))
        yield lambda name: load(name, interpret=True)


def mend(interpreter: Any, language: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work around two faults of the interpreter.

    It keeps a number in an array with one axis, which numpy 2.4 no longer takes for the end of a
    range, and multiplies bfloat16 matrices as if they held integers.
    """
    convert, dot = interpreter._implicit_cvt, interpreter.InterpreterBuilder.create_dot

    def convert_to_scalar(argument: Any) -> Any:
        converted = convert(argument)
        if isinstance(argument, int):
            converted.handle.data = converted.handle.data.reshape(())
        return converted

    def dot_in_float32(self: Any, *matrices: Any) -> Any:
        wide = [
            self.create_fp_ext(x, language.float32) if x.dtype.scalar == language.bfloat16 else x
            for x in matrices[:2]
        ]
        return dot(self, *wide, *matrices[2:])

    monkeypatch.setattr(interpreter, "_implicit_cvt", convert_to_scalar)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot_in_float32)


@contextlib.contextmanager
def unchanged(*owners: Any) -> Iterator[None]:
    """Restore every attribute of some modules and classes at the end."""
    before = [dict(vars(owner)) for owner in owners]
    try:
        yield
    finally:
        for owner, attributes in zip(owners, before, strict=True):
            for name, now in list(vars(owner).items()):
                if name not in attributes:
                    delattr(owner, name)
                elif now is not attributes[name]:
                    setattr(owner, name, attributes[name])


@pytest.fixture
def compiled() -> Loader:
    """Return what loads ``ops/triton_kernels/<name>.py`` with kernels that can be compiled."""
    triton_module("triton")
    return lambda name: load(name, interpret=False)


@pytest.fixture
def compile_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[int], list[Any]]:
    """Return what makes launches compile for a compute capability, 90 for one, and do no more.

    It returns a list, to which every launch will append its kernel. CPU tensors stand for CUDA's.
    """
    driver = triton_module("triton.runtime.driver").driver
    jit_function = triton_module("triton.runtime.jit").JITFunction
    target = triton_module("triton.backends.compiler").GPUTarget
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    launched: list[Any] = []
    run = jit_function.run

    def compile_kernel(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launched.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    def start(capability: int) -> list[Any]:
        device = SimpleNamespace(
            get_current_device=lambda: capability,
            get_current_stream=lambda device: 0,
            get_current_target=lambda: target("cuda", capability, 32),
        )
        name = "_active" if hasattr(driver, "_active") else "active"  # the latter up to Triton 3.4
        monkeypatch.setattr(driver, name, device)
        monkeypatch.setattr(jit_function, "run", compile_kernel)
        return launched

    return start


def triton_module(name: str) -> ModuleType:
    return pytest.importorskip(name, reason="Triton cannot be imported", exc_type=ImportError)


@cache
def load(name: str, interpret: bool) -> ModuleType:
    """Import a module of a copy of the package under another name."""
    copy = f"triton_kernels_{'interpreted' if interpret else 'compiled'}"
    if copy not in sys.modules:
        spec = importlib.util.spec_from_file_location(copy, KERNELS / "__init__.py")
        assert spec
        sys.modules[copy] = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", str(int(interpret)))
        return importlib.import_module(f"{copy}.{name}")
