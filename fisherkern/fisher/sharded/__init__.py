"""The engine for models whose tensors lie over several processes."""
