"""The training loop, and the hooks that run at fixed points of it."""

import concurrent.futures
import logging
import math
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import nn

from detectron2.utils import comm
from detectron2.utils.events import EventStorage, get_event_storage

__all__ = ["AMPTrainer", "HookBase", "SimpleTrainer", "TrainerBase"]

_logger = logging.getLogger(__name__)


class HookBase:
    """Something to do at fixed points of the training loop; override the points that matter.

    Hooks should do slow work in :meth:`after_step`, so that timers measure the step alone.
    A hook with a state overrides :meth:`state_dict` and adds ``load_state_dict(state_dict)``.
    """

    trainer: "TrainerBase" = None  # type: ignore[assignment]
    """The trainer that runs this hook (a weak proxy), set when the hook is registered."""

    def before_train(self) -> None:
        """Run before the first step."""

    def after_train(self) -> None:
        """Run once at the end, also when training failed."""

    def before_step(self) -> None:
        """Run before every step."""

    def after_backward(self) -> None:
        """Run between the backward pass and the optimizer's step."""

    def after_step(self) -> None:
        """Run after every step."""

    def state_dict(self) -> dict[str, Any]:
        """State to save in checkpoints; nothing if empty."""
        return {}


class TrainerBase:
    """A loop over :meth:`run_step` that calls hooks and holds an event storage.

    Attributes:
        iter: the running iteration; equals ``max_iter`` once training is complete.
        start_iter: first iteration of this run.
        max_iter: first iteration that is not run.
        storage: where metrics of the running training are kept.
    """

    start_iter: int
    max_iter: int
    storage: EventStorage

    def __init__(self) -> None:
        self._hooks: list[HookBase] = []
        self.iter = 0
        self.start_iter = 0

    def register_hooks(self, hooks: list[HookBase | None]) -> None:
        """Append hooks, which run in this order; ``None`` entries are dropped."""
        for hook in hooks:
            if hook is None:
                continue
            assert isinstance(hook, HookBase), f"hook is {hook!r}, expected a HookBase"
            hook.trainer = weakref.proxy(self)
            self._hooks.append(hook)

    def train(self, start_iter: int, max_iter: int) -> None:
        """Run iterations ``start_iter`` to ``max_iter - 1``."""
        iterations = range(start_iter, max_iter)
        self.start_iter, self.max_iter, self.iter = start_iter, max_iter, start_iter
        _logger.info("Training for %d iterations, the first is %d", len(iterations), start_iter)
        with self._storage_and_ending():
            self.before_train()
            for iteration in iterations:
                self.iter = iteration
                self._run_iteration()
            # Hooks recognise a completed training by this in after_train.
            self.iter = max(start_iter, max_iter)

    @contextmanager
    def _storage_and_ending(self) -> Iterator[None]:
        """Open the storage; in the end log an error if there is one and call ``after_train``."""
        with EventStorage(self.start_iter) as storage:
            self.storage = storage
            try:
                yield
            except Exception:
                _logger.exception(f"Training failed at iteration {self.iter}:")
                raise
            finally:
                self.after_train()

    def _run_iteration(self) -> None:
        self.before_step()
        self.run_step()
        self.after_step()

    def run_step(self) -> None:
        """Do one iteration; for subclasses to define."""
        raise NotImplementedError

    def before_train(self) -> None:
        """Call this point of every hook."""
        for hook in self._hooks:
            hook.before_train()

    def after_train(self) -> None:
        """Call this point of every hook."""
        self.storage.iter = self.iter
        for hook in self._hooks:
            hook.after_train()

    def before_step(self) -> None:
        """Bring the storage to this iteration, then call this point of every hook."""
        self.storage.iter = self.iter
        for hook in self._hooks:
            hook.before_step()

    def after_backward(self) -> None:
        """Call this point of every hook; :meth:`run_step` does so before it updates weights."""
        for hook in self._hooks:
            hook.after_backward()

    def after_step(self) -> None:
        """Call this point of every hook."""
        for hook in self._hooks:
            hook.after_step()

    def state_dict(self) -> dict[str, Any]:
        """Iteration and states of hooks, by class name (the first hook of a class counts)."""
        hook_states: dict[str, Any] = {}
        for name, hook in self._hooks_by_name().items():
            if state := hook.state_dict():
                hook_states[name] = state
        return {"iteration": self.iter, **({"hooks": hook_states} if hook_states else {})}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take up a state saved by :meth:`state_dict`; continue at ``iter + 1`` afterwards."""
        self.iter = state_dict["iteration"]
        hooks = self._hooks_by_name()
        for name, state in state_dict.get("hooks", {}).items():
            if name in hooks:
                hooks[name].load_state_dict(state)  # type: ignore[attr-defined]
            else:
                _logger.warning(f"No hook {name} is registered; its saved state is ignored")

    def _hooks_by_name(self) -> dict[str, HookBase]:
        return {type(hook).__qualname__: hook for hook in reversed(self._hooks)}


class SimpleTrainer(TrainerBase):
    """One model, one optimizer, one data source; the model returns its losses."""

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable,
        optimizer: torch.optim.Optimizer,
        gather_metric_period: int = 1,
        zero_grad_before_forward: bool = False,
        async_write_metrics: bool = False,
    ):
        """Set the model to training mode and hold on to the parts.

        Args:
            model: called with one batch, returns a dict of scalar losses or one scalar.
            data_loader: endless; its iterator is created when the first batch is needed.
            optimizer: of the model's parameters.
            gather_metric_period: iterations between two gatherings of metrics from all processes.
            zero_grad_before_forward: clear gradients before the forward pass instead of after it.
            async_write_metrics: record metrics in a thread, beside the next step; a non-finite
                loss then stops training one step later.
        """
        super().__init__()
        model.train()
        self.model = model
        self.data_loader = data_loader
        self.optimizer = optimizer
        self.gather_metric_period = gather_metric_period
        self.zero_grad_before_forward = zero_grad_before_forward
        self.async_write_metrics = async_write_metrics
        # One worker, so that metrics are recorded in the order of the iterations.
        self.concurrent_executor = concurrent.futures.ThreadPoolExecutor(max_workers=1)
        self._pending_write: concurrent.futures.Future | None = None
        self._data_loader_iter_obj: Iterator | None = None

    def run_step(self) -> None:
        """Draw a batch, compute losses and gradients, record metrics, update the weights."""
        name = type(self).__name__
        assert self.model.training, f"{name}: model is in eval mode, expected training mode"
        start = time.perf_counter()
        data = next(self._data_loader_iter)
        data_time = time.perf_counter() - start

        if self.zero_grad_before_forward:
            self.optimizer.zero_grad()
        losses = self._compute_losses(data)
        if not self.zero_grad_before_forward:
            self.optimizer.zero_grad()
        self._backward(sum(losses.values()))  # type: ignore[arg-type]
        self.after_backward()
        self._record(losses, data_time)
        self._update_weights()

    def _compute_losses(self, data: Any) -> Mapping[str, torch.Tensor]:
        losses = self.model(data)
        return {"total_loss": losses} if isinstance(losses, torch.Tensor) else losses

    def _backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def _update_weights(self) -> None:
        self.optimizer.step()

    @property
    def _data_loader_iter(self) -> Iterator:
        if self._data_loader_iter_obj is None:
            self._data_loader_iter_obj = iter(self.data_loader)
        return self._data_loader_iter_obj

    def reset_data_loader(self, data_loader_builder: Callable[[], Iterable]) -> None:
        """Drop the data loader, then continue with a new one from ``data_loader_builder()``."""
        self._data_loader_iter_obj = None
        del self.data_loader  # its workers should end before others start
        self.data_loader = data_loader_builder()

    def _record(self, losses: Mapping[str, torch.Tensor], data_time: float) -> None:
        if not self.async_write_metrics:
            self._write_metrics(losses, data_time)
            return
        self._finish_pending_write()
        self._pending_write = self.concurrent_executor.submit(
            self._write_metrics, losses, data_time, iter=self.iter
        )

    def _finish_pending_write(self) -> None:
        pending, self._pending_write = self._pending_write, None
        if pending is not None:
            pending.result()

    def _write_metrics(
        self,
        loss_dict: Mapping[str, torch.Tensor],
        data_time: float,
        prefix: str = "",
        iter: int | None = None,
    ) -> None:
        iteration = self.iter if iter is None else iter
        if (iteration + 1) % self.gather_metric_period == 0:
            SimpleTrainer.write_metrics(loss_dict, data_time, iteration, prefix)

    @staticmethod
    def write_metrics(
        loss_dict: Mapping[str, torch.Tensor], data_time: float, cur_iter: int, prefix: str = ""
    ) -> None:
        """Record losses averaged over all processes, their sum, and the slowest data time.

        Args:
            loss_dict: scalar losses by name; only ``total_loss`` is recorded if there is one.
            data_time: seconds this process waited for its batch.
            cur_iter: iteration the numbers belong to.
            prefix: put before ``total_loss``.

        Raises:
            FloatingPointError: (in the main process) the sum of the losses is infinite or NaN.
        """
        storage = get_event_storage()
        storage.put_scalar("rank_data_time", data_time, cur_iter=cur_iter)
        losses = {name: loss.detach().cpu().item() for name, loss in loss_dict.items()}
        gathered = comm.gather((data_time, losses))
        if not comm.is_main_process():
            return

        slowest = max(seconds for seconds, _ in gathered)
        storage.put_scalar("data_time", slowest, cur_iter=cur_iter)
        mean = _mean_by_name([losses for _, losses in gathered])
        total = sum(mean.values())
        if not math.isfinite(total):
            raise FloatingPointError(_describe_non_finite(mean, cur_iter))
        storage.put_scalar(f"{prefix}total_loss", total, cur_iter=cur_iter)
        if len(mean) > 1:
            for name, value in mean.items():
                storage.put_scalar(name, value, cur_iter=cur_iter)

    def after_train(self) -> None:
        """Wait for metrics under way, then call this point of every hook."""
        self.concurrent_executor.shutdown(wait=True)
        super().after_train()
        self._finish_pending_write()

    def state_dict(self) -> dict[str, Any]:
        """As :meth:`TrainerBase.state_dict`, with the optimizer."""
        return {**super().state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take up a state saved by :meth:`state_dict`."""
        super().load_state_dict(state_dict)
        self.optimizer.load_state_dict(state_dict["optimizer"])


