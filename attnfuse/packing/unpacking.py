"""From a pack back to its samples: where each begins, and what a model gave for it."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


def sequence_ids(position_ids: Tensor) -> Tensor:
    """The number of the sequence that each token belongs to, from 0 in each row.

    position_ids [T] or [B, T], of any integer dtype; result int64 of the same shape and device. A sequence starts wherever the
    number is not that of the token before plus one, so it does not matter at which number positions start. Ordinary ops on
    tensors: nothing is read by the host, and it compiles.

    The way to sums for each sample without unpacking: `zeros.index_add(0, sequence_ids(position_ids)[0], losses)`.
    """
    if position_ids.shape[-1] == 0:
        return position_ids.long()
    starts = position_ids.diff(dim=-1, prepend=position_ids[..., :1] - 1) != 1
    return starts.cumsum(-1)


def cu_seq_lens(position_ids: Tensor, *, static: bool = False) -> Tensor:
    """The first token of each sequence of a pack, and the number of tokens T at the end.

    position_ids [T] or [1, T]; result int32 [N + 1] for N sequences, on the same device. N is read by the host. static: int32
    [T + 1] instead, with T in all places from N on, as if empty sequences followed; nothing is read by the host.
    Raises ValueError for more than one row.
    """
    if position_ids.dim() == 2 and position_ids.shape[0] == 1:
        position_ids = position_ids[0]
    if position_ids.dim() != 1:
        raise ValueError(f"position_ids have shape {tuple(position_ids.shape)}: a pack is one row, [T] or [1, T]")
    ids = sequence_ids(position_ids)
    tokens = ids.shape[0]
    # ids ascend by steps of one: the first place of number i is where sequence i starts, or T if there is no such sequence
    starts = torch.searchsorted(ids, torch.arange(tokens + 1, device=ids.device), out_int32=True)
    if static or tokens == 0:
        return starts
    return starts[: int(ids[-1]) + 2]


def unpack(
    values: Tensor, *, position_ids: Tensor | None = None, cu_seq_lens: Tensor | None = None, samples: int | None = None
) -> list[Tensor]:
    """What a model gave for each sample of a pack.

    values [1, T, ...] or [T, ...] (with T = 1, [1, 1, ...] is taken for the former), with either position_ids [1, T] or [T], or
    cu_seq_lens [N + 1] integers. Returns N views of shape [length, ...], through which gradients flow. samples: how many to
    return, for packs that a collator has padded: the padding is a sequence after the last sample. Samples without tokens come
    back from cu_seq_lens alone, since no position tells of them. The host reads the lengths.

    Raises ValueError where not exactly one of the two is given, where they are not those of T tokens, and where there are fewer
    sequences than samples.
    """
    if position_ids is not None and cu_seq_lens is None:
        edges = _edges(position_ids)
    elif cu_seq_lens is not None and position_ids is None:
        edges = cu_seq_lens.tolist()
    else:
        raise ValueError("give either position_ids or cu_seq_lens")
    if not edges or edges[0] != 0 or edges != sorted(edges):
        raise ValueError(f"cu_seq_lens are {edges}: they must start at 0 and never fall")
    tokens = edges[-1]
    if values.dim() > 1 and tuple(values.shape[:2]) == (1, tokens):
        values = values[0]
    if values.dim() < 1 or values.shape[0] != tokens:
        raise ValueError(
            f"values have shape {tuple(values.shape)}: [1, T, ...] or [T, ...] with T = {tokens} was expected"
        )
    count = len(edges) - 1
    if samples is not None and not 0 <= samples <= count:
        raise ValueError(f"{samples} samples were asked for, and the pack has {count} sequences")
    lengths = [stop - start for start, stop in itertools.pairwise(edges)]
    return list(values.split(lengths))[:samples] if count else []


def unpack_padded(
    values: Tensor,
    *,
    position_ids: Tensor | None = None,
    cu_seq_lens: Tensor | None = None,
    samples: int | None = None,
    padding: float = 0.0,
) -> Tensor:
    """What a model gave for each sample, as one tensor [N, longest, ...] with `padding` after the end of each.

    Other arguments and errors as in `unpack`; also ValueError where there is no sample.
    """
    parts = unpack(values, position_ids=position_ids, cu_seq_lens=cu_seq_lens, samples=samples)
    if not parts:
        raise ValueError("the pack has no sample, and no shape can be given to a padded tensor of none")
    return pad_sequence(parts, batch_first=True, padding_value=padding)


def _edges(position_ids: Tensor) -> list[int]:
    """cu_seq_lens as a list, by one transfer to the host."""
    edges: list[int] = cu_seq_lens(position_ids.cpu()).tolist()
    return edges
