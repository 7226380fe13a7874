"""Merging from disk: files read and written a block of rows at a time."""

from fisherkern.merging.files.streaming import merge_files

__all__ = ["merge_files"]
