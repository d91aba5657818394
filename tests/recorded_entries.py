"""Arrays recorded from KS-DETR's release, none of which may be left uncompared."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from projects.ks_detr.checkpoint import from_released


class Entries:
    """What is recorded under a prefix; whoever takes an entry is to use or to compare it.

    A name that a test forgets or filters out is still here at the end, where :meth:`finish` fails.
    """

    def __init__(self, arrays: dict[str, Tensor], prefix: str):
        self._left = {
            key.removeprefix(prefix): value
            for key, value in arrays.items()
            if key.startswith(prefix)
        }
        assert self._left, f"nothing is recorded under {prefix}"

    def take(self, name: str) -> Tensor:
        """One entry."""
        return self._left.pop(name)

    def take_if_recorded(self, name: str) -> Tensor | None:
        """One entry of those that not every recording has."""
        return self._left.pop(name, None)

    def group(self, name: str) -> dict[str, Tensor]:
        """All entries below a name, at least one."""
        prefix = f"{name}/"
        keys = [key for key in self._left if key.startswith(prefix)]
        assert keys, f"nothing is recorded under {prefix}"
        return {key.removeprefix(prefix): self._left.pop(key) for key in keys}

    def finish(self) -> None:
        """Assert that every entry was taken."""
        assert not self._left, f"recorded but not compared: {sorted(self._left)}"


class Recording:
    """A pair of json and npz files with the same name; floats are read in float64."""

    def __init__(self, path: Path):
        record = json.loads(path.with_suffix(".json").read_text())
        self.about, self.cases = record["about"], record["cases"]
        with np.load(path.with_suffix(".npz")) as arrays:
            tensors = {key: torch.from_numpy(arrays[key]) for key in arrays.files}
        self.arrays = {
            key: value.double() if value.is_floating_point() else value
            for key, value in tensors.items()
        }

    def entries(self, case: str) -> Entries:
        """The arrays of one case."""
        return Entries(self.arrays, f"{case}/")

    def of_kind(self, kind: str) -> set[str]:
        """Cases whose kind contains a text."""
        return {name for name, facts in self.cases.items() if kind in facts["kind"]}


def our_attention(released: dict) -> dict:
    """Released keys of one attention and of the sMLP beside it, as those of this attention."""
    prefix = "layers.0.attentions.0."
    named = {k if k.startswith("ksgt") else prefix + k: value for k, value in released.items()}
    return {k.removeprefix(prefix): value for k, value in from_released(named, prefix="").items()}


def matches(found: Tensor, expected: Tensor, *, atol: float = 1e-9, name: str = "") -> None:
    """Assert a relative difference below 1e-5 of what was computed in float64.

    ``atol`` is for sums that are zero but for their rounding, of values of the order of one.
    """
    torch.testing.assert_close(
        found.double(), expected.double(), rtol=1e-5, atol=atol, msg=lambda text: f"{name}: {text}"
    )


def check_gradients(module: nn.Module, entries: Entries, inputs: dict[str, Tensor]) -> None:
    """Compare all recorded gradients: of the inputs, named and laid out alike, and the parameters.

    Nothing else may be left of the entries.
    """
    recorded = entries.group("grad")
    for name, gradient in inputs.items():
        matches(gradient, recorded.pop(name), name=name)
    expected = our_attention(recorded)
    found = {name: parameter.grad for name, parameter in module.named_parameters()}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        matches(found[name], gradient, name=name)
    entries.finish()
