"""Reports: what was done to each attention, and why."""
