"""Packing: samples of different lengths one after the other in a row, with no padding between them.

Which samples share a pack: `first_fit_decreasing`, `in_order`, `fill_rate`. Packs for a DataLoader or Trainer: `PackedDataset`
(packed beforehand), `PackedBatchSampler` (anew each epoch), `PackedStream` and `pack_stream` (of samples that come in one by
one). Packs as tensors: `PackingCollator`. The way back: `sequence_ids`, `cu_seq_lens`, `unpack`, `unpack_padded`.

Source of the idea: Kundu et al. 2024, arXiv:2407.09105. docs/packing.md is the guide.
"""

from attnfuse.packing.batches import PackedBatchSampler, PackedDataset, PackedStream, pack_stream
from attnfuse.packing.collator import PackingCollator
from attnfuse.packing.packers import fill_rate, first_fit_decreasing, in_order
from attnfuse.packing.unpacking import cu_seq_lens, sequence_ids, unpack, unpack_padded

__all__ = [
    "PackedBatchSampler",
    "PackedDataset",
    "PackedStream",
    "PackingCollator",
    "cu_seq_lens",
    "fill_rate",
    "first_fit_decreasing",
    "in_order",
    "pack_stream",
    "sequence_ids",
    "unpack",
    "unpack_padded",
]
