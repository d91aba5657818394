"""Recorded cases of single layers: constructor arguments, inputs, weights, outputs, gradients."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import projects

embedded_only = pytest.mark.skipif(
    "(installed)" in projects.RUNTIME, reason="tells where the embedded packages are more lenient"
)


class RecordedCases:
    """The cases of one pair of json and npz files."""

    def __init__(self, folder: Path, name: str):
        self.facts = json.loads((folder / f"{name}.json").read_text())["cases"]
        self._arrays = np.load(folder / f"{name}.npz")

    def arrays(self, case: str, kind: str) -> dict[str, torch.Tensor]:
        """Tensors of one kind (in, param, out, grad, grad_param) of a case."""
        prefix = f"{case}/{kind}/"
        return {
            key.removeprefix(prefix): torch.from_numpy(self._arrays[key])
            for key in self._arrays
            if key.startswith(prefix)
        }

    def names(self, prefix: str) -> list[str]:
        """Names of the cases that start with a prefix; at least one must."""
        names = [name for name in self.facts if name.startswith(prefix)]
        assert names, f"no recorded case starts with {prefix}"
        return names

    def check_module(self, case: str, module: nn.Module, call=None) -> None:
        """Compare a module's keys, output and gradients with the recorded ones.

        ``call(module, inputs)`` returns the output; by default the inputs are keyword arguments.
        """
        facts = self.facts[case]
        module.load_state_dict(self.arrays(case, "param"), strict=False)
        assert set(module.state_dict()) == set(facts["state_dict_keys"])

        inputs = self.arrays(case, "in")
        weight = inputs.pop("out_weight")
        gradients = self.arrays(case, "grad")
        for name in gradients:
            inputs[name].requires_grad_()
        inputs.update(facts["non_tensor_arguments"])
        output = call(module, inputs) if call else module(**inputs)
        close(output, self.arrays(case, "out")["out"])

        (output * weight).sum().backward()
        for name, expected in gradients.items():
            close(inputs[name].grad, expected)
        parameters = dict(module.named_parameters(remove_duplicate=False))
        for name, expected in self.arrays(case, "grad_param").items():
            close(parameters[name].grad, expected)


def close(actual: torch.Tensor, expected: torch.Tensor, atol=2e-5, rtol=1e-4) -> None:
    """Assert equality within the recorded layers' tolerance."""
    torch.testing.assert_close(actual, expected, atol=atol, rtol=rtol)


def recipe_value(key: str, shape, seed: int, mean: float, std: float) -> torch.Tensor:
    """Value of a weight that is not stored but follows the recorded recipe."""
    rng = np.random.RandomState((zlib.crc32(key.encode()) + seed) % 2**32)
    value = np.round((mean + std * rng.standard_normal(tuple(shape))) * 1024) / 1024
    return torch.from_numpy(value.astype(np.float32))
