"""Checkpoints of any library: read without running anything of theirs, and written back."""
