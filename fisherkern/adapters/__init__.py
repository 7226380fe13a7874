"""What other libraries' checkpoints are: read as data, and written back as their own kind."""

from fisherkern.adapters.checkpoints import Checkpoint, load_tensors

__all__ = ["Checkpoint", "load_tensors"]
