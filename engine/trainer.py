"""The trainer of every method."""

import contextlib
import logging
import resource
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from .errors import Interrupted, NonFiniteLoss, UserError
from .rng import get_rng_state

__all__ = ["DistillationTrainer", "autocast_dtype", "student_of", "unwrap"]

logger = logging.getLogger(__name__)

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class DistillationTrainer(SimpleTrainer):
    """Trains a model that returns a dict of weighted scalar losses.

    Adds to detectron2's trainer mixed precision, gradient accumulation and clipping, a check for
    finite losses before the backward pass, and a stop that all processes agree on. One iteration is
    one optimiser step over ``accumulation_steps`` batches; logged losses are means over these and
    over the processes.

    Args:
        model: the model, maybe wrapped for distributed training.
        data_loader: iterable of batches.
        optimizer: steps once an iteration.
        amp_dtype: precision of the forward pass; None for the weights' own.
        clip_grad: keywords of ``torch.nn.utils.clip_grad_norm_``; None to leave gradients alone.
        accumulation_steps: batches per iteration.
        log_period: iterations between two records of the gradient norm.
        on_nonfinite: called with the snapshot of a step whose loss is not finite, on the first such
            process; returns where it was kept.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Any,
        optimizer: torch.optim.Optimizer,
        *,
        amp_dtype: torch.dtype | None = None,
        clip_grad: Mapping[str, Any] | None = None,
        accumulation_steps: int = 1,
        log_period: int = 20,
        on_nonfinite: Callable[[int, dict], str] | None = None,
    ) -> None:
        super().__init__(model, data_loader, optimizer)
        if accumulation_steps < 1:
            raise UserError(f"accumulation_steps is {accumulation_steps}, expected at least 1")
        self.device = next(model.parameters()).device
        self.amp_dtype = amp_dtype
        self.clip_grad = clip_grad
        self.accumulation_steps = accumulation_steps
        self.log_period = log_period
        self.on_nonfinite = on_nonfinite
        self.grad_scaler = torch.amp.GradScaler(
            self.device.type, enabled=amp_dtype is torch.float16
        )
        self.completed = False
        """Whether :meth:`train` has reached its last iteration."""
        self.requested_stop = 0
        """The signal that asked this process to stop; 0 while none has."""
        self.agreed_stop = 0
        """The signal at which all processes stop after this iteration; 0 to go on."""

    def train(self, start_iter: int, max_iter: int) -> None:
        """Run the iterations from ``start_iter`` up to, not including, ``max_iter``."""
        logger.info("training begins at iteration %d", start_iter)
        self.iter = self.start_iter = start_iter
        self.max_iter = max_iter
        with EventStorage(start_iter) as self.storage:
            try:
                self.before_train()
                for self.iter in range(start_iter, max_iter):
                    self.before_step()
                    self.run_step()
                    self.after_step()
                    if self.agreed_stop:
                        raise Interrupted(self.agreed_stop)
                self.iter = max_iter
                self.completed = True
            finally:
                self._data_loader_iter_obj = None  # ends its worker processes
                self.after_train()

    def run_step(self) -> None:
        """Do one iteration."""
        assert self.model.training, "the model was left in evaluation mode"
        self.optimizer.zero_grad(set_to_none=True)
        records: list[list[dict]] = []
        for step in range(self.accumulation_steps):
            start = time.perf_counter()
            batch = next(self._data_loader_iter)
            data_time = time.perf_counter() - start
            last = step == self.accumulation_steps - 1
            with contextlib.nullcontext() if last else self._no_gradient_exchange():
                rng = get_rng_state()
                losses = self._forward(batch)
                record = self._exchange(losses, data_time)
                self._check_finite(record, batch, rng)
                total = torch.stack(list(losses.values())).sum() / self.accumulation_steps
                self.grad_scaler.scale(total).backward()
            records.append(record)
        self.after_backward()
        self._log_losses(records)
        self._log_metrics()
        self._optimize()

    def _forward(self, batch: Any) -> dict[str, Tensor]:
        enabled = self.amp_dtype is not None
        with torch.autocast(self.device.type, dtype=self.amp_dtype, enabled=enabled):
            losses = self.model(batch)
        if not losses:
            raise UserError(f"{type(unwrap(self.model)).__name__} returned no losses to train on")
        return losses

    def _exchange(self, losses: dict[str, Tensor], data_time: float) -> list[dict]:
        """Return each process's losses, data time and wish to stop (one wait for the device)."""
        values = torch.stack([value.detach().float() for value in losses.values()]).tolist()
        own = {
            "losses": dict(zip(losses, values, strict=True)),
            "data_time": data_time,
            "stop": self.requested_stop,
        }
        everyone = comm.all_gather(own)
        self.agreed_stop = max(record["stop"] for record in everyone)
        return everyone

    def _check_finite(self, record: list[dict], batch: Any, rng: dict) -> None:
        bad = [(rank, r["losses"]) for rank, r in enumerate(record) if not _all_finite(r["losses"])]
        if not bad:
            return
        rank, losses = bad[0]
        names = ", ".join(f"{k} = {v}" for k, v in losses.items() if not _all_finite({k: v}))
        where = ""
        if self.on_nonfinite is not None:
            snapshot = {"rng": rng, "batch": batch, "losses": losses, "iteration": self.iter}
            if comm.get_rank() == rank:
                where = self.on_nonfinite(self.iter, snapshot)
            where = comm.all_gather(where)[rank]
        kept = f"; what reproduces the step is in {where}" if where else ""
        on_rank = f" on process {rank}" if len(record) > 1 else ""
        raise NonFiniteLoss(f"loss not finite at iteration {self.iter}{on_rank}: {names}{kept}")

    def _log_losses(self, records: list[list[dict]]) -> None:
        everyone = [entry for record in records for entry in record]
        data_times = [sum(steps) for steps in _transpose_data_times(records)]
        self.storage.put_scalar("rank_data_time", data_times[comm.get_rank()])
        if not comm.is_main_process():
            return
        names = everyone[0]["losses"]
        means = {k: sum(e["losses"][k] for e in everyone) / len(everyone) for k in names}
        self.storage.put_scalar("data_time", max(data_times))
        self.storage.put_scalar("total_loss", sum(means.values()))
        self.storage.put_scalars(**{k: v for k, v in means.items() if k != "total_loss"})
        if self.device.type == "cpu":  # on CUDA the writers report the device's memory themselves
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            self.storage.put_scalar("max_mem_MB[metric]", peak, smoothing_hint=False)

    def _log_metrics(self) -> None:
        """Record what a model measures besides its losses, as its attribute ``metrics``."""
        if (self.iter + 1) % self.log_period == 0:
            for name, value in getattr(unwrap(self.model), "metrics", {}).items():
                self.storage.put_scalar(name, float(value), smoothing_hint=False)

    def _optimize(self) -> None:
        log_norm = (self.iter + 1) % self.log_period == 0
        if self.clip_grad is not None or log_norm:
            self.grad_scaler.unscale_(self.optimizer)
            norm = self._clip_or_measure()
            if log_norm:
                self.storage.put_scalar("grad_norm", norm.item(), smoothing_hint=False)
                if self.grad_scaler.is_enabled():
                    scale = self.grad_scaler.get_scale()
                    self.storage.put_scalar("grad_scale", scale, smoothing_hint=False)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def _clip_or_measure(self) -> Tensor:
        """Return the gradients' norm before clipping."""
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        if self.clip_grad is not None:
            return torch.nn.utils.clip_grad_norm_(parameters, **self.clip_grad)
        return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])

    def _no_gradient_exchange(self) -> contextlib.AbstractContextManager:
        if isinstance(self.model, nn.parallel.DistributedDataParallel):
            return self.model.no_sync()
        return contextlib.nullcontext()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of trainer, hooks, optimiser and loss scaling."""
        state = super().state_dict()
        state["grad_scaler"] = self.grad_scaler.state_dict()
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        super().load_state_dict(state_dict)
        if self.grad_scaler.is_enabled() and state_dict.get("grad_scaler"):
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])


def autocast_dtype(enabled: bool, dtype: str, device: str) -> torch.dtype | None:
    """Return the precision that ``train.amp`` asks for on ``device``, None if it is off."""
    if not enabled:
        return None
    if dtype not in _DTYPES:
        raise UserError(f"train.amp.dtype is '{dtype}', expected one of {', '.join(_DTYPES)}")
    if dtype == "float16" and torch.device(device).type == "cpu":
        raise UserError("train.amp.dtype=float16 needs CUDA; on the CPU use bfloat16")
    return _DTYPES[dtype]


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside a distributed wrapper, or the model itself."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def student_of(model: nn.Module) -> nn.Module:
    """Return what a run is about: the student of a model that trains one, or the model itself."""
    model = unwrap(model)
    return getattr(model, "student", model)


def _all_finite(losses: Mapping[str, float]) -> bool:
    return all(abs(value) < float("inf") for value in losses.values())  # NaN compares false


def _transpose_data_times(records: list[list[dict]]) -> list[list[float]]:
    """Per process, the data times of its accumulation steps."""
    return [[entry["data_time"] for entry in ranks] for ranks in zip(*records, strict=True)]
