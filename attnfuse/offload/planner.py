"""Which layers' caches stay on the device, and which lie in host memory, under a budget of bytes.

Everything here is of plain numbers: no tensor is made, no device is asked, and transformers is not imported.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

#: The types of layers, as a config's `layer_types` names them, whose rows of keys and values are known.
_WHOLE = frozenset({"full_attention"})
_WINDOWED = frozenset({"sliding_attention", "chunked_attention"})


@dataclass(frozen=True)
class LayerCache:
    """The cache of one layer: keys [batch, heads, rows, key_size] and values [batch, heads, rows, value_size] of `dtype`.

    heads are those of keys and values. window: how many keys a query sees, itself included, in a layer with a sliding window;
    None in others. `rows` is what is allocated, from the first token on.
    """

    layer: int
    batch: int
    heads: int
    rows: int
    key_size: int
    value_size: int
    dtype: torch.dtype
    window: int | None = None

    @property
    def bytes(self) -> int:
        """Of keys and values together, when they are full."""
        return self.batch * self.heads * self.rows * (self.key_size + self.value_size) * self.dtype.itemsize


@dataclass(frozen=True)
class Plan:
    """Where the cache of each layer lies. host: the numbers of those in host memory, ascending; the others are on the device."""

    caches: tuple[LayerCache, ...]
    host: tuple[int, ...]

    @property
    def device_bytes(self) -> int:
        """What the caches take on the device."""
        return sum(x.bytes for x in self.caches if x.layer not in self.host)

    @property
    def host_bytes(self) -> int:
        """What the caches take in host memory."""
        return sum(x.bytes for x in self.caches if x.layer in self.host)

    def __str__(self) -> str:
        there = len(self.caches) - len(self.host)
        which = f" (layers {', '.join(map(str, self.host))})" if self.host else ""
        return (
            f"{there} of {len(self.caches)} layers' caches on the device, {self.device_bytes} bytes; "
            f"{len(self.host)} in host memory, {self.host_bytes} bytes{which}"
        )


def layer_caches(config: Any, batch: int, max_length: int, dtype: torch.dtype | None = None) -> tuple[LayerCache, ...]:
    """The caches of a decoder's layers, from its config.

    config      of transformers, or any object with num_hidden_layers, num_attention_heads, hidden_size and, where it has them,
                num_key_value_heads, head_dim, layer_types, sliding_window, attention_chunk_size, dtype
    batch       rows of the batch; with beam search, times the number of beams
    max_length  tokens of a row at most: those of the prompt, its padding included, and those that are generated
    dtype       of the cache; that of the config if None

    A layer with a sliding window of w has w - 1 rows for the past and w // 4 + 1 to write to, so that the past moves once in so
    many tokens. Raises ValueError for sizes that are not positive integers and where no dtype is known, NotImplementedError for
    layers whose cache is not one of keys and values by token.
    """
    decoder = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    _positive(batch=batch, max_length=max_length)
    dtype = dtype if dtype is not None else getattr(decoder, "dtype", None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"the dtype of the cache must be a floating-point torch.dtype; got {dtype!r}. Give dtype=")
    for name, why in (
        ("kv_lora_rank", "keeps compressed keys (MLA)"),
        ("num_kv_shared_layers", "shares caches between layers"),
        ("kv_sharing_modes", "shares caches between layers"),
    ):
        if getattr(decoder, name, None):
            raise NotImplementedError(f"a model that {why} has caches that are not planned: its config has {name}")
    count, heads = decoder.num_hidden_layers, decoder.num_attention_heads
    heads_kv = getattr(decoder, "num_key_value_heads", None) or heads
    size = getattr(decoder, "head_dim", None) or decoder.hidden_size // heads
    _positive(num_hidden_layers=count, num_key_value_heads=heads_kv, head_dim=size)
    windows = [_window(decoder, kind) for kind in _types(decoder, count)]
    return tuple(
        LayerCache(layer, batch, heads_kv, _rows(max_length, window), size, size, dtype, window)
        for layer, window in enumerate(windows)
    )


def _types(config: Any, count: int) -> Sequence[str]:
    types = getattr(config, "layer_types", None)
    if types is None:
        one = "full_attention"
        if getattr(config, "sliding_window", None) is not None:
            one = "sliding_attention"
        elif getattr(config, "attention_chunk_size", None) is not None:
            one = "chunked_attention"
        return [one] * count
    if len(types) != count:
        raise ValueError(f"the config names types of {len(types)} layers and has {count}")
    return list(types)


def _window(config: Any, kind: str) -> int | None:
    if kind in _WHOLE:
        return None
    if kind not in _WINDOWED:
        raise NotImplementedError(f"the cache of a layer of type {kind!r} is not one of keys and values by token")
    window = config.sliding_window if kind == "sliding_attention" else config.attention_chunk_size
    _positive(window=window)
    return int(window)


def _rows(max_length: int, window: int | None) -> int:
    return max_length if window is None else min(max_length, window + window // 4)


def plan(
    caches: Sequence[LayerCache],
    budget: int | None = None,
    host_layers: Iterable[int] | None = None,
    host_budget: int | None = None,
) -> Plan:
    """Which of the caches lie in host memory.

    budget       bytes on the device for caches. As few bytes as possible lie in host memory, since those are what the CPU reads
                 for each token; of equal ones the choice with the fewest layers there, for which q and the result travel. Layers
                 of one size are spread evenly over the model, so that during prefill the copies of one layer have the
                 computation of others to hide behind. 0 puts all of them in host memory.
    host_layers  the numbers of the layers, in place of a budget
    host_budget  bytes of host memory for caches, or None for no bound

    The same arguments give the same plan. Raises ValueError where both or neither of budget and host_layers are given, for
    numbers that are no layers or come twice, for negative budgets, for a budget that is not 0 and holds no layer's cache, and
    where what is left is more than host_budget.
    """
    caches = tuple(caches)
    if [x.layer for x in caches] != list(range(len(caches))) or not caches:
        raise ValueError("caches must be those of layers 0, 1, ... in order, of one layer at least")
    if (budget is None) == (host_layers is None):
        raise ValueError("give one of budget (bytes on the device) and host_layers (numbers of layers)")
    for name, value in (("budget", budget), ("host_budget", host_budget)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
            raise ValueError(f"{name} must be bytes, an integer from 0 on; got {value!r}")
    if host_layers is not None:
        chosen = list(host_layers)
        wrong = [x for x in chosen if not isinstance(x, int) or isinstance(x, bool) or not 0 <= x < len(caches)]
        if wrong:
            raise ValueError(f"host_layers must be numbers of layers from 0 to {len(caches) - 1}; got {wrong[0]!r}")
        if len(set(chosen)) != len(chosen):
            raise ValueError(f"host_layers names a layer twice: {chosen}")
        host = tuple(sorted(chosen))
    else:
        assert budget is not None
        host = _within(caches, budget)
    made = Plan(caches, host)
    if host_budget is not None and made.host_bytes > host_budget:
        raise ValueError(f"the caches do not fit: {made}, where host_budget is {host_budget} bytes")
    return made


def _within(caches: Sequence[LayerCache], budget: int) -> tuple[int, ...]:
    smallest = min(x.bytes for x in caches)
    if 0 < budget < smallest:
        raise ValueError(
            f"a budget of {budget} bytes holds no layer's cache, the smallest of which takes {smallest}; "
            "0 puts all of them in host memory"
        )
    sizes: dict[int, list[int]] = defaultdict(list)
    for x in caches:
        sizes[x.bytes].append(x.layer)
    kept = _most(sorted(sizes), {size: len(layers) for size, layers in sizes.items()}, budget)
    host = []
    for size, layers in sizes.items():
        away = len(layers) - kept[size]
        host += [layers[i * len(layers) // away] for i in range(away)]
    return tuple(sorted(host))


def _most(sizes: Sequence[int], counts: dict[int, int], budget: int) -> dict[int, int]:
    """How many caches of each size to keep, so that their sum is as large as the budget allows, and their number then."""
    # for each sum that can be reached: the most caches that make it, and how many of each size those are
    found: dict[int, tuple[int, tuple[int, ...]]] = {0: (0, ())}
    for size in sizes:
        reached: dict[int, tuple[int, tuple[int, ...]]] = {}
        for total, (number, kept) in found.items():
            for more in range(counts[size] + 1):
                if total + more * size > budget:
                    break
                at, new = total + more * size, (number + more, (*kept, more))
                reached[at] = max(reached.get(at, new), new)
        found = reached
    return dict(zip(sizes, found[max(found)][1], strict=True))


def _positive(**values: Any) -> None:
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be a positive integer; got {value!r}")
