"""detrex's training settings plus this project's (engine/defaults.py explains each)."""

from detrex.config import get_config
from omegaconf import OmegaConf

from engine.defaults import TRAIN_DEFAULTS

train = OmegaConf.merge(get_config("common/train.py").train, TRAIN_DEFAULTS)
del train.wandb  # there is no such writer: metrics.json and TensorBoard hold the metrics
train.output_dir = "./output"
