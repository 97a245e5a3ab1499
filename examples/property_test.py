"""Property-test your own attention: Hypothesis draws shapes, layouts and masks, attnfuse checks the numbers.

pytest examples/property_test.py        (pip install attnfuse[test])
"""

import torch
from hypothesis import given, settings

import attnfuse
from attnfuse import testing


def my_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5 + mask
    return torch.softmax(scores, dim=-1) @ v


# five lines: draw inputs, run eager, compiled and in float64, fail with a table of errors
@settings(max_examples=20, deadline=None)
@given(testing.inputs(testing.shapes(grouped=False), mask="additive", hidden_rows=False))
def test_my_attention(inputs: dict[str, torch.Tensor]) -> None:
    attnfuse.verify(my_attention, **inputs, options={"inner": "eager"}).raise_if_failed()


if __name__ == "__main__":
    test_my_attention()
    print("20 drawn inputs: compiled, eager and float64 agree within the bar")
