"""Training: the loop, checkpoints and bit-exact resume."""

from fisherkern.training.checkpoint import load_model, save_model
from fisherkern.training.loop import TrainingLog, train

__all__ = ["TrainingLog", "load_model", "save_model", "train"]
