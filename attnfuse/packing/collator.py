"""Samples of different lengths to one row of tokens."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

#: What the loss of PyTorch and transformers passes over.
IGNORED = -100
#: One number for each token, in every sample that has them.
_PER_TOKEN = ("input_ids", "labels", "attention_mask")
#: Made by the collator: a sample that brings one would lose it.
_MADE = ("position_ids", "seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


@dataclass(kw_only=True)
class PackingCollator:
    """The `collate_fn` of a DataLoader, or the `data_collator` of a Trainer, that puts a batch of samples into one row.

    A sample is a dict with input_ids [n] and further fields: labels [n], and any other field with one element for each token,
    as lists, tensors or arrays, [n, ...]. A batch is a list of samples, or a list of packs, which are lists of samples. Fields
    of a sample as a whole (a number, a string, None) are left out, and so are tokens whose attention_mask is 0.

    The result, T tokens:
    - input_ids int64 [1, T].
    - position_ids int64 [1, T], counting up from position_ids_start in each sample. RoBERTa and its like start at 2
      (padding_idx + 1). Masks of transformers' models are made from these numbers, so there is no attention_mask.
    - labels int64 [1, T], if return_labels: those of the samples, or input_ids where there are none. The first of each sample
      is separator_id, since the token before it, of another sample, would predict it. separator_id=None keeps it, for models
      whose labels are not shifted.
    - cu_seq_lens_q, cu_seq_lens_k int32 [N + 1] and max_length_q, max_length_k int, if return_flash_attn_kwargs.
    - seq_idx int32 [1, T], the number of each token's sample, if return_seq_idx.
    - each further field [1, T, ...], integers as int64.

    pad_to_multiple_of: T is rounded up with a last sequence of pad_token_id (labels -100, other fields 0). It has positions of
    its own, so that no sample attends to it, and counts as one of the N sequences. With the budget of the packs as the multiple,
    all batches have one size. max_length: samples are cut to their first so many tokens.

    Raises ValueError, naming sample and field, for a sample without input_ids, a field whose length is not that of input_ids, a
    field that not all samples have, position_ids in a sample, and a batch without tokens.
    """

    position_ids_start: int = 0
    separator_id: int | None = IGNORED
    return_labels: bool = True
    return_flash_attn_kwargs: bool = False
    return_seq_idx: bool = False
    pad_to_multiple_of: int | None = None
    pad_token_id: int = 0
    max_length: int | None = None

    def __post_init__(self) -> None:
        for name in ("pad_to_multiple_of", "max_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}: it must be at least 1, or None")

    def __call__(self, features: Sequence[Any]) -> dict[str, Any]:
        samples = [self._sample(number, sample) for number, sample in enumerate(_flat(features))]
        _same_fields(samples)
        lengths = [sample["input_ids"].shape[0] for sample in samples]
        tokens = sum(lengths)
        if tokens == 0:
            raise ValueError(f"a batch of {len(samples)} samples has no tokens")
        padding = -tokens % (self.pad_to_multiple_of or 1)
        batch: dict[str, Any] = {
            name: _row([sample[name] for sample in samples], padding, self.pad_token_id if name == "input_ids" else 0)
            for name in samples[0]
            if name != "labels"
        }
        if self.return_labels:
            batch["labels"] = self._labels([sample.get("labels", sample["input_ids"]) for sample in samples], padding)
        if padding:
            lengths.append(padding)
        batch["position_ids"] = torch.cat([torch.arange(n) for n in lengths])[None] + self.position_ids_start
        if self.return_seq_idx:
            numbers = torch.arange(len(lengths), dtype=torch.int32)
            batch["seq_idx"] = numbers.repeat_interleave(torch.tensor(lengths))[None]
        if self.return_flash_attn_kwargs:
            edges = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
            batch["cu_seq_lens_q"] = batch["cu_seq_lens_k"] = edges
            batch["max_length_q"] = batch["max_length_k"] = max(lengths)
        return batch

    def _labels(self, parts: list[Tensor], padding: int) -> Tensor:
        """The labels of all samples as [1, T], with the separator in place of each first one."""
        labels = _row(parts, padding, IGNORED)
        if self.separator_id is not None:
            lengths = [part.shape[0] for part in parts]
            starts = [start for start, length in zip(itertools.accumulate(lengths, initial=0), lengths) if length]
            labels[0, starts] = self.separator_id
        return labels

    def _sample(self, number: int, sample: Any) -> dict[str, Tensor]:
        """The fields of one sample that have an element per token, as tensors without padding, cut to max_length."""
        if not isinstance(sample, Mapping) or "input_ids" not in sample:
            what = f"has {sorted(map(str, sample))}" if isinstance(sample, Mapping) else f"is a {type(sample).__name__}"
            raise ValueError(f"sample {number} {what}: it must be a dict with input_ids")
        made = [name for name in _MADE if name in sample]
        if made:
            raise ValueError(f"sample {number} brings {', '.join(made)}, which the collator makes: leave them out")
        fields = {name: _tensor(number, name, value) for name, value in sample.items() if _is_of_tokens(name, value)}
        length = fields["input_ids"].numel()
        for name, value in fields.items():
            shape = tuple(value.shape)
            if shape[:1] != (length,) or (name in _PER_TOKEN and len(shape) > 1):
                raise ValueError(
                    f"sample {number} has {name} of shape {shape}, with {length} token ids: a field has one element "
                    "for each token ([n]; other fields than labels also [n, ...]), or is a number or string and left out"
                )
        keep = fields.pop("attention_mask", None)
        if keep is not None:
            fields = {name: value[keep.bool()] for name, value in fields.items()}
        return {name: value[: self.max_length] for name, value in fields.items()}


def _row(parts: list[Tensor], padding: int, fill: int) -> Tensor:
    """One field of all samples as a new tensor [1, T, ...]."""
    row = torch.cat(parts)
    return F.pad(row, [0, 0] * (row.dim() - 1) + [0, padding], value=fill)[None]


def _flat(features: Iterable[Any]) -> list[Any]:
    """Samples of a list of samples or of packs."""
    packs = (item if isinstance(item, list | tuple) else [item] for item in features)
    return [sample for pack in packs for sample in pack]


def _is_of_tokens(name: str, value: Any) -> bool:
    """Whether a field has elements. Those that are always per token are let through, to be complained of if they have none."""
    whole = value is None or isinstance(value, str | bytes | int | float) or getattr(value, "ndim", 1) == 0
    return not whole or name in _PER_TOKEN


def _tensor(number: int, name: str, value: Any) -> Tensor:
    """A field as a tensor; an empty list is one of integers."""
    if isinstance(value, list | tuple) and not value:
        return torch.empty(0, dtype=torch.int64)
    try:
        found = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"sample {number} has {name} that is no tensor and makes none: {error}") from error
    # token ids and labels of a smaller dtype are neither index nor target to PyTorch
    return found.long() if found.dtype in (torch.int32, torch.int16, torch.int8, torch.uint8) else found


def _same_fields(samples: list[dict[str, Tensor]]) -> None:
    for number, sample in enumerate(samples):
        different = sorted(samples[0].keys() ^ sample.keys())
        if different:
            raise ValueError(
                f"only one of the samples 0 and {number} has {', '.join(different)}: all must have the same fields"
            )
