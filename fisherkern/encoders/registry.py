"""The encoders by name."""

from fisherkern.encoders.base import SequenceEncoder
from fisherkern.encoders.bert4rec import BERT4Rec
from fisherkern.encoders.caser import Caser
from fisherkern.encoders.fism import FISM
from fisherkern.encoders.gru4rec import GRU4Rec
from fisherkern.encoders.sasrec import SASRec
from fisherkern.encoders.youtube_dnn import YouTubeDNN

#: The encoders that a model file, or a member of `ParallelEncoders`, may name, by class name.
ENCODERS: dict[str, type[SequenceEncoder]] = {
    "BERT4Rec": BERT4Rec,
    "SASRec": SASRec,
    "GRU4Rec": GRU4Rec,
    "Caser": Caser,
    "FISM": FISM,
    "YouTubeDNN": YouTubeDNN,
}
