"""Reading, splitting and batching of interaction data; a download and a generator."""

from fisherkern.data.batching import HistoryBatches, WindowBatches
from fisherkern.data.dataset import SequenceDataset
from fisherkern.data.download import download_ml_1m
from fisherkern.data.frames import from_frame
from fisherkern.data.holdout import Holdout
from fisherkern.data.loading import cache_folder, load
from fisherkern.data.reading import FORMATS, read_file, write_seqrec
from fisherkern.data.synthetic import synthetic

__all__ = [
    "FORMATS",
    "HistoryBatches",
    "Holdout",
    "SequenceDataset",
    "WindowBatches",
    "cache_folder",
    "download_ml_1m",
    "from_frame",
    "load",
    "read_file",
    "synthetic",
    "write_seqrec",
]
