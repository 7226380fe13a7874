"""The factor L of every sequence's covariance: one sampler, one way to make it."""
