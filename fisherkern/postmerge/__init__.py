"""What changes a merged network afterwards: repair, representation surgery, weight ensembles."""

from fisherkern.postmerge.repair import repair
from fisherkern.postmerge.surgery import SurgeryEncoder, representation_surgery
from fisherkern.postmerge.weight_ensemble import WeightEnsemble, weight_ensemble

__all__ = [
    "SurgeryEncoder",
    "WeightEnsemble",
    "repair",
    "representation_surgery",
    "weight_ensemble",
]
