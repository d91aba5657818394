"""What runs where, and what happens without the compiled library."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ops
from ops import _library

ROOT = Path(__file__).resolve().parents[2]
CPU_INFO = Path("/proc/cpuinfo")
needs_kernels = pytest.mark.skipif(
    _library.COMPILED_PATH is None, reason="the operator is not built"
)
USE_ALL = """
import torch, ops
value, weights = torch.rand(1, 12, 2, 4), torch.rand(1, 5, 2, 1, 3)
ops.multi_scale_deformable_attention(value, [(3, 4)], torch.rand(1, 5, 2, 1, 3, 2), weights)
tokens, places = torch.rand(1, 2, 12, 4), torch.rand(1, 2, 12, 2)
ops.gaussian_attention(tokens, tokens, tokens, (3, 4), places, places)
ops.linear_sum_assignment(torch.rand(2, 5, 3), [1, 2])
ops.dropout_add(ops.relu_dropout(torch.rand(2, 5)), torch.rand(2, 5))
"""


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_this_machine_has_compiled_operators() -> None:
    """Where a compiler is, a failed build must not hide behind the fallback."""
    if not any((ROOT / "ops").glob("_C*.so")):
        pytest.skip("not built; `make env` says why")
    assert _library.backend("cpu") == "C++", _library.MISSING_REASON


def test_without_the_library_everything_works_after_one_warning(tmp_path: Path) -> None:
    result = python("-c", USE_ALL, DETR_METHODS_OPS=str(tmp_path / "_C*.so"))
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("OperatorWarning") == 1
    assert "compiled operators are missing (no _C*.so: run" in result.stderr
    assert "pure-PyTorch path" in result.stderr


def test_a_library_that_does_not_load_is_one_warning_with_its_reason(tmp_path: Path) -> None:
    broken = tmp_path / "_C.so"
    broken.write_bytes(b"no library")
    result = python("-c", USE_ALL, DETR_METHODS_OPS=str(broken))
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("OperatorWarning") == 1
    assert f"{broken} does not load: " in result.stderr
    assert "file too short" in result.stderr or "invalid" in result.stderr


@needs_kernels
def test_with_the_library_there_is_no_warning() -> None:
    result = python("-W", "error", "-c", USE_ALL)
    assert (result.returncode, result.stderr) == (0, "")


def test_the_report_names_backends_and_build() -> None:
    result = python("-m", "ops")
    assert result.returncode == 0, result.stderr
    rows = dict(line.split(maxsplit=1) for line in result.stdout.splitlines() if line)
    composed = {"convolution_1x1", "linear", "relu_feed_forward"}  # of others
    names = {name for name in ops.__all__ if name.islower()} - composed
    for name in names:
        assert rows[name].split()[0] == _library.backend("cpu")
    assert rows["dropout_add"].split()[1] == "PyTorch"  # on CUDA
    assert torch.__version__ in result.stdout
    if _library.COMPILED_PATH is not None:
        for word in ("-O3", "-fopenmp", _library.cpu_capability()):
            assert word in result.stdout


def test_the_report_says_why_the_library_is_missing(tmp_path: Path) -> None:
    result = python("-W", "ignore", "-m", "ops", DETR_METHODS_OPS=str(tmp_path / "none.so"))
    assert "missing: no none.so" in result.stdout
    assert "PyTorch" in result.stdout


def test_capability_is_checked(capability: str) -> None:
    with pytest.raises(ValueError, match="cpu capability is 'sse9', expected avx512, avx2 or base"):
        _library.set_cpu_capability("sse9")
    _library.set_cpu_capability("baseline")
    assert _library.cpu_capability() == "baseline"
    _library.set_cpu_capability(capability)


@pytest.mark.skipif(not CPU_INFO.exists(), reason="Linux says who made the processor")
def test_the_maker_of_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    if _library.COMPILED_PATH is not None:
        assert _library.is_intel() == ("GenuineIntel" in CPU_INFO.read_text())
    monkeypatch.setattr(_library, "COMPILED_PATH", None)
    assert not _library.is_intel()


def test_backends_by_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _library.backend("mps") == "PyTorch"
    monkeypatch.setattr(_library, "HAS_TRITON", True)
    assert _library.backend("cuda") == "Triton"
    monkeypatch.setattr(_library, "HAS_TRITON", False)
    assert _library.backend("cuda") == "PyTorch"
