"""Sequence encoders: networks that turn a history of items into logits over the catalogue."""

from fisherkern.encoders.base import Batch, SequenceEncoder
from fisherkern.encoders.bert4rec import BERT4Rec
from fisherkern.encoders.caser import Caser
from fisherkern.encoders.gru4rec import GRU4Rec
from fisherkern.encoders.sasrec import SASRec

#: The encoders a model file may name, by class name.
ENCODERS: dict[str, type[SequenceEncoder]] = {
    "BERT4Rec": BERT4Rec,
    "SASRec": SASRec,
    "GRU4Rec": GRU4Rec,
    "Caser": Caser,
}

__all__ = ["BERT4Rec", "Batch", "Caser", "ENCODERS", "GRU4Rec", "SASRec", "SequenceEncoder"]
