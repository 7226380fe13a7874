"""Merging from disk: files read and written a block of rows at a time."""

from fisherkern.merging.files.native_files import is_native
from fisherkern.merging.files.streaming import merge_files

__all__ = ["is_native", "merge_files"]
