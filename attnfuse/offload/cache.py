"""`SplitCache`: a cache for models of transformers whose layers lie on the device or in host memory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from attnfuse.offload.attention import ATTENTION
from attnfuse.offload.planner import LayerCache, Plan, layer_caches, plan
from attnfuse.offload.transfer import move, settle, store

_HOST = torch.device("cpu")


class SplitLayer(CacheLayerMixin):
    """The keys and values of one layer, in tensors that are allocated whole.

    A prompt's keys and values, the first that come, are given back as they are, on the device, while they are written; from then
    on attention sees views of the tensors, which lie in host memory if `on_host`.
    """

    is_compileable = False

    def __init__(self, cache: LayerCache, on_host: bool, config: Any, device: torch.device | None, pin: bool | None):
        super().__init__()
        self.cache, self.on_host, self.config, self.device, self.pin = cache, on_host, config, device, pin
        self.window = cache.window
        self.is_sliding = cache.window is not None
        self.is_croppable = not self.is_sliding
        self.length = 0  # tokens seen
        self.end = 0  # the row after the last one that is held
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

        Raises ValueError where they are not as planned or too many, RuntimeError where a layer in host memory is given tensors
        that need gradients, or serves a model whose attention function is not `ATTENTION`.
        """
        if not self.is_initialized:
            self._check(key_states, value_states)
            self.lazy_initialization(key_states, value_states)
        self._check(key_states, value_states)
        new = key_states.shape[-2]
        if self.length == 0:
            held = new if self.window is None else min(new, self.window - 1)
            self._write(key_states[:, :, new - held :], value_states[:, :, new - held :], 0)
            self.end, self.length = held, new
            return key_states, value_states
        past = self.past
        if self.end + new > self.cache.rows and past + new <= self.cache.rows:
            self._shift(past)
        if self.end + new <= self.cache.rows:
            self._write(key_states, value_states, self.end)
            self.end, self.length = self.end + new, self.length + new
            seen = slice(self.end - new - past, self.end)
            return self.keys[:, :, seen], self.values[:, :, seen]
        return self._longer(key_states, value_states, past)

    @property
    def past(self) -> int:
        """How many tokens before the next one its query may see."""
        return self.length if self.window is None else min(self.length, self.window - 1)

    def _check(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        cache = self.cache
        for name, x, size in (("keys", keys, cache.key_size), ("values", values, cache.value_size)):
            found, wanted = (*x.shape[:2], x.shape[3]), (cache.batch, cache.heads, size)
            if found != wanted or x.dtype != cache.dtype:
                raise ValueError(
                    f"layer {cache.layer}: the cache is planned for {name} {cache.dtype} of batch, heads, size {wanted}; "
                    f"the model gives {x.dtype} of {found}. Give batch= (times the number of beams) and dtype= as they are"
                )
            if self.device is not None and x.device.type != self.device.type:
                raise ValueError(f"layer {cache.layer}: the cache is for {self.device}; {name} are on {x.device}")
        if self.window is None and self.length + keys.shape[2] > cache.rows:
            raise ValueError(
                f"layer {cache.layer}: the cache is planned for {cache.rows} tokens; "
                f"{self.length} and {keys.shape[2]} more do not fit. Give a larger max_length="
            )
        if not self.on_host:
            return
        if torch.is_grad_enabled() and (keys.requires_grad or values.requires_grad):
            raise RuntimeError(
                f"layer {cache.layer}: a cache in host memory has no gradients. Call the model under torch.no_grad()"
            )
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

    def _shift(self, past: int) -> None:
        """Move the last `past` rows to the front."""
        self._settled()
        for x in (self.keys, self.values):
            x[:, :, :past] = x[:, :, self.end - past : self.end].clone()
        self.end = past

    def _longer(self, keys: torch.Tensor, values: torch.Tensor, past: int) -> tuple[torch.Tensor, torch.Tensor]:
        """More new tokens than a window's tensors have rows for: attention sees a copy."""
        self._settled()
        if self.on_host:
            keys, values = move(keys, _HOST), move(values, _HOST)
        held, seen = self.cache.window - 1 if self.cache.window else 0, slice(self.end - past, self.end)
        found = []
        for own, new in ((self.keys, keys), (self.values, values)):
            whole = torch.cat([own[:, :, seen], new], 2)
            last = min(held, whole.shape[2])
            own[:, :, :last] = whole[:, :, whole.shape[2] - last :]
            found.append(whole)
        self.end, self.length = min(held, past + keys.shape[2]), self.length + keys.shape[2]
        return found[0], found[1]

    def _settled(self) -> None:
        # in a graph every store is ahead of what reads it
        if self.on_host and not torch.compiler.is_compiling():
            settle()

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(how many keys attention will see, the number of the first of them)."""
        if isinstance(query_length, torch.Tensor):
            query_length = query_length.shape[0]
        return self.past + query_length, self.length - self.past

    def get_max_length(self) -> int:
        """Tokens that the layer has room for; with a sliding window, the window."""
        return self.window if self.window is not None else self.cache.rows

    def get_max_cache_shape(self) -> int:
        """`get_max_length`, under the name of earlier versions."""
        return self.get_max_length()

    def reset(self) -> None:
        """Forget all tokens. The memory stays."""
        self._settled()
        self.length = self.end = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -tokens_to_remove tokens, as transformers' own layers count.

        Raises ValueError for a positive number and for more tokens than there are, RuntimeError where the window of the layer has
        moved on and what is to be seen again is gone.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes minus the number of tokens to remove; got {tokens_to_remove}")
        if -tokens_to_remove > self.length:
            raise ValueError(f"{-tokens_to_remove} tokens cannot be removed from {self.length}")
        if tokens_to_remove == 0:
            return
        if self.window is not None and self.length >= self.window:
            raise RuntimeError(
                f"layer {self.cache.layer}: {self.length} tokens have filled its window of {self.window}, and those before are gone"
            )
        self.length += tokens_to_remove
        self.end += tokens_to_remove

    def activate_past_recording(self) -> None:
        """Raises NotImplementedError in a layer with a window, which keeps no more than it sees; others keep all of the past."""
        if self.window is not None:
            raise NotImplementedError(
                "SplitCache records no past for layers with a sliding window: assisted decoding needs transformers' DynamicCache"
            )

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Put row beam_idx[i] of the batch into row i, in place."""
        if not self.length:
            return
        self._settled()
        for x in (self.keys, self.values):
            rows = x[:, :, : self.end]
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
        super().__init__(layers=[SplitLayer(x, x.layer in self.plan.host, own, place, pin) for x in self.plan.caches])

    def _allocated(self, on_host: bool) -> int:
        return sum(layer.bytes for layer in self.layers if layer.on_host == on_host)

    @property
    def device_bytes(self) -> int:
        """What is allocated on the device."""
        return self._allocated(False)

    @property
    def host_bytes(self) -> int:
        """What is allocated in host memory."""
        return self._allocated(True)
