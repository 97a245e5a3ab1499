"""`SplitCache`: a cache for models of transformers whose layers lie on the device or in host memory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from attnfuse.offload.attention import ATTENTION
from attnfuse.offload.planner import LayerCache, Plan, layer_caches, plan
from attnfuse.offload.transfer import move, settle, settled, store

_HOST = torch.device("cpu")


class Rows:
    """Which rows of their tensors the layers of one kind hold: those before `end`, as far as a window reaches.

    One for all layers of one window: were it one for each, a compiled graph would have as many symbols, and guards that they
    are equal.
    """

    def __init__(self, rows: int, window: int | None) -> None:
        self.rows, self.window, self.end = rows, window, 0

    def past(self, length: int) -> int:
        """How many of `length` tokens the next query may see."""
        return length if self.window is None else min(length, self.window - 1)

    def held(self, length: int) -> int:
        """The row after the last one that is held, of so many tokens."""
        return length if self.window is None else self.end

    def is_full(self, length: int, new: int) -> bool:
        """Whether what is held must move to the front before so many tokens come."""
        return self.window is not None and self.end + new > self.rows

    def is_longer(self, length: int, new: int) -> bool:
        """Whether there is no room for so many tokens beside those that they see."""
        return self.window is not None and self.past(length) + new > self.rows

    def advance(self, length: int, new: int) -> None:
        """So many tokens came."""
        if self.window is None:
            return
        if length == 0 or self.is_longer(length, new):
            self.end = min(length + new, self.window - 1)
        elif self.is_full(length, new):
            self.end = self.past(length) + new
        else:
            self.end = self.end + new


class Clock:
    """How many tokens the layers of a cache have seen. done: how many of the layers have seen those of this call, too."""

    def __init__(self, layers: int, kinds: Iterable[Rows]) -> None:
        self.layers, self.kinds = layers, tuple(kinds)
        self.length = self.done = self.new = 0

    def begin(self, layer: int, new: int) -> None:
        """Raises RuntimeError where it is not this layer's turn, and ValueError where it sees other tokens than those before it."""
        if layer != self.done:
            raise RuntimeError(
                f"layer {layer} is given keys where it is layer {self.done}'s turn: layers must run once each, in order. "
                "After a call that broke off, call reset()"
            )
        if layer and new != self.new:
            raise ValueError(f"layer {layer} is given {new} tokens and those before it {self.new}")
        self.new = new

    def finish(self) -> None:
        """A layer has its tokens."""
        self.done = self.done + 1
        if self.done == self.layers:
            for kind in self.kinds:
                kind.advance(self.length, self.new)
            self.length, self.done = self.length + self.new, 0

    def check_whole(self) -> None:
        """Raises RuntimeError where some layers have tokens that others have not."""
        if self.done:
            raise RuntimeError(f"a call broke off after {self.done} layers: call reset()")

    def seen(self, layer: int) -> int:
        """Tokens that this layer has seen."""
        return self.length + self.new if layer < self.done else self.length


