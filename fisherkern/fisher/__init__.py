"""The diagonal Fisher: capture, factor, probe, accumulate."""

from fisherkern.fisher.diag_fisher import diag_fisher
from fisherkern.fisher.grams import LinearGrams, linear_grams
from fisherkern.fisher.products import FisherProduct, fisher_product
from fisherkern.fisher.result import DiagFisher

__all__ = [
    "DiagFisher",
    "FisherProduct",
    "LinearGrams",
    "diag_fisher",
    "fisher_product",
    "linear_grams",
]
