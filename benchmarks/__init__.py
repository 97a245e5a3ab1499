"""Measurements: attention alone, whole models, and how many attentions of real models are found.

Importing this package sets what must be set before torch is: OpenMP threads that sleep when idle, no network.
"""

from __future__ import annotations

import os

# a spinning thread of one contender would slow the next one down
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
os.environ["GOMP_SPINCOUNT"] = "0"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
