"""Emitting: calls of the op, and what they need, written into the Dynamo graph."""
