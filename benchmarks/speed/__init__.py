"""How fast: each script measures ours beside the alternatives, after checking the numbers."""
