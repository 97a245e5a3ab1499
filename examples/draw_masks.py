"""See which tiles a mask leaves: packed documents under a causal window, read off plain PyTorch and drawn."""

from __future__ import annotations

import sys
import tempfile

import torch

import attnfuse


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, document: torch.Tensor) -> torch.Tensor:
    """Each token attends to the 64 before it, within its document. q, k, v [B, H, L, D]; document int64 [B, L]."""
    i = torch.arange(q.shape[2])
    mask = (i[None] <= i[:, None]) & (i[:, None] - i[None] < 64)
    mask = mask & (document[:, :, None] == document[:, None, :])[:, None]
    scores = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).masked_fill(~mask, float("-inf"))
    return scores.softmax(-1) @ v


if __name__ == "__main__":
    folder = sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 4, 512, 32) for _ in range(3))
    document = torch.arange(4).repeat_interleave(torch.tensor([200, 40, 150, 122]))[None]
    report = attnfuse.explain(attention, q, k, v, document)
    print(report)
    (picture,) = report.draw(folder, tile=16)
    print(f"the tiles that are skipped, partial and full are in {picture.name}")
