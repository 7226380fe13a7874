"""fisherkern: the diagonal Fisher of next-item recommenders, and merging by it."""

from importlib.metadata import PackageNotFoundError, version

from fisherkern.data import SequenceDataset, load, synthetic
from fisherkern.encoders import BERT4Rec, Caser, GRU4Rec, SASRec
from fisherkern.errors import InputError
from fisherkern.evaluation import Report, ScoreEnsemble, compare, evaluate
from fisherkern.fisher import DiagFisher, adapt, diag_fisher
from fisherkern.merging import merge
from fisherkern.objectives import MaskedItems
from fisherkern.training import load_model, save_model, train

try:
    __version__ = version("fisherkern")
except PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "unknown"

__all__ = [
    "BERT4Rec",
    "Caser",
    "DiagFisher",
    "GRU4Rec",
    "InputError",
    "MaskedItems",
    "Report",
    "SASRec",
    "ScoreEnsemble",
    "SequenceDataset",
    "adapt",
    "compare",
    "diag_fisher",
    "evaluate",
    "load",
    "load_model",
    "merge",
    "save_model",
    "synthetic",
    "train",
]
