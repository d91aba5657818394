"""What ``tools/train_net.py`` does, step by step."""

import argparse
import copy
import logging
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from detectron2.engine import create_ddp_model, hooks
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from detectron2.utils.events import CommonMetricPrinter, JSONWriter, TensorboardXWriter
from omegaconf import DictConfig
from torch import nn

from .branches import (
    STUDENT,
    check_branches,
    check_ground_truth,
    evaluate_branches,
    named_branches,
)
from .building import build, construction
from .checkpoint import AtomicCheckpointer, newest_checkpoint, require_readable, stored_entry
from .compatibility import lasting
from .config import load_config
from .data import build_resumable_train_loader
from .datasets import build_loader, check_class_count, check_datasets, dataset_names
from .ema import ModelEma
from .errors import UserError
from .hooks import (
    CheckpointHook,
    EmaHook,
    EvaluationHook,
    MetricsState,
    ResumeRng,
    StopOnSignal,
    WriterHook,
)
from .memory import keep_freed_memory
from .output import create_output, prepare_output, save_config, setup_run, snapshot_writer
from .rehearsal import check_evaluator, rehearse_evaluation
from .settings import check_groups, check_settings, require_settings, resolve_device
from .trainer import DistillationTrainer, autocast_dtype, student_of

__all__ = ["evaluate", "main", "train"]

logger = logging.getLogger(__name__)


def main(args: argparse.Namespace, runtime: str = "") -> dict:
    """Train or evaluate as the command line says, and return the results of the evaluation."""
    config = load_config(args.config_file, args.opts or [])
    prepare(config, args, runtime)
    if args.eval_only:
        return evaluate_checkpoint(config)
    return train(config, resume=args.resume)


def prepare(config: DictConfig, args: argparse.Namespace, runtime: str = "") -> None:
    """Check what can be checked, settle device and seed, start logging.

    Raises:
        UserError: a setting is missing or out of range, the device, a data set or the weights to
            begin with are missing, or no checkpoint to resume from is intact.
    """
    require_settings(config, training=not args.eval_only)
    config.train.device = resolve_device(config.train.device)
    if config.train.device == "cpu":
        keep_freed_memory()
    if "device" in config.model:
        config.model.device = config.train.device
    if "fast_dev_run" in config.train and config.train.fast_dev_run.enabled:
        config.train.update(max_iter=20, eval_period=10, log_period=1)
    names = dataset_names(config.dataloader.test)
    if not args.eval_only:
        check_settings(config)
        names += dataset_names(config.dataloader.train)
    check_datasets(names)
    check_ground_truth(config)
    create_output(config)
    path = checkpoint_to_resume(config) if args.resume and not args.eval_only else ""
    if not path:
        require_readable(config.train.get("init_checkpoint"))
    config.train.seed = resolve_seed(config, path)
    setup_run(config, args)
    if runtime:
        logger.info("Runtime: %s", runtime)


def resolve_seed(config: DictConfig, path: str) -> int:
    """Return ``train.seed``; a negative one becomes the checkpoint's, or is drawn once for all.

    Args:
        config: the whole config.
        path: the checkpoint to resume from; empty if there is none.
    """
    seed = config.train.seed
    if path:
        stored = stored_entry(path, "seed", int)
        if seed >= 0 and stored not in (None, seed):
            logger.warning(
                "train.seed is %d, the checkpoint's %d: data order changes", seed, stored
            )
        seed = stored if seed < 0 and stored is not None else seed
    if seed < 0:
        seed = comm.all_gather(int.from_bytes(os.urandom(4), "little") >> 1)[0]
    return seed


def checkpoint_to_resume(config: DictConfig) -> str:
    """Return the checkpoint all processes resume from, or an empty string."""
    path, problem = "", ""
    if comm.is_main_process():
        try:
            path = newest_checkpoint(config.train.output_dir)
        except UserError as error:
            problem = str(error)
    path, problem = comm.all_gather((path, problem))[0]
    if problem:
        raise UserError(problem)
    return path