class AMPTrainer(SimpleTrainer):
    """:class:`SimpleTrainer` in mixed precision, on the device that holds the model."""

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable,
        optimizer: torch.optim.Optimizer,
        gather_metric_period: int = 1,
        zero_grad_before_forward: bool = False,
        grad_scaler: torch.amp.GradScaler | None = None,
        precision: torch.dtype = torch.float16,
        log_grad_scaler: bool = False,
        async_write_metrics: bool = False,
    ):
        """Hold on to the parts; see :class:`SimpleTrainer` for those not named here.

        Args:
            grad_scaler: scales the loss against underflow; one for the model's device if absent.
            precision: ``torch.float16`` or ``torch.bfloat16``.
            log_grad_scaler: record the scale as ``[metric]grad_scaler``.
        """
        assert not isinstance(model, nn.DataParallel), (
            f"AMPTrainer: model is spread over devices {model.device_ids}, expected one per process"
        )
        super().__init__(
            model,
            data_loader,
            optimizer,
            gather_metric_period,
            zero_grad_before_forward,
            async_write_metrics,
        )
        self._device_type = next((p.device.type for p in model.parameters()), "cpu")
        self.grad_scaler = grad_scaler or torch.amp.GradScaler(self._device_type)
        self.precision = precision
        self.log_grad_scaler = log_grad_scaler

    def _compute_losses(self, data: Any) -> Mapping[str, torch.Tensor]:
        with torch.autocast(self._device_type, dtype=self.precision):
            return super()._compute_losses(data)

    def _backward(self, loss: torch.Tensor) -> None:
        self.grad_scaler.scale(loss).backward()
        if self.log_grad_scaler:
            self.storage.put_scalar("[metric]grad_scaler", self.grad_scaler.get_scale())

    def _update_weights(self) -> None:
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def state_dict(self) -> dict[str, Any]:
        """As :meth:`SimpleTrainer.state_dict`, with the gradient scaler."""
        return {**super().state_dict(), "grad_scaler": self.grad_scaler.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take up a state saved by :meth:`state_dict`."""
        super().load_state_dict(state_dict)
        self.grad_scaler.load_state_dict(state_dict["grad_scaler"])


def _mean_by_name(dicts: list[dict[str, float]]) -> dict[str, float]:
    """Average each name over the processes that report it."""
    means = {}
    for name in dict.fromkeys(chain.from_iterable(dicts)):
        values = [d[name] for d in dicts if name in d]
        means[name] = math.fsum(values) / len(values)
    return means


def _describe_non_finite(losses: dict[str, float], iteration: int) -> str:
    bad = {name: value for name, value in losses.items() if not math.isfinite(value)}
    named = ", ".join(f"{name} = {value}" for name, value in (bad or losses).items())
    return f"Loss at iteration {iteration} is {named}, expected finite numbers"
