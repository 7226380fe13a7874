"""Sequence encoders: networks that turn a history of items into logits over the catalogue."""

from fisherkern.encoders.base import Batch, SequenceEncoder
from fisherkern.encoders.bert4rec import BERT4Rec

#: The encoders a model file may name, by class name.
ENCODERS: dict[str, type[SequenceEncoder]] = {"BERT4Rec": BERT4Rec}

__all__ = ["BERT4Rec", "Batch", "ENCODERS", "SequenceEncoder"]
