"""The diagonal Fisher: capture, factor, probe, accumulate."""

from fisherkern.fisher.diag_fisher import diag_fisher
from fisherkern.fisher.result import DiagFisher
from fisherkern.fisher.subject import adapt

__all__ = ["DiagFisher", "adapt", "diag_fisher"]
