"""One forward pass and its graph: recorded, run again, differentiated."""
