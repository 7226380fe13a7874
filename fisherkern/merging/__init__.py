"""One network out of several: merge methods, weights, and what to expect beforehand."""

from fisherkern.merging.decay import decay_weights
from fisherkern.merging.files import merge_files
from fisherkern.merging.merge import merge
from fisherkern.merging.preflight import Preflight, preflight
from fisherkern.merging.rules import METHODS, MergeBlock, MergeMethod, merge_method

__all__ = [
    "METHODS",
    "MergeBlock",
    "MergeMethod",
    "Preflight",
    "decay_weights",
    "merge",
    "merge_files",
    "merge_method",
    "preflight",
]
