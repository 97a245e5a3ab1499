"""Masks and biases read as expressions over the indices of queries and keys."""
