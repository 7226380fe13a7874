"""What a model, a batch and a checkpoint are, whoever made them."""

from fisherkern.adapters.adapt import adapt
from fisherkern.adapters.adapter import ModelAdapter
from fisherkern.adapters.files.checkpoints import Checkpoint, load_tensors
from fisherkern.adapters.files.writing import write_like
from fisherkern.adapters.libraries import Library, register
from fisherkern.adapters.sharded.dcp import load_dcp

__all__ = [
    "Checkpoint",
    "Library",
    "ModelAdapter",
    "adapt",
    "load_dcp",
    "load_tensors",
    "register",
    "write_like",
]
