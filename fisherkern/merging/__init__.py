"""One network out of several: merge rules, weights, alignment of item tables."""

from fisherkern.merging.merge import merge
from fisherkern.merging.rules import RULES, Operands, Rule

__all__ = ["RULES", "Operands", "Rule", "merge"]
