"""What a trainer minimises."""

from fisherkern.objectives.masked_items import MaskedItems, Objective

__all__ = ["MaskedItems", "Objective"]
