"""Sequence encoders: networks that turn a history of items into logits over the catalogue."""

from fisherkern.encoders.base import Batch, SequenceEncoder
from fisherkern.encoders.bert4rec import BERT4Rec
from fisherkern.encoders.caser import Caser
from fisherkern.encoders.gru4rec import GRU4Rec
from fisherkern.encoders.parallel import ParallelEncoders
from fisherkern.encoders.registry import ENCODERS
from fisherkern.encoders.sasrec import SASRec

#: What a model file may hold, by class name.
MODELS: dict[str, type[SequenceEncoder]] = {**ENCODERS, "ParallelEncoders": ParallelEncoders}

__all__ = [
    "ENCODERS",
    "MODELS",
    "BERT4Rec",
    "Batch",
    "Caser",
    "GRU4Rec",
    "ParallelEncoders",
    "SASRec",
    "SequenceEncoder",
]
