"""Sequence encoders: networks that turn a history of items into logits over the catalogue."""

from fisherkern.encoders.base import Batch, SequenceEncoder
from fisherkern.encoders.bert4rec import BERT4Rec
from fisherkern.encoders.caser import Caser
from fisherkern.encoders.fism import FISM
from fisherkern.encoders.gru4rec import GRU4Rec
from fisherkern.encoders.items import ItemEmbedding, ItemParts
from fisherkern.encoders.parallel import ParallelEncoders
from fisherkern.encoders.registry import ENCODERS
from fisherkern.encoders.sasrec import SASRec
from fisherkern.encoders.stored import stored_encoder
from fisherkern.encoders.symmetry import AxisSpec, Symmetries, SymmetryGroup, whole
from fisherkern.encoders.youtube_dnn import YouTubeDNN

#: What a model file may hold, by class name; `postmerge` adds its own.
MODELS: dict[str, type[SequenceEncoder]] = {**ENCODERS, "ParallelEncoders": ParallelEncoders}

#: Class names in files of earlier versions, and what they are called now.
FORMER_NAMES = {"Calibrated": "SurgeryEncoder"}

__all__ = [
    "ENCODERS",
    "FISM",
    "FORMER_NAMES",
    "MODELS",
    "AxisSpec",
    "BERT4Rec",
    "Batch",
    "Caser",
    "GRU4Rec",
    "ItemEmbedding",
    "ItemParts",
    "ParallelEncoders",
    "SASRec",
    "SequenceEncoder",
    "Symmetries",
    "SymmetryGroup",
    "YouTubeDNN",
    "stored_encoder",
    "whole",
]
