"""Keys and values in the blocks of a cache, read through a table: which tensors go together, and what they stand for."""

from __future__ import annotations

import torch

from attnfuse.kernels.inputs import Inputs, Pages
from attnfuse.spec import Attention, dtype_name


def check_pages(spec: Attention, inputs: Inputs) -> None:
    """Raises ValueError where the table and the caches are not those of the spec's layout. No number in the table is looked at.

    Works on real, fake and symbolically shaped tensors: what is not known is not looked at.
    """
    pages = inputs.pages
    if spec.paged != (pages is not None):
        raise ValueError(f"attnfuse: layout {spec.layout} with{'out' if spec.paged else ''} a block table")
    if pages is None:
        return
    table, rank = pages.table, len(spec.batch)
    said = f"{dtype_name(table.dtype)} {list(table.shape)}"
    if table.dtype not in (torch.int32, torch.int64) or table.dim() != rank + 1:
        raise ValueError(
            f"attnfuse: the block table must be int32 or int64 [{', '.join((*spec.batch, 'T'))}]; got {said}"
        )
    if table.device != inputs.q.device:
        raise ValueError(f"attnfuse: the block table is on {table.device}, q on {inputs.q.device}")
    for d, dim in enumerate(spec.batch):
        sizes = (table.shape[d], inputs.k.shape[d], inputs.v.shape[d])
        if len({n for n in sizes if isinstance(n, int) and n != 1}) > 1:
            raise ValueError(f"attnfuse: dim {dim} of the block table and the caches of k and v is {sizes}")
    room = table.shape[-1] * inputs.k.shape[-2]
    if isinstance(room, int) and isinstance(pages.keys, int) and not 0 <= pages.keys <= room:
        raise ValueError(f"attnfuse: {pages.keys} keys in {table.shape[-1]} blocks of {inputs.k.shape[-2]}")


def no_pages(spec: Attention) -> None:
    """Raises ValueError for a paged layout, in which there are no gradients."""
    if spec.paged:
        raise ValueError("attnfuse: there are no gradients through a block table")


def out_of_range(table: torch.Tensor, blocks: int, wraps: bool) -> IndexError:
    """The error for a table with a number that no block has."""
    least = -blocks if wraps else 0
    wrong = table[(table < least) | (table >= blocks)]
    which = f"{int(wrong[0])} " if wrong.numel() else ""
    return IndexError(f"index {which}in the block table of a cache of {blocks} blocks is out of range")


def places(table: torch.Tensor, blocks: int, wraps: bool) -> torch.Tensor:
    """The numbers of the table, counted from the beginning of the cache. Raises IndexError for one that no block has."""
    table = table.long()
    at = torch.where(table < 0, table + blocks, table) if wraps else table
    if bool(((at < 0) | (at >= blocks)).any()):
        raise out_of_range(table, blocks, wraps)
    return at


def gathered(spec: Attention, inputs: Inputs) -> Inputs:
    """The same attention with k [*batch, K, D] and v [*batch, K, E] in tensors of their own. Raises IndexError as eager does."""
    assert inputs.pages is not None
    k, v = (_gather(x, inputs.pages, spec.wraps) for x in (inputs.k, inputs.v))
    return inputs._replace(k=k, v=v, pages=None)


def _gather(cache: torch.Tensor, pages: Pages, wraps: bool) -> torch.Tensor:
    table = places(pages.table, cache.shape[-3], wraps)
    batch = torch.broadcast_shapes(cache.shape[:-3], table.shape[:-1])
    cache, table = cache.expand(*batch, *cache.shape[-3:]), table.expand(*batch, table.shape[-1])
    own = [torch.arange(n, device=cache.device).view(n, *[1] * (len(batch) - d)) for d, n in enumerate(batch)]
    return cache[(*own, table)].flatten(-3, -2)[..., : pages.keys, :]
