"""Fixtures: each operator on every backend that this machine has."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import pytest
from recorded_cases import RecordedCases

from ops import _library

CAPABILITIES = ["avx512", "avx2", "baseline"]
BACKENDS = [*CAPABILITIES, "PyTorch"]


@pytest.fixture
def capability() -> Iterator[str]:
    """The vector instructions in use; whatever a test chooses is undone."""
    if _library.COMPILED_PATH is None:
        pytest.skip(_library.MISSING_REASON)
    before = _library.cpu_capability()
    yield before
    _library.set_cpu_capability(before)


@pytest.fixture(params=CAPABILITIES)
def compiled(request: pytest.FixtureRequest, capability: str) -> str:
    """Run a test with each kind of vector instructions."""
    try:
        _library.set_cpu_capability(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    return request.param


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test on the compiled kernels, with each kind of vectors, and on the reference."""
    if request.param == "PyTorch":
        for name in ("deformable_attention", "gaussian_attention"):
            module = importlib.import_module(f"ops.{name}")
            monkeypatch.setattr(module, "has_kernels", lambda tensor: False)
    else:
        request.getfixturevalue("capability")
        try:
            _library.set_cpu_capability(request.param)
        except ValueError as error:
            pytest.skip(str(error))
    return request.param


@pytest.fixture(scope="session")
def layer_cases(reference_dir):
    """Recorded cases of detrex's layers."""
    return RecordedCases(reference_dir / "detrex", "layers")
