"""Models whose tensors lie over several processes, and their folders."""
