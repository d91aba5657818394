"""Exponential moving average of a model's weights."""

import contextlib
import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

__all__ = ["ModelEma"]


class ModelEma:
    """Averages parameters and buffers after each step: ``ema = decay * ema + (1 - decay) * value``.

    Buffers that are not floating point are copied. Names are those of the model, so that the state
    can be loaded into one (detrex stores the same under ``ema_state``).
    """

    def __init__(self, model: nn.Module, decay: float = 0.999, device: str = "") -> None:
        self.decay = decay
        self._model = model
        self._device = device
        self.state: dict[str, Tensor] = {}

    def start(self) -> None:
        """Begin with the model's present weights, unless a state was loaded."""
        for name, value in self._named_tensors():
            source = self.state.get(name, value.detach())
            self.state[name] = source.to(self._device or value.device, copy=True)

    @torch.no_grad()
    def update(self) -> None:
        """Take in the model's present weights."""
        averages, values = [], []
        for name, value in self._named_tensors():
            average = self.state[name]
            value = value.detach().to(average.device)
            if average.is_floating_point():
                averages.append(average)
                values.append(value)
            else:
                average.copy_(value)
        torch._foreach_lerp_(averages, values, 1.0 - self.decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Let the model have the averaged weights within the ``with`` block."""
        own = {name: value.detach().clone() for name, value in self._named_tensors()}
        self._copy_to_model(self.state)
        try:
            yield
        finally:
            self._copy_to_model(own)

    def apply(self) -> None:
        """Give the model the averaged weights for good."""
        self._copy_to_model(self.state)

    def missing(self) -> list[str]:
        """Return the names of the model's weights that have no average."""
        return [name for name, _ in self._named_tensors() if name not in self.state]

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averages by name."""
        return copy.copy(self.state)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take averages over from a checkpoint."""
        self.state = dict(state)

    def _named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from self._model.named_parameters()
        yield from self._model.named_buffers()

    @torch.no_grad()
    def _copy_to_model(self, state: dict[str, Tensor]) -> None:
        for name, value in self._named_tensors():
            value.copy_(state[name])
