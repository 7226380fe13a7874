"""fisherkern: the diagonal Fisher of next-item recommenders, and merging by it."""

# ruff: noqa: I001  # before the imports that take seconds
from fisherkern import interrupts as interrupts

from fisherkern.adapters import adapt, load_dcp, load_tensors
from fisherkern.alignment import align
from fisherkern.data import SequenceDataset, from_frame, load, synthetic
from fisherkern.encoders import (
    FISM,
    BERT4Rec,
    Caser,
    GRU4Rec,
    ItemParts,
    ParallelEncoders,
    SASRec,
    YouTubeDNN,
)
from fisherkern.errors import InputError
from fisherkern.evaluation import Popularity, Report, ScoreEnsemble, compare, evaluate
from fisherkern.fisher import (
    DiagFisher,
    LinearGrams,
    diag_fisher,
    fisher_product,
    linear_grams,
)
from fisherkern.merging import Preflight, decay_weights, merge, merge_files, preflight
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
    VREx,
)
from fisherkern.postmerge import (
    SurgeryEncoder,
    WeightEnsemble,
    repair,
    representation_surgery,
    weight_ensemble,
)
from fisherkern.provenance import package_version
from fisherkern.training import (
    KeptCheckpoints,
    TrainingSettings,
    load_model,
    save_model,
    train,
    train_peers,
)

__version__ = package_version()

__all__ = [
    "EMKD",
    "FISM",
    "Attributes",
    "BERT4Rec",
    "CL4SRec",
    "Caser",
    "DiagFisher",
    "DuoRec",
    "GRU4Rec",
    "InputError",
    "ItemParts",
    "KeptCheckpoints",
    "LinearGrams",
    "MaskedItems",
    "NTXent",
    "NextItem",
    "ParallelEncoders",
    "Popularity",
    "Preflight",
    "RepPad",
    "Report",
    "SASRec",
    "ScoreEnsemble",
    "SequenceDataset",
    "SurgeryEncoder",
    "SymmetricNoiseTolerant",
    "TrainingSettings",
    "VREx",
    "WeightEnsemble",
    "YouTubeDNN",
    "adapt",
    "align",
    "compare",
    "decay_weights",
    "diag_fisher",
    "evaluate",
    "fisher_product",
    "from_frame",
    "linear_grams",
    "load",
    "load_dcp",
    "load_model",
    "load_tensors",
    "merge",
    "merge_files",
    "preflight",
    "repair",
    "representation_surgery",
    "save_model",
    "synthetic",
    "train",
    "train_peers",
    "weight_ensemble",
]
