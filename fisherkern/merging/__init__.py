"""One network out of several: merge rules, weights, alignment of members and item tables."""

from fisherkern.merging.alignment import align
from fisherkern.merging.merge import merge
from fisherkern.merging.preflight import Preflight, preflight
from fisherkern.merging.recalibrate import recalibrate
from fisherkern.merging.rules import RULES, Operands, Rule
from fisherkern.merging.streaming import merge_files
from fisherkern.merging.surgery import Calibrated, calibrate
from fisherkern.merging.symmetries import SYMMETRIES, Symmetries
from fisherkern.merging.weight_ensemble import WeightEnsemble, weight_ensemble

__all__ = [
    "RULES",
    "SYMMETRIES",
    "Calibrated",
    "Operands",
    "Preflight",
    "Rule",
    "Symmetries",
    "WeightEnsemble",
    "align",
    "calibrate",
    "merge",
    "merge_files",
    "preflight",
    "recalibrate",
    "weight_ensemble",
]