def train(config: DictConfig, *, resume: bool = False) -> dict:
    """Train, evaluate at the end, and return the last evaluation's results."""
    settings = config.train
    record = copy.deepcopy(config)  # building fills in what is not for config.yaml
    loader = build_train_loader(config)
    model = build_model(config)
    student = student_of(model)
    check_class_count(dataset_names(config.dataloader.train), student)
    check_branches(named_branches(config), student)
    rehearse_evaluation(config, student)
    ema = build_ema(config, student)
    optimizer = build_optimizer(config, model)
    trainer = DistillationTrainer(
        wrap_for_processes(model, config),
        loader,
        optimizer,
        amp_dtype=autocast_dtype(settings.amp.enabled, settings.amp.dtype, settings.device),
        clip_grad=settings.clip_grad.params if settings.clip_grad.enabled else None,
        accumulation_steps=settings.accumulation_steps,
        log_period=settings.log_period,
    )
    others: dict[str, Any] = {"ema_state": ema} if ema else {}
    if student is not model:  # what only the training needs is not for the student's checkpoint
        others["training_parts"] = model.training_parts
    checkpointer = AtomicCheckpointer(student, settings.output_dir, trainer=trainer, **others)
    checkpointer.extra = {"seed": settings.seed}
    trainer.on_nonfinite = snapshot_writer(settings.output_dir, trainer)

    results: dict = {}
    metrics, evaluation = register_stateful_hooks(config, trainer, checkpointer, ema, results)
    start, rng = load_state(config, checkpointer, trainer, resume=resume)
    metrics.catch_up, evaluation.redo = prepare_output(record, start)
    register_closing_hooks(config, trainer, checkpointer, start, rng, metrics.catch_up)
    trainer.train(start, settings.max_iter)
    logger.info("Results, checkpoints and logs are in %s", Path(settings.output_dir).resolve())
    return results


def build_train_loader(config: DictConfig) -> Any:
    """Build the training data; our own loader gets the run's seed unless it has one."""
    node = config.dataloader.train
    if node["_target_"] in (
        build_resumable_train_loader,
        target_name(build_resumable_train_loader),
    ):
        node.seed = config.train.seed if node.get("seed") is None else node.seed
    return build_loader(node)


def build_optimizer(config: DictConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Build the optimiser of the model's parameters."""
    with construction("the optimizer"):
        config.optimizer.params.model = model
    try:
        optimizer = build("the optimizer", config.optimizer)
    finally:
        config.optimizer.params.model = None
    check_groups(optimizer)
    return optimizer


def target_name(function: Any) -> str:
    """Return the name by which a config refers to ``function``."""
    return f"{function.__module__}.{function.__qualname__}"


def build_model(config: DictConfig, *, student_only: bool = False) -> nn.Module:
    """Build the model on its device, compiled in place if ``train.compile`` says so.

    Args:
        config: the whole config.
        student_only: of a model that trains a student, build the student alone.
    """
    node = config.model.get("student", config.model) if student_only else config.model
    model = build("the model", node)
    if not isinstance(model, nn.Module):
        raise UserError(f"the config's model is {model!r}, expected a call that builds a module")
    model.to(config.train.device)
    if config.train.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if config.train.compile.enabled:
        model.compile(**config.train.compile.options)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    logger.info("Model:\n%s", model)
    logger.info("%s has %.3f M trainable parameters", type(model).__name__, count / 1e6)
    return model


def build_ema(config: DictConfig, model: nn.Module) -> ModelEma | None:
    """Build the moving average of the weights, or None if it is off."""
    settings = config.train.model_ema
    return ModelEma(model, settings.decay, settings.device) if settings.enabled else None


def wrap_for_processes(model: nn.Module, config: DictConfig) -> nn.Module:
    """Wrap the model for distributed training if there are several processes."""
    on_cuda = torch.device(config.train.device).type == "cuda"
    device_ids = [torch.cuda.current_device()] if on_cuda else None
    with warnings.catch_warnings():  # of a new name for detectron2's broadcast_buffers
        warnings.simplefilter("ignore", FutureWarning)
        return create_ddp_model(model, device_ids=device_ids, **config.train.ddp)


def load_state(
    config: DictConfig, checkpointer: AtomicCheckpointer, trainer: DistillationTrainer, resume: bool
) -> tuple[int, list | None]:
    """Resume or load initial weights.

    Returns:
        the first iteration to do, and each process's random state if training resumes.
    """
    path = checkpoint_to_resume(config) if resume else ""
    if not path:
        checkpointer.strictness = "partial" if config.train.init_partial else "initialise"
        checkpointer.load(config.train.init_checkpoint, checkpointables=[])
        return 0, None
    if stored_entry(path, "trainer", dict) is None:
        raise UserError(
            f"{path} holds no state of a training to resume: "
            "name it in train.init_checkpoint to begin with its weights"
        )
    checkpointer.strictness = "resume"
    rest = checkpointer.load(path)
    start = trainer.iter + 1
    if start > config.train.max_iter:
        raise UserError(
            f"train.max_iter is {config.train.max_iter}, but {path} has {start} iterations done: "
            f"expected at least {start}, or another train.output_dir"
        )
    if hasattr(trainer.data_loader, "seek"):
        trainer.data_loader.seek(start * trainer.accumulation_steps)
    else:
        logger.warning(
            "dataloader.train cannot continue where it stopped: the data order starts anew "
            "(engine.data.build_resumable_train_loader can)"
        )
    return start, rest.get("rng")


def register_stateful_hooks(
    config: DictConfig,
    trainer: DistillationTrainer,
    checkpointer: AtomicCheckpointer,
    ema: ModelEma | None,
    results: dict,
) -> tuple[MetricsState, EvaluationHook]:
    """Register the hooks that keep a state, before it is loaded, and return two of them.

    ``results`` will hold the latest evaluation's.
    """
    settings = config.train
    model = student_of(trainer.model)

    def run_evaluation() -> dict:
        results.clear()
        results.update(evaluate(config, model, ema))
        return results

    with construction("train.checkpointer"):
        checkpoints = CheckpointHook(checkpointer, **settings.checkpointer)
    evaluation = EvaluationHook(
        settings.eval_period, run_evaluation, checkpointer, settings.best_metric
    )
    trainer.register_hooks(
        [
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=build("lr_multiplier", config.lr_multiplier)),
            EmaHook(ema) if ema else None,
            metrics := MetricsState(),
            checkpoints,
            evaluation,
        ]
    )
    return metrics, evaluation


