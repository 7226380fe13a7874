"""A merge's report: one HTML page, and the numbers that only the page shows."""

from fisherkern.report.measures import user_groups
from fisherkern.report.plane import weight_plane
from fisherkern.report.result import Findings, read_result
from fisherkern.report.sections import METRIC, merge_page

__all__ = ["METRIC", "Findings", "merge_page", "read_result", "user_groups", "weight_plane"]