class SplitLayer(CacheLayerMixin):
    """The keys and values of one layer, in tensors that are allocated whole.

    A prompt's keys and values, the first that come, are given back as they are, on the device, while they are written; from then
    on attention sees views of the tensors, which lie in host memory if `on_host`.
    """

    is_compileable = False
    keys: torch.Tensor
    values: torch.Tensor

    def __init__(
        self,
        cache: LayerCache,
        on_host: bool,
        clock: Clock,
        kind: Rows,
        config: Any,
        device: torch.device | None,
        pin: bool | None,
    ) -> None:
        super().__init__()
        self.cache, self.on_host, self.clock, self.kind = cache, on_host, clock, kind
        self.config, self.device, self.pin = config, device, pin
        self.is_sliding = cache.window is not None
        self.is_croppable = not self.is_sliding
        if device is not None:
            self._allocate()

    @property
    def bytes(self) -> int:
        """What is allocated."""
        return sum(x.numel() * x.element_size() for x in (self.keys, self.values) if x is not None)

    def _allocate(self) -> None:
        assert self.device is not None
        cache, device = self.cache, _HOST if self.on_host else self.device
        pin = self.on_host and (self.device.type == "cuda" if self.pin is None else self.pin)
        shape = (cache.batch, cache.heads, cache.rows)
        self.keys = torch.zeros(*shape, cache.key_size, dtype=cache.dtype, device=device, pin_memory=pin)
        self.values = torch.zeros(*shape, cache.value_size, dtype=cache.dtype, device=device, pin_memory=pin)
        self.is_initialized = True

    # Dynamo would take what is allocated for a value of the graph, and pinned memory is none
    @torch.compiler.disable
    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate, on the device of the first keys where none was named. Called by `update`."""
        self.device = key_states.device
        self._allocate()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep keys [B, Hkv, n, D] and values [B, Hkv, n, E], and return those that attention is to see.

        Raises ValueError where they are not as planned or too many, RuntimeError where they need gradients, where layers do not
        come in order, and where one in host memory serves a model whose attention function is not `ATTENTION`.
        """
        new, length, kind = key_states.shape[2], self.clock.length, self.kind
        # 0 before a prompt, and used there as well: a number that Dynamo has seen change is a symbol in the next graph
        end, past = kind.held(length), kind.past(length)
        self._check(key_states, value_states, length)
        self.clock.begin(self.cache.layer, new)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if length == 0:
            held = kind.past(new)
            self._write(key_states[:, :, new - held :], value_states[:, :, new - held :], end)
            found = key_states, value_states
        elif kind.is_longer(length, new):
            found = self._longer(key_states, value_states, end, past)
        else:
            if kind.is_full(length, new):
                self._shift(end, past)
                end = past
            self._write(key_states, value_states, end)
            found = self.keys[:, :, end - past : end + new], self.values[:, :, end - past : end + new]
        self.clock.finish()
        return found

    def _check(self, keys: torch.Tensor, values: torch.Tensor, length: int) -> None:
        cache = self.cache
        for name, x, size in (("keys", keys, cache.key_size), ("values", values, cache.value_size)):
            found, wanted = (*x.shape[:2], x.shape[3]), (cache.batch, cache.heads, size)
            if found != wanted or x.dtype != cache.dtype:
                raise ValueError(
                    f"layer {cache.layer}: the cache is planned for {name} {cache.dtype} of batch, heads, size {wanted}; "
                    f"the model gives {x.dtype} of {found}. Give batch= (times the number of beams) and dtype= as they are"
                )
            # 'cuda' is the current one, which memory on it tells
            place = self.keys.device if self.is_initialized and not self.on_host else self.device
            if place is not None and not _is(x.device, place):
                raise ValueError(f"layer {cache.layer}: the cache is for {place}; {name} are on {x.device}")
        # a window that has all of its rows goes on for ever
        if (cache.window is None or cache.rows < cache.window) and length + keys.shape[2] > cache.rows:
            raise ValueError(
                f"layer {cache.layer}: the cache is planned for {cache.rows} tokens; "
                f"{length} and {keys.shape[2]} more do not fit. Give a larger max_length="
            )
        if torch.is_grad_enabled() and (keys.requires_grad or values.requires_grad):
            raise RuntimeError(
                f"layer {cache.layer}: a SplitCache has no gradients. Call the model under torch.no_grad()"
            )
        if not self.on_host:
            return
        used = getattr(self.config, "_attn_implementation", ATTENTION)
        if used != ATTENTION:
            raise RuntimeError(
                f"layer {cache.layer}: the cache lies in host memory, where attention {used!r} cannot read it. "
                f"Call model.set_attn_implementation({ATTENTION!r}), and give SplitCache the model's own config"
            )

    def _write(self, keys: torch.Tensor, values: torch.Tensor, start: int) -> None:
        if self.on_host:
            store(keys, self.keys, start)
            store(values, self.values, start)
        else:
            stop = start + keys.shape[2]
            self.keys[:, :, start:stop] = keys
            self.values[:, :, start:stop] = values

    def _shift(self, end: int, past: int) -> None:
        """Move the last `past` rows before `end` to the front."""
        for x in (self.keys, self.values):
            x[:, :, :past] = self._copied(x, end - past, end)

    def _longer(
        self, keys: torch.Tensor, values: torch.Tensor, end: int, past: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """More new tokens than the tensors of a window have rows for: attention sees a copy."""
        if self.on_host:
            keys, values = move(keys, _HOST), move(values, _HOST)
        held = self.kind.past(past + keys.shape[2])
        found = []
        for own, new in ((self.keys, keys), (self.values, values)):
            whole = torch.cat([self._copied(own, end - past, end), new], 2)
            own[:, :, :held] = whole[:, :, whole.shape[2] - held :]
            found.append(whole)
        return found[0], found[1]

    def _copied(self, x: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """A copy of these rows, when they are there."""
        return settled(x, start, stop) if self.on_host else x[:, :, start:stop].clone()

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return self.clock.seen(self.cache.layer)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(how many keys attention will see, the number of the first of them)."""
        if isinstance(query_length, torch.Tensor):
            query_length = query_length.shape[0]
        length = self.get_seq_length()
        past = self.kind.past(length)
        return past + query_length, length - past

    def get_max_length(self) -> int:
        """Tokens that the layer has room for; with a sliding window, the window."""
        return self.cache.rows if self.cache.window is None else self.cache.window

    def get_max_cache_shape(self) -> int:
        """`get_max_length`, under the name of earlier versions."""
        return self.get_max_length()

    def reset(self) -> None:
        """Raises NotImplementedError: layers are reset together."""
        raise NotImplementedError("reset the SplitCache: its layers count tokens together")

    def crop(self, tokens_to_remove: int) -> None:
        """Raises NotImplementedError: layers are cropped together."""
        raise NotImplementedError("crop the SplitCache: its layers count tokens together")

    def activate_past_recording(self) -> None:
        """Raises NotImplementedError in a layer with a window, which keeps no more than it sees; others keep all of the past."""
        if self.cache.window is not None:
            raise NotImplementedError(
                "SplitCache records no past for layers with a sliding window: assisted decoding needs transformers' DynamicCache"
            )

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Put row beam_idx[i] of the batch into row i, in place."""
        self.clock.check_whole()
        length = self.clock.length
        if not length:
            return
        settle()
        for x in (self.keys, self.values):
            rows = x[:, :, : self.kind.held(length)]
            rows.copy_(rows.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Raises NotImplementedError: the size of the batch is planned."""
        raise NotImplementedError(
            "the batch of a SplitCache is planned and cannot grow: give the prompt the whole batch"
        )

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Raises NotImplementedError: the size of the batch is planned."""
        raise NotImplementedError("the batch of a SplitCache is planned and cannot shrink")

    def offload(self) -> None:
        """Nothing: where the layer lies is planned."""

    def prefetch(self) -> None:
        """Nothing: attention goes to the cache."""


def _is(device: torch.device, place: torch.device) -> bool:
    """Whether a device is the one that `place` names, with its number or without."""
    return device.type == place.type and (place.index is None or device.index in (None, place.index))


class SplitCache(Cache):
    """A cache for `model.generate(past_key_values=...)` and `model(past_key_values=...)`, part of it in host memory.

        model.set_attn_implementation("attnfuse_split")
        cache = SplitCache(model.config, max_length=4096, budget=2 * 2**30)
        model.generate(**inputs, past_key_values=cache)

    config       the model's own
    max_length   tokens of a row at most, prompt and padding included
    batch        rows of the batch, times the number of beams
    budget       bytes on the device for caches, or
    host_layers  the numbers of the layers in host memory; see `attnfuse.offload.plan`
    host_budget  bytes of host memory at most
    dtype        of keys and values; that of the config if None
    device       where the model computes: all is allocated at once then. If None, it is as the first keys come, on their device;
                 a prompt that is run compiled has a graph break there
    pin          whether host memory is pinned; if None, where the device is a CUDA or ROCm one

    `plan` says where each layer lies; `device_bytes` and `host_bytes` what is allocated. There are no gradients. Raises as
    `layer_caches` and `plan` do.
    """

    def __init__(
        self,
        config: Any,
        *,
        max_length: int,
        batch: int = 1,
        budget: int | None = None,
        host_layers: Iterable[int] | None = None,
        host_budget: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        pin: bool | None = None,
    ):
        self.plan: Plan = plan(layer_caches(config, batch, max_length, dtype), budget, host_layers, host_budget)
        own = config.get_text_config(decoder=True)
        place = None if device is None else torch.device(device)
        kinds = {x.window: Rows(x.rows, x.window) for x in self.plan.caches}
        self.clock = Clock(len(self.plan.caches), kinds.values())
        layers: list[Any] = [
            SplitLayer(x, x.layer in self.plan.host, self.clock, kinds[x.window], own, place, pin)
            for x in self.plan.caches
        ]
        super().__init__(layers=layers)

    def reset(self) -> None:
        """Forget all tokens. The memory stays."""
        settle()
        self.clock.length = self.clock.done = self.clock.new = 0
        for kind in self.clock.kinds:
            kind.end = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -tokens_to_remove tokens, as transformers' own caches count.

        Raises ValueError for a positive number and for more tokens than there are, RuntimeError where the window of a layer has
        moved on, so that what it would see again is gone, and after a call that broke off.
        """
        self.clock.check_whole()
        length = self.clock.length
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes minus the number of tokens to remove; got {tokens_to_remove}")
        if length + tokens_to_remove < 0:
            raise ValueError(f"{-tokens_to_remove} tokens cannot be removed from {length}")
        if tokens_to_remove == 0:
            return
        for kind in self.clock.kinds:
            if kind.window is not None and length >= kind.window:
                raise RuntimeError(
                    f"{length} tokens have filled a window of {kind.window}, and those before it are gone"
                )
        settle()
        self.clock.length += tokens_to_remove
        for kind in self.clock.kinds:
            kind.end = max(kind.end + tokens_to_remove, 0)

    def _allocated(self, on_host: bool) -> int:
        layers = [x for x in self.layers if isinstance(x, SplitLayer)]
        return sum(x.bytes for x in layers if x.on_host == on_host)

    @property
    def device_bytes(self) -> int:
        """What is allocated on the device."""
        return self._allocated(False)

    @property
    def host_bytes(self) -> int:
        """What is allocated in host memory."""
        return self._allocated(True)
