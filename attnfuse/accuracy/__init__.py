"""Errors of eager and compiled code against the same call in float64."""
