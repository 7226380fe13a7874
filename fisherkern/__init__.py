"""fisherkern: the diagonal Fisher of next-item recommenders, and merging by it."""

from importlib.metadata import PackageNotFoundError, version

from fisherkern.adapters import load_tensors
from fisherkern.data import SequenceDataset, load, synthetic
from fisherkern.encoders import BERT4Rec, Caser, GRU4Rec, ParallelEncoders, SASRec
from fisherkern.errors import InputError
from fisherkern.evaluation import Report, ScoreEnsemble, compare, evaluate
from fisherkern.fisher import (
    DiagFisher,
    LinearGrams,
    adapt,
    diag_fisher,
    fisher_product,
    linear_grams,
)
from fisherkern.merging import (
    Calibrated,
    Preflight,
    WeightEnsemble,
    align,
    calibrate,
    merge,
    merge_files,
    preflight,
    recalibrate,
    weight_ensemble,
)
from fisherkern.objectives import (
    EMKD,
    Attributes,
    CL4SRec,
    DuoRec,
    MaskedItems,
    NextItem,
    NTXent,
    RepPad,
    SymmetricNoiseTolerant,
)
from fisherkern.training import TrainingSettings, load_model, save_model, train, train_peers

try:
    __version__ = version("fisherkern")
except PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "unknown"

__all__ = [
    "Attributes",
    "BERT4Rec",
    "CL4SRec",
    "Calibrated",
    "Caser",
    "DiagFisher",
    "DuoRec",
    "EMKD",
    "GRU4Rec",
    "InputError",
    "LinearGrams",
    "MaskedItems",
    "NTXent",
    "NextItem",
    "ParallelEncoders",
    "Preflight",
    "RepPad",
    "Report",
    "SASRec",
    "ScoreEnsemble",
    "SequenceDataset",
    "SymmetricNoiseTolerant",
    "TrainingSettings",
    "WeightEnsemble",
    "adapt",
    "align",
    "calibrate",
    "compare",
    "diag_fisher",
    "evaluate",
    "fisher_product",
    "linear_grams",
    "load",
    "load_model",
    "load_tensors",
    "merge",
    "merge_files",
    "preflight",
    "recalibrate",
    "save_model",
    "synthetic",
    "train",
    "train_peers",
    "weight_ensemble",
]
