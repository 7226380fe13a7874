"""Alignment: models brought close to one of them by weights, activations or loss."""

from fisherkern.alignment.align import align

__all__ = ["align"]
