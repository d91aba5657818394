"""Reading of checkpoint files without running code from them.

Both formats are pickles inside, which can name any function to call. Here they may name only what
builds tensors, numpy arrays and plain containers.
"""

import codecs
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from detectron2.utils.file_io import PathManager

_reconstruct = np.zeros(1).__reduce__()[0]
_scalar = np.float32(0).__reduce__()[0]
_frombuffer = np.zeros(1).__reduce_ex__(5)[0]


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """How Python 3 pickles bytes for Python 2; other codecs have no place in a checkpoint."""
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"bytes are encoded as '{encoding}', expected 'latin1'")
    return codecs.encode(text, "latin1")


# numpy 1 and 2 keep these under different names; either reads the other's files
_NUMPY: dict[str, Any] = {
    f"numpy.{core}.{name}": function
    for core in ("core", "_core")
    for name, function in (
        ("multiarray._reconstruct", _reconstruct),
        ("multiarray.scalar", _scalar),
        ("numeric._frombuffer", _frombuffer),
    )
} | {"numpy.ndarray": np.ndarray, "numpy.dtype": np.dtype}
_DTYPES: list[Any] = sorted({type(np.dtype(code)) for code in np.typecodes["All"]}, key=str)
_PLAIN: dict[str, Callable] = {
    f"{module}.{kind.__name__}": kind
    for module in ("builtins", "__builtin__")
    for kind in (set, frozenset, bytearray, complex)
} | {"collections.OrderedDict": OrderedDict, "_codecs.encode": _encode}


class _Unpickler(pickle.Unpickler):
    """Admits numpy arrays and plain containers only."""

    def find_class(self, module: str, name: str) -> Any:
        full_name = f"{module}.{name}"
        try:
            return (_NUMPY | _PLAIN)[full_name]
        except KeyError:
            raise pickle.UnpicklingError(f"unsupported GLOBAL {full_name}") from None


def load_pickle(filename: str) -> Any:
    """Read a pickle of numpy arrays and plain containers, written by Python 2 or 3.

    Raises:
        pickle.UnpicklingError: if the file is damaged or names anything else.
    """
    with PathManager.open(filename, "rb") as file:
        return _read(filename, lambda: _Unpickler(file, encoding="latin1").load())


def load_torch(filename: str) -> Any:
    """Read a file written by ``torch.save``, tensors on the CPU; numpy arrays are admitted.

    Raises:
        pickle.UnpicklingError: if the file is damaged or names anything but tensors, numpy arrays
            and plain containers.
    """
    admitted: list[Any] = [(value, name) for name, value in _NUMPY.items()] + _DTYPES
    with torch.serialization.safe_globals(admitted):
        return _read(filename, lambda: torch.load(filename, map_location="cpu", weights_only=True))


def _read(filename: str, read: Callable[[], Any]) -> Any:
    """Turn the many errors that a damaged file causes into one."""
    try:
        return read()
    except OSError:
        raise
    except Exception as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        if named:
            reason = f"refused: it names {named[1]}; only tensors, arrays and containers are read"
        else:
            reason = f"damaged ({str(error).split('. ')[0] or type(error).__name__})"
        raise pickle.UnpicklingError(f"checkpoint {filename}: {reason}") from None
