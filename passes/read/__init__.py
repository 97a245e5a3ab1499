"""Reading: from each softmax of a view back to q @ k and forward to @ v, as a `Site` or a `Refusal`."""
