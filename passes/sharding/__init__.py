"""One graph over several devices: each computes its own rows of the token dims."""
