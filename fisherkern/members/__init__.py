"""What several models have in common: tensors, ties, item catalogue, symmetries; their checks."""
