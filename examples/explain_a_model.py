"""What does attnfuse do to a model? One call, explained.

python examples/explain_a_model.py
"""

import torch
from torch import nn

import attnfuse


class Block(nn.Module):
    """Causal self-attention as one might write it by hand."""

    def __init__(self, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, L, C = x.shape
        q, k, v = self.qkv(x).view(B, L, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) / (C // self.heads) ** 0.5
        hide = torch.ones(L, L, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(hide, float("-inf")).softmax(dim=-1)
        return self.out((weights @ v).transpose(1, 2).reshape(B, L, C))


def main() -> None:
    report = attnfuse.explain(Block().eval(), torch.randn(2, 32, 64))
    print(report)
    for site in report.sites:
        print(f"{site.where}: {site.status}", f"({site.reason})" if site.reason else f"on {site.kernel}")
    print("\nThe graph afterwards:\n")
    print(report.after)


if __name__ == "__main__":
    main()
