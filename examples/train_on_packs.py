"""Train on packs: samples of different lengths in full rows, none of them seen by another, on attnfuse's kernels.

python examples/train_on_packs.py
"""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import attnfuse
from attnfuse.packing import PackedBatchSampler, PackingCollator, sequence_ids, unpack

BUDGET, VOCABULARY, HEADS, SIZE = 256, 100, 4, 64


class Decoder(nn.Module):
    """One causal attention. input_ids, position_ids int64 [B, T]; result [B, T, VOCABULARY]."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, SIZE), nn.Embedding(BUDGET, SIZE)
        self.qkv, self.out = nn.Linear(SIZE, 3 * SIZE), nn.Linear(SIZE, VOCABULARY)

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        hidden = self.tokens(input_ids) + self.positions(position_ids)
        q, k, v = self.qkv(hidden).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        index = torch.arange(input_ids.shape[1])
        sample = sequence_ids(position_ids)
        keep = (index[None] <= index[:, None]) & (sample[:, None, :, None] == sample[:, None, None, :])
        scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~keep, float("-inf"))
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def main() -> None:
    torch.manual_seed(0)
    lengths = (torch.randn(200) * 0.8 + 3.5).exp().long().clamp(1, BUDGET)
    samples = [{"input_ids": torch.randint(1, VOCABULARY, (length,))} for length in lengths.tolist()]
    sampler = PackedBatchSampler(lengths, BUDGET)
    # rows of one size: one compilation
    collate = PackingCollator(pad_to_multiple_of=BUDGET)
    loader = DataLoader(samples, batch_sampler=sampler, collate_fn=collate)  # type: ignore[arg-type]
    longest = int(lengths.max())
    print(f"{len(samples)} samples in {len(loader)} packs of {BUDGET} tokens, {sampler.fill_rate:.1%} full")
    print(f"padded to the longest they are {lengths.float().mean() / longest:.1%} full")

    model = Decoder()
    compiled = torch.compile(model, backend="attnfuse", options={"inner": "eager"})
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        for batch in loader:
            logits = compiled(batch["input_ids"], batch["position_ids"])
            # the first label of each sample is ignored, so that no sample predicts the next one
            loss = F.cross_entropy(logits[0, :-1], batch["labels"][0, 1:])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        print(f"epoch {epoch}: loss {loss.item():.3f}")
    print(attnfuse.reports()[0])

    # what each sample gets in a pack is what it gets alone
    own = [samples[index] for index in next(iter(sampler))]
    batch = collate(own)
    logits = compiled(batch["input_ids"], batch["position_ids"])
    for sample, part in zip(own, unpack(logits, position_ids=batch["position_ids"], samples=len(own)), strict=True):
        alone = model(sample["input_ids"][None], torch.arange(len(sample["input_ids"]))[None])[0]
        torch.testing.assert_close(part, alone, rtol=1e-4, atol=1e-4)
    print(f"{len(own)} samples of a pack got what they get alone")


if __name__ == "__main__":
    main()
