"""Padding that the model makes is taken out: attentions and all between them on packed rows."""
