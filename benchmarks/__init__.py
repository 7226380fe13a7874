"""Speed against the alternatives, the paper's experiments, and their results; never installed."""
