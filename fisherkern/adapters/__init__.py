"""What a model, a batch and a checkpoint are, whoever made them."""

from fisherkern.adapters.adapter import adapt
from fisherkern.adapters.checkpoints import Checkpoint, load_tensors
from fisherkern.adapters.writing import write_like

__all__ = ["Checkpoint", "adapt", "load_tensors", "write_like"]
