"""Ranking metrics under a stated protocol, and paired comparisons of them."""

from fisherkern.evaluation.compare import Comparison, Difference, compare
from fisherkern.evaluation.ensemble import ScoreEnsemble
from fisherkern.evaluation.popularity import Popularity
from fisherkern.evaluation.ranking import evaluate
from fisherkern.evaluation.report import Protocol, Report

__all__ = [
    "Comparison",
    "Difference",
    "Popularity",
    "Protocol",
    "Report",
    "ScoreEnsemble",
    "compare",
    "evaluate",
]
