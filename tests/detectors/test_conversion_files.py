"""Reading weights from files of every kind."""

import argparse
import json
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from detectors.conversion.files import read_weights
from detectors.conversion.layout import ConversionError

WEIGHTS = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.tensor([1, 2])}


def assert_same(found, expected=WEIGHTS):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    "content",
    [
        WEIGHTS,
        {"model": WEIGHTS, "epoch": 3, "args": argparse.Namespace(lr=1e-4, backbone="resnet50")},
        {"state_dict": WEIGHTS, "meta": {"CLASSES": ("person",)}},
        {"model": {f"module.{key}": value for key, value in WEIGHTS.items()}},
    ],
    ids=["plain", "official", "mmdetection", "distributed"],
)
def test_files_of_torch(tmp_path, content, legacy: bool) -> None:
    path = tmp_path / "weights.bin"
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    assert_same(read_weights(path))


class Malicious:
    def __reduce__(self):
        return os.mkdir, (os.environ["MALICIOUS"],)


def test_no_code_runs(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("MALICIOUS", str(tmp_path / "made"))
    path = tmp_path / "weights.pth"
    torch.save({"model": WEIGHTS, "args": Malicious()}, path)
    with pytest.raises(ConversionError, match="cannot read checkpoint"):
        read_weights(path)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("content", [3, {}, {"model": {"a": 1}}, {"model": {}}, [WEIGHTS]])
def test_files_without_weights(tmp_path, content) -> None:
    path = tmp_path / "weights.pth"
    torch.save(content, path)
    with pytest.raises(ConversionError, match="is not a checkpoint: it holds no dict of weights"):
        read_weights(path)


def test_missing_and_damaged_files(tmp_path) -> None:
    with pytest.raises(ConversionError, match=r"checkpoint .*nothing\.pth not found"):
        read_weights(tmp_path / "nothing.pth")
    for name in ("damaged.pth", "damaged.safetensors"):
        (tmp_path / name).write_bytes(b"damaged")
        with pytest.raises(ConversionError, match="cannot read checkpoint"):
            read_weights(tmp_path / name)


# --- safetensors --------------------------------------------------------------------------------


def write(path, header, data=b""):
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def test_the_format_by_hand(tmp_path) -> None:
    path = tmp_path / "hand.safetensors"
    header = {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "I32", "shape": [2, 1], "data_offsets": [0, 8]},
        "b": {"dtype": "F16", "shape": [], "data_offsets": [8, 10]},
        "c": {"dtype": "F32", "shape": [0, 4], "data_offsets": [10, 10]},
    }
    write(path, header, bytes([1, 0, 0, 0, 2, 1, 0, 0, 0, 0x3C]))
    expected = {
        "a": torch.tensor([[1], [258]], dtype=torch.int32),
        "b": torch.tensor(1.0, dtype=torch.float16),
        "c": torch.empty(0, 4),
    }
    assert_same(read_weights(path), expected)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"dtype": "F8", "shape": [4], "data_offsets": [0, 4]}, "a is of type F8, expected one of"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, "a lies at 0 to 4"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "a lies at 0 to 8"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}, "a lies at -4 to 0"),
    ],
)
def test_headers_that_lie(tmp_path, entry, message: str) -> None:
    path = tmp_path / "lie.safetensors"
    write(path, {"a": entry}, bytes(4))
    with pytest.raises(ConversionError, match=message):
        read_weights(path)


TYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32]


@settings(max_examples=30, deadline=None)
@given(
    st.dictionaries(
        st.text("abc._", min_size=1, max_size=9),
        st.tuples(st.lists(st.integers(0, 4), max_size=3), st.sampled_from(TYPES)),
        min_size=1,
        max_size=5,
    )
)
def test_what_the_safetensors_package_writes(tmp_path_factory, entries) -> None:
    library = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    tensors = {
        name: torch.randint(-99, 99, shape).to(dtype) for name, (shape, dtype) in entries.items()
    }
    path = tmp_path_factory.mktemp("files") / "weights.safetensors"
    library.save_file(tensors, path, metadata={"format": "pt"})
    found = read_weights(path)
    assert_same(found, tensors)
    assert all(found[name].dtype == value.dtype for name, value in tensors.items())
