"""What other libraries' checkpoints are: read as data, and written back as their own kind."""

from fisherkern.adapters.checkpoints import Checkpoint, load_tensors
from fisherkern.adapters.writing import write_like

__all__ = ["Checkpoint", "load_tensors", "write_like"]
