"""Padded tensors of packed rows, in every spelling, and the way back."""

from __future__ import annotations

from typing import Any

import torch

import attnfuse

C, HEADS, LONGEST = 16, 2, 40
LENGTHS = (5, 1, 33, 0, 17)


JAGGED_TO_PADDED = torch.ops.aten._jagged_to_padded_dense_forward


PADDED_TO_JAGGED = torch.ops.aten._padded_dense_to_jagged_forward


def mask_of(lengths: torch.Tensor, longest: int) -> torch.Tensor:
    return torch.arange(longest)[None] < lengths[:, None]


def by_op(values: torch.Tensor, offsets: torch.Tensor) -> Any:
    return JAGGED_TO_PADDED(values, [offsets], [LONGEST], 0.0), mask_of(offsets.diff(), LONGEST)


def by_gather(values: torch.Tensor, offsets: torch.Tensor) -> Any:
    index = offsets[:-1, None] + torch.arange(LONGEST)
    return values[index.clamp(max=values.shape[0] - 1)], mask_of(offsets[1:] - offsets[:-1], LONGEST)


def by_chosen_gather(values: torch.Tensor, offsets: torch.Tensor) -> Any:
    mask = mask_of(offsets[1:] - offsets[:-1], LONGEST)
    return values[torch.where(mask, offsets[:-1, None] + torch.arange(LONGEST), 0)], mask


def by_write(values: torch.Tensor, offsets: torch.Tensor) -> Any:
    mask = mask_of(offsets.diff(), LONGEST)
    padded = values.new_zeros(mask.shape[0], LONGEST, values.shape[-1])
    padded[mask] = values
    return padded, mask


def by_nested(values: torch.Tensor, offsets: torch.Tensor) -> Any:
    padded = values.to_padded_tensor(0.0)
    return padded, mask_of(values.offsets().diff(), padded.shape[1])


def back_by_op(x: torch.Tensor, mask: torch.Tensor, values: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    if values.is_nested:
        return PADDED_TO_JAGGED(x, [values.offsets()], values.values().shape[0])
    return PADDED_TO_JAGGED(x, [offsets], values.shape[0])


def back_by_mask(x: torch.Tensor, mask: torch.Tensor, values: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    return x[mask]


PADS = [by_op, by_gather, by_chosen_gather, by_write, by_nested]


def layouts() -> list[str]:
    return [s.spec.layout if s.status == "fused" else s.status for report in attnfuse.reports() for s in report.sites]


def heads(x: torch.Tensor) -> torch.Tensor:
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def merged(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).flatten(2)
