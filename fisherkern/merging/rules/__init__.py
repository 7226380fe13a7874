"""Merge methods, one a file."""

# In the order in which errors list them and method="auto" tries them.
# isort: off
from fisherkern.merging.rules.base import METHODS, MergeBlock, MergeMethod, TensorBlocks
from fisherkern.merging.rules.base import convex, merge_method
from fisherkern.merging.rules.average import average
from fisherkern.merging.rules.fisher import fisher_average
from fisherkern.merging.rules.slerp import slerp
from fisherkern.merging.rules.task_arithmetic import task_arithmetic
from fisherkern.merging.rules.ties import ties
from fisherkern.merging.rules.dare import dare
from fisherkern.merging.rules.model_stock import model_stock
from fisherkern.merging.rules.pcrec import pcrec
from fisherkern.merging.rules.regmean import regmean
from fisherkern.merging.rules.full_fisher import full_fisher
from fisherkern.merging.rules.greedy_soup import greedy_soup
from fisherkern.merging.rules.learned_soup import learned_soup
# isort: on

__all__ = [
    "METHODS",
    "MergeBlock",
    "MergeMethod",
    "TensorBlocks",
    "average",
    "convex",
    "dare",
    "fisher_average",
    "full_fisher",
    "greedy_soup",
    "learned_soup",
    "merge_method",
    "model_stock",
    "pcrec",
    "regmean",
    "slerp",
    "task_arithmetic",
    "ties",
]
