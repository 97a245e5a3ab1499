"""Attention over the tokens of several ranks: layouts, what travels, and the ops that compiled graphs call."""
