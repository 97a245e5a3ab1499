"""A sequence recommender on histories of different lengths, none of them padded: jagged nested tensors through attnfuse.

python examples/recommender.py
"""

import torch
from torch import nn
from torch.nn import functional as F

import attnfuse

USERS, ITEMS, GENRES, LONGEST, HEADS, SIZE = 64, 40, 4, 64, 4, 32


def split(x: torch.Tensor) -> torch.Tensor:
    """[B, j, SIZE] as [B, HEADS, j, D]."""
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


class Block(nn.Module):
    """Causal self-attention over each history. x [B, j, SIZE]; bias [1, HEADS, LONGEST, LONGEST], or None."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(SIZE), nn.Linear(SIZE, 3 * SIZE), nn.Linear(SIZE, SIZE)

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        q, k, v = (split(part) for part in self.qkv(self.norm(x)).chunk(3, -1))
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=bias is None)
        return x + self.out(seen.transpose(1, 2).flatten(-2))


class Recommender(nn.Module):
    """histories int64 [B, j], jagged; targets int64 [B], an item for each user; result [B], the logit that they like it."""

    def __init__(self) -> None:
        super().__init__()
        self.items = nn.Embedding(ITEMS, SIZE)
        self.first, self.second = Block(), Block()
        # of each distance back
        self.relative = nn.Parameter(torch.zeros(HEADS, LONGEST))
        self.query, self.keys = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, 2 * SIZE)
        self.score = nn.Linear(2 * SIZE, 1)

    def bias(self) -> torch.Tensor:
        """[1, HEADS, LONGEST, LONGEST], -inf for what comes later: for the longest history, others use its corner."""
        place = torch.arange(LONGEST, device=self.relative.device)
        distance = place[:, None] - place
        return self.relative[:, distance.clamp(min=0)].masked_fill(distance < 0, -torch.inf)[None]

    def forward(self, histories: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.second(self.first(self.items(histories), None), self.bias())
        target = self.items(targets)[:, None]
        k, v = (split(part) for part in self.keys(x).chunk(2, -1))
        # one dense query a user against a jagged history
        found = F.scaled_dot_product_attention(split(self.query(target)), k, v)
        return self.score(torch.cat([found.transpose(1, 2).flatten(2), target], -1)).flatten()


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Users who like one genre, most of what they have seen being of it."""
    genre = torch.randint(GENRES, (USERS,))
    lengths = (torch.randn(USERS) + 2.5).exp().long().clamp(2, LONGEST).tolist()
    seen = []
    for own, length in zip(genre.tolist(), lengths, strict=True):
        items = torch.randint(ITEMS, (length,))
        of_genre = items // GENRES * GENRES + own
        seen.append(torch.where(torch.rand(length) < 0.8, of_genre, items))
    targets = torch.where(
        torch.rand(USERS) < 0.5,
        torch.randint(ITEMS // GENRES, (USERS,)) * GENRES + genre,
        torch.randint(ITEMS, (USERS,)),
    )
    likes = (targets % GENRES == genre).float()
    return torch.nested.nested_tensor(seen, layout=torch.jagged), targets, likes


def main() -> None:
    torch.manual_seed(0)
    model = Recommender()
    histories, targets, _ = batch()
    rows = histories.values().shape[0]
    print(f"{USERS} histories of {rows} items; padded to {LONGEST} they would be {rows / (USERS * LONGEST):.0%} full")
    print(attnfuse.explain(model, histories, targets))

    attnfuse.reset()
    compiled = torch.compile(model, backend="attnfuse", fullgraph=True, options={"inner": "eager"})
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    total = 0.0
    for step in range(1, 101):
        histories, targets, likes = batch()
        loss = F.binary_cross_entropy_with_logits(compiled(histories, targets), likes)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total += loss.item()
        if step % 20 == 0:
            print(f"steps {step - 19:3} to {step:3}: mean loss {total / 20:.3f}")
            total = 0.0
    print(f"{len(attnfuse.reports())} compilation for 100 batches of other lengths")


if __name__ == "__main__":
    main()
