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
from ops._sources import sources_digest, why_unfit

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "ops" / "csrc"
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


def origin(digest: str, torch_version: str = torch.__version__) -> bytes:
    """What a library says of the sources and the torch it was built from."""
    return f"detr_methods sources {digest} torch {torch_version.partition('+')[0]}\0".encode()


def test_a_library_that_does_not_load_is_one_warning_with_its_reason(tmp_path: Path) -> None:
    broken = tmp_path / "_C.so"
    broken.write_bytes(b"no library, " + origin(sources_digest(SOURCES)))
    result = python("-c", USE_ALL, DETR_METHODS_OPS=str(broken))
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("OperatorWarning") == 1
    assert f"{broken} does not load: " in result.stderr
    assert "file too short" in result.stderr or "invalid" in result.stderr


def test_what_was_built_from_other_sources_is_not_loaded(tmp_path: Path) -> None:
    stale = tmp_path / "_C.so"
    stale.write_bytes(b"\x7fELF" + origin("0123456789abcdef"))
    result = python("-c", USE_ALL, DETR_METHODS_OPS=str(stale))
    assert result.returncode == 0, result.stderr
    assert f"{stale} was built from other sources: run `python setup.py" in result.stderr


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "was built from other sources"),
        (b"an older build", "was built from other sources"),
        (origin("0123456789abcdef", "1.13.1"), "was built with torch 1.13.1, not 2.13.0"),
    ],
)
def test_a_library_that_fits_nothing(tmp_path: Path, content: bytes, reason: str) -> None:
    library = tmp_path / "_C.so"
    library.write_bytes(content)
    assert why_unfit(library, SOURCES, "2.13.0") == reason


def test_bug_fixes_of_torch_and_missing_sources_make_no_library_unfit(tmp_path: Path) -> None:
    library = tmp_path / "_C.so"
    library.write_bytes(b"\0 code \0" + origin("0123456789abcdef", "2.13.0"))
    assert why_unfit(library, tmp_path / "none", "2.13.1+cpu") == ""
    assert why_unfit(library, tmp_path / "none", "2.12.0") != ""
    assert why_unfit(library, SOURCES, "2.13.0") != ""


def test_the_digest_is_of_names_and_contents(tmp_path: Path) -> None:
    digests = set()
    for name, content in (("a.h", b"1"), ("a.h", b"2"), ("b.cpp", b"2"), ("sub/b.cpp", b"2")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
        (tmp_path / "notes.txt").write_bytes(content)
        digests.add(sources_digest(tmp_path))
        (tmp_path / name).unlink()
    assert len(digests) == 4
    assert sources_digest(tmp_path) == ""


@needs_kernels
def test_another_python_s_library_beside_it_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / "_C.cpython-310-x86_64-linux-gnu.so").write_bytes(b"another Python's")
    own = Path(_library.COMPILED_PATH)
    (tmp_path / own.name).symlink_to(own)
    result = python("-W", "error", "-c", USE_ALL, DETR_METHODS_OPS=str(tmp_path / "_C*.so"))
    assert (result.returncode, result.stderr) == (0, "")


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
    assert rows["linear_sum_assignment"].split()[1] == "host"
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
