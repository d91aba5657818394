"""Whether freed memory is really kept, as the system counts it."""

import os
import platform
import subprocess
import sys

import pytest
from tiny_run import run_tiny

from engine.memory import keep_freed_memory

# 40 MB is above the size from which glibc never keeps a block by itself
SCRIPT = """
import resource
import torch
from engine.memory import keep_freed_memory

torch.set_num_threads(1)
told = keep_freed_memory()
for _ in range(12):
    first, second = torch.ones(10_000_000), torch.ones(15_000_000)
    del first, second
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    first, second = torch.ones(10_000_000), torch.ones(15_000_000)
    del first, second
print(told, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
GLIBC = platform.libc_ver()[0] == "glibc"


def page_faults(**environment: str) -> tuple[bool, int]:
    """Whether the allocator was told, and the pages that ten rounds of 100 MB were given."""
    plain = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))
    }
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**plain, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    told, faults = result.stdout.split()
    return told == "True", int(faults)


@pytest.mark.skipif(not GLIBC, reason="the C library is not glibc")
def test_large_blocks_are_used_again() -> None:
    told, faults = page_faults()
    assert told
    assert faults < 100


@pytest.mark.skipif(not GLIBC, reason="the C library is not glibc")
def test_what_the_environment_says_stays() -> None:
    told, faults = page_faults(MALLOC_MMAP_THRESHOLD_="65536")
    assert not told
    # at least a page of 2 MiB for each of them
    assert faults > 10 * 100_000_000 / 2**21


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"])
def test_nothing_is_set_twice(name: str) -> None:
    assert not keep_freed_memory({name: "1"})


def test_no_glibc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda _: object())
    assert not keep_freed_memory({})


def test_a_run_on_the_cpu_keeps_it(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr("engine.run.keep_freed_memory", lambda: calls.append(1))
    run_tiny(tmp_path / "run", "train.device=cpu", "train.max_iter=1")
    assert calls == [1]
