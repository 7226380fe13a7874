"""Every reader of the package under mutated files: `python -m tests.fuzz` for long runs."""
