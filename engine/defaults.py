"""Settings that this project adds to detrex's."""

from typing import Any

__all__ = ["EVALUATION_DEFAULTS", "TRAIN_DEFAULTS"]

TRAIN_DEFAULTS: dict[str, Any] = {
    # "auto": CUDA where there is one, else the CPU; "cuda" on a machine without it is an error.
    "device": "auto",
    # bfloat16 runs on CPU and CUDA; float16 on CUDA only, with loss scaling.
    "amp": {"enabled": False, "dtype": "bfloat16"},
    # Batches per optimiser step. An iteration is one step, so it reads this many batches of
    # dataloader.train.total_batch_size images.
    "accumulation_steps": 1,
    # Compiles the model in place; `options` go to torch.compile.
    "compile": {"enabled": False, "options": {}},
    # Keep convolution weights and features channels-last, which most convolutions prefer.
    "channels_last": False,
    # Load the matching part of an init_checkpoint of another architecture instead of stopping.
    "init_partial": False,
    # Below 0: drawn once and kept in the checkpoints, so that resuming stays exact.
    "seed": -1,
    # Also keep the weights with the highest value of this metric as model_best.pth ("" = off).
    "best_metric": "bbox/AP",
}

EVALUATION_DEFAULTS: dict[str, Any] = {
    # Which branch is evaluated, or a list of them; all but the student see the ground truth.
    "branch": "student",
}
