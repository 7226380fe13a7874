"""Training: the loop, checkpoints and bit-exact resume."""

from fisherkern.training.checkpoint import load_model, save_model
from fisherkern.training.kept_checkpoints import KeptCheckpoints
from fisherkern.training.loop import TrainingLog, train
from fisherkern.training.peers import PeersLog, train_peers
from fisherkern.training.settings import TrainingSettings

__all__ = [
    "KeptCheckpoints",
    "PeersLog",
    "TrainingLog",
    "TrainingSettings",
    "load_model",
    "save_model",
    "train",
    "train_peers",
]