def register_closing_hooks(
    config: DictConfig,
    trainer: DistillationTrainer,
    checkpointer: AtomicCheckpointer,
    start: int,
    rng: list | None,
    catch_up: bool,
) -> None:
    """Register the hooks that come last in each iteration, or last before the first."""
    settings = config.train
    writers = []
    if comm.is_main_process():
        writers = [
            CommonMetricPrinter(settings.max_iter),
            JSONWriter(os.path.join(settings.output_dir, "metrics.json")),
            TensorboardXWriter(settings.output_dir, purge_step=start if start else None),
        ]
    trainer.register_hooks(
        [
            WriterHook(writers, settings.log_period, catch_up),
            StopOnSignal(checkpointer),
            ResumeRng(rng),
        ]
    )


def evaluate(config: DictConfig, model: nn.Module, ema: ModelEma | None = None) -> dict:
    """Evaluate the model on ``dataloader.test``, and its averaged weights if there are any.

    Returns:
        the evaluator's nested dict of numbers; those of the averages under the key "ema".
        Empty in other processes than the first.
    """
    if config.dataloader.get("evaluator") is None:
        logger.warning("the config has no dataloader.evaluator: nothing is evaluated")
        return {}
    results = evaluate_once(config, model)
    if ema is not None:
        logger.info("Evaluating the averaged weights")
        with ema.applied():
            averaged = evaluate_once(config, model)
        if averaged:
            results["ema"] = averaged
    return results


def evaluate_once(config: DictConfig, model: nn.Module) -> dict:
    """Evaluate the model as it is, or branches of it, and print its results table."""
    names, branches = dataset_names(config.dataloader.test), named_branches(config)
    if branches != (STUDENT,):
        check_class_count(names, model, exactly=True)
        return evaluate_branches(config, model, branches)
    loader = build_loader(config.dataloader.test)
    check_class_count(names, model, exactly=True)  # which loading has counted
    evaluator = build("dataloader.evaluator", config.dataloader.evaluator)
    results = inference_on_dataset(model, loader, evaluator) or {}
    if results and comm.is_main_process():
        print_csv_format(results)
    return dict(results)


def evaluate_checkpoint(config: DictConfig) -> dict:
    """Evaluate ``train.init_checkpoint``, which must hold every weight that this uses."""
    if not config.train.init_checkpoint:
        raise UserError("--eval-only needs weights: set train.init_checkpoint=FILE")
    model, _ = load_for_evaluation(config)
    if config.dataloader.get("evaluator") is not None:
        check_evaluator(config.dataloader.evaluator)
    save_config(config, "config_eval.yaml")
    return evaluate(config, model)


def load_for_evaluation(config: DictConfig) -> tuple[nn.Module, ModelEma | None]:
    """Build the model with all weights of ``train.init_checkpoint``, those it begins with if empty.

    What only training uses need not be there, unless ``evaluation.branch`` names a teacher.

    Returns:
        the model in evaluation mode and, if they replace its own, the averaged weights.
    """
    settings = config.train
    model = build_model(config, student_only=True).eval()
    branches = named_branches(config)
    check_branches(branches, model)
    averaged = settings.model_ema.enabled and settings.model_ema.use_ema_weights_for_eval_only
    ema = build_ema(config, model) if averaged and settings.init_checkpoint else None
    averages = {"ema_state": ema} if ema else {}
    checkpointer = AtomicCheckpointer(model, "", **averages)
    checkpointer.strictness = "evaluate" if branches == (STUDENT,) else "evaluate branches"
    checkpointer.load(settings.init_checkpoint)
    if ema:
        apply_averages(ema, settings.init_checkpoint)
    return model, ema


def apply_averages(ema: ModelEma, path: str) -> None:
    """Give the model the averages loaded from ``path``, which may lack what only training uses."""
    if not ema.state:
        raise UserError(f"{path} holds no averaged weights (ema_state)")
    missing = lasting(ema.missing())
    if missing:
        raise UserError(
            f"{path} lacks averages (ema_state) of {len(missing)} of the model's weights, "
            f"such as {missing[0]}"
        )
    ema.start()  # for what has no average the model's own weights
    ema.apply()
