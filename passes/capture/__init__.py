"""Capture: a Dynamo graph as a view in canonical ATen."""
