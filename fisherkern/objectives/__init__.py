"""What a trainer minimises."""

from collections.abc import Mapping
from typing import Any

from fisherkern.errors import InputError, shown
from fisherkern.objectives.attributes import Attributes
from fisherkern.objectives.base import Objective, Term, TrainingSequences, WeightedSum
from fisherkern.objectives.cl4srec import CL4SRec
from fisherkern.objectives.contrast import ContrastiveLoss, NTXent, SymmetricNoiseTolerant
from fisherkern.objectives.duorec import DuoRec
from fisherkern.objectives.emkd import EMKD
from fisherkern.objectives.masked_items import MaskedItems
from fisherkern.objectives.next_item import NextItem
from fisherkern.objectives.reppad import RepPad
from fisherkern.objectives.vrex import VREx

#: What `from_settings` can make, by class name.
OBJECTIVES: dict[str, type] = {
    "Attributes": Attributes,
    "CL4SRec": CL4SRec,
    "DuoRec": DuoRec,
    "EMKD": EMKD,
    "MaskedItems": MaskedItems,
    "NTXent": NTXent,
    "NextItem": NextItem,
    "RepPad": RepPad,
    "SymmetricNoiseTolerant": SymmetricNoiseTolerant,
    "VREx": VREx,
    "WeightedSum": WeightedSum,
}


def from_settings(settings: Mapping[str, Any]) -> Objective:
    """Return the objective whose `settings()` these are, unbound.

    Raises InputError for an unknown name, or arguments that it does not have or take.
    """
    objective = _made(settings)
    if not isinstance(objective, Objective):
        raise InputError(
            f"the settings of an objective are a mapping with its name: {shown(settings)}"
        )
    return objective


def _made(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_made(item) for item in value)
    if not isinstance(value, Mapping):
        return value
    arguments = {key: _made(item) for key, item in value.items()}
    name = arguments.pop("name", None)
    if not isinstance(name, str) or name not in OBJECTIVES:
        raise InputError(f"unknown objective {shown(name)}; known: {', '.join(OBJECTIVES)}")
    try:
        return OBJECTIVES[name](**arguments)
    except TypeError as error:
        raise InputError(f"the arguments of {name} do not fit: {error}") from None


__all__ = [
    "EMKD",
    "OBJECTIVES",
    "Attributes",
    "CL4SRec",
    "ContrastiveLoss",
    "DuoRec",
    "MaskedItems",
    "NTXent",
    "NextItem",
    "Objective",
    "RepPad",
    "SymmetricNoiseTolerant",
    "Term",
    "TrainingSequences",
    "VREx",
    "WeightedSum",
    "from_settings",
]
