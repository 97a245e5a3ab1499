"""Split caches in models of transformers, on two devices: the second is that of tests/twin_device.py."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from late_copies import Late, late_copies
from repository import ROOT
from split_models import LAYERS, MODELS, NEW, Generated, build, expected, generated, prompt
from twin_device import DEVICE, Twin, placed, twin_device

import attnfuse.offload
from attnfuse.offload import Transfer, layer_caches, observe, plan, transfer

pytest.importorskip("transformers")
pytestmark = pytest.mark.models

from transformers import DynamicCache  # noqa: E402

from attnfuse.offload import ATTENTION, SplitCache, attention  # noqa: E402

TOKENS = 10 + NEW
CPU = torch.device("cpu")


def split_model(name: str = "llama") -> Any:
    model = placed(build(name))
    model.set_attn_implementation(ATTENTION)
    return model


def on_twin(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: Twin(x) for name, x in inputs.items()}


def run(model: Any, cache: SplitCache, inputs: dict[str, torch.Tensor] | None = None, **options: Any) -> Generated:
    with twin_device():
        found = generated(model, on_twin(inputs or prompt()), past_key_values=cache, **options)
    return Generated(found.tokens.x, found.logits.x)  # type: ignore[attr-defined]


def same(found: Generated, wanted: Generated) -> None:
    assert torch.equal(found.tokens, wanted.tokens)
    torch.testing.assert_close(found.logits, wanted.logits, rtol=1e-4, atol=1e-4)


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> Iterator[Late]:
    yield from late_copies(monkeypatch)


def test_the_python_of_the_guide_runs_from_top_to_bottom(capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "docs/offload.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    assert len(blocks) == text.count("```python") == 1
    exec(compile(blocks[0], "docs/offload.md", "exec"), {})
    assert capsys.readouterr().out.startswith(
        "2 of 4 layers' caches on the device, 45056 bytes; 2 in host memory, 45056 bytes"
    )


def test_the_api_page_shows_how_a_cache_is_made() -> None:
    shown = inspect.signature(SplitCache)
    said = [f"{p.name}={p.default!r}" if p.default is not p.empty else p.name for p in shown.parameters.values()]
    assert f"`SplitCache({', '.join([said[0], '*', *said[1:]])})`" in (ROOT / "docs/api.md").read_text()
    assert [name for name in attnfuse.offload.__all__ if name not in (ROOT / "docs/api.md").read_text()] == []


# -- whole models


@pytest.mark.parametrize("host", [(), (1,), (0, 2), tuple(range(LAYERS))], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_generation_equals_that_with_all_on_one_device(name: str, host: tuple[int, ...], late: Late) -> None:
    model = split_model(name)
    cache = SplitCache(model.config, max_length=TOKENS, batch=2, host_layers=host)
    same(run(model, cache), expected(name))
    assert [x.keys.device.type for x in cache.layers] == ["cpu" if i in host else "lazy" for i in range(LAYERS)]
    assert cache.get_seq_length() == TOKENS - 1
    assert late == ({"behind": 2 * len(host), "done": 2 * len(host)} if host else {})


def test_without_moves_such_a_model_fails_on_tensors_of_two_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """That the second device is one."""
    model = split_model()
    cache = SplitCache(model.config, max_length=TOKENS, batch=2, host_layers=[0])
    monkeypatch.setattr(attention, "is_elsewhere", lambda *_: False)
    with pytest.raises(RuntimeError, match=r"query.device: lazy key.device: cpu"):
        run(model, cache)
    with pytest.raises(RuntimeError, match="aten::mm: tensors on lazy and on cpu"):
        _ = Twin(torch.ones(2, 2)) @ torch.ones(2, 2)


def test_a_model_with_another_attention_is_told_what_to_do() -> None:
    model = placed(build("llama"))
    cache = SplitCache(model.config, max_length=TOKENS, batch=2, host_layers=[0])
    with pytest.raises(RuntimeError, match=r"set_attn_implementation\('attnfuse_split'\)"):
        run(model, cache)
    # with nothing in host memory any attention does
    same(run(model, SplitCache(model.config, max_length=TOKENS, batch=2, host_layers=[])), expected("llama"))


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_what_is_allocated_is_what_is_planned_and_fits_the_budget(name: str) -> None:
    model = split_model(name)
    layers = layer_caches(model.config, 2, TOKENS)
    budget = sum(x.bytes for x in layers) // 2
    cache = SplitCache(model.config, max_length=TOKENS, batch=2, budget=budget)
    assert cache.plan == plan(layers, budget=budget)
    assert 0 < len(cache.plan.host) < LAYERS
    assert cache.device_bytes == cache.host_bytes == 0
    run(model, cache)
    assert (cache.device_bytes, cache.host_bytes) == (cache.plan.device_bytes, cache.plan.host_bytes)
    assert cache.device_bytes <= budget
    for layer in cache.layers:
        held = [x.x if isinstance(x, Twin) else x for x in (layer.keys, layer.values)]
        assert sum(x.untyped_storage().nbytes() for x in held) == layer.cache.bytes
    before = [x.data_ptr() for layer in cache.layers if layer.on_host for x in (layer.keys, layer.values)]
    cache.reset()
    run(model, cache)
    assert before == [x.data_ptr() for layer in cache.layers if layer.on_host for x in (layer.keys, layer.values)]


def test_of_each_token_only_q_the_result_and_its_own_row_travel() -> None:
    model = split_model()
    host = (0, 2)
    cache = SplitCache(model.config, max_length=TOKENS, batch=2, host_layers=host)
    log: list[Transfer] = []
    with observe(log.append):
        run(model, cache)
    heads, own, size, batch, number = 4, 2, 8, 2, 4
    prefill = [Transfer("store", DEVICE, CPU, batch * own * 10 * size * number)] * 2 * len(host)
    assert log[: len(prefill)] == prefill
    steps = log[len(prefill) :]
    row = Transfer("store", DEVICE, CPU, batch * own * size * number)
    q, result = (Transfer("move", *way, batch * heads * size * number) for way in ((DEVICE, CPU), (CPU, DEVICE)))
    wanted = []
    for step in range(NEW - 1):
        # bools, once for all layers
        mask = Transfer("move", DEVICE, CPU, batch * (10 + step + 1))
        wanted += [row, row, q, mask, result, row, row, q, result]
    assert steps == wanted


def test_beams_are_reordered_where_they_are(late: Late) -> None:
    model = split_model("gemma2")
    cache = SplitCache(model.config, max_length=TOKENS, batch=6, host_layers=[0, 2])
    found = run(model, cache, num_beams=3)
    assert torch.equal(found.tokens, expected("gemma2", 3).tokens)
    assert late["behind"] == 4


def test_tokens_are_guessed_from_the_prompt_and_taken_back(late: Late) -> None:
    """Assisted decoding, by transformers' prompt lookup: it crops the cache where a guess was wrong."""
    ids = prompt(batch=1, padding=0)["input_ids"]
    inputs = {"input_ids": torch.cat([ids, ids[:, :6]], 1), "attention_mask": torch.ones(1, 16, dtype=torch.long)}
    model = split_model()
    cache = SplitCache(model.config, max_length=16 + NEW + 3, host_layers=[0, 2])
    steps: list[int] = []
    model.register_forward_hook(lambda module, args, kwargs, out: steps.append(out.logits.shape[1]), with_kwargs=True)
    with twin_device():
        found = model.generate(
            **on_twin(inputs), past_key_values=cache, max_new_tokens=NEW, do_sample=False, prompt_lookup_num_tokens=3
        )
    wanted = build("llama").generate(**inputs, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(found.x, wanted)
    # three guesses go with the prompt, and are wrong
    assert steps == [3 + 1] + [1] * (NEW - 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_models_are_as_exact_as_on_one_device(dtype: torch.dtype) -> None:
    """Logits of a prompt and four tokens, fed one by one, against the same weights in float32."""
    ids = torch.cat([prompt()["input_ids"], prompt(length=4)["input_ids"]], 1)
    narrow, model = build("llama", dtype=dtype), placed(build("llama", dtype=dtype))
    exact = build("llama", dtype=dtype).float()
    model.set_attn_implementation(ATTENTION)
    cache, plain = (
        SplitCache(model.config, max_length=14, batch=2, host_layers=[0, 1]),
        DynamicCache(config=narrow.config),
    )
    with torch.no_grad(), twin_device():
        wanted = exact(ids).logits
        errors = []
        for run_on, held, given in ((model, cache, Twin(ids)), (narrow, plain, ids)):
            parts = [run_on(x, past_key_values=held).logits for x in given.split([10, 1, 1, 1, 1], 1)]
            logits = torch.cat([x.x if isinstance(x, Twin) else x for x in parts], 1).float()
            errors.append((logits - wanted).abs().mean())
    assert errors[0] <= 1.1 * errors[1]
    assert errors[1] > 0


def test_a_cache_is_used_again_and_cropped(late: Late) -> None:
    model, reference = split_model(), build("llama")
    ids = prompt()["input_ids"]
    cache = SplitCache(model.config, max_length=32, batch=2, host_layers=[1, 2])
    plain = DynamicCache(config=reference.config)
    with torch.no_grad(), twin_device():
        for tokens, back in ((ids, 0), (ids[:, :3], -2), (ids[:, 4:5], 0), (ids[:, :2], -11), (ids, 0)):
            found = model(Twin(tokens), past_key_values=cache).logits.x
            torch.testing.assert_close(found, reference(tokens, past_key_values=plain).logits, rtol=1e-4, atol=1e-4)
            cache.crop(back)
            plain.crop(back)
            assert cache.get_seq_length() == plain.get_seq_length()
        cache.reset()
        assert cache.get_seq_length() == 0
        found = model(Twin(ids), past_key_values=cache).logits.x
        torch.testing.assert_close(found, reference(ids).logits, rtol=1e-4, atol=1e-4)
    transfer.settle()


# -- layers beside those of DynamicCache


@pytest.mark.parametrize("name", ["llama", "mistral window", "gemma2"])
@pytest.mark.parametrize("seed", range(12))
def test_layers_give_what_those_of_dynamic_cache_give(name: str, seed: int, late: Late) -> None:
    """Chunks of any lengths, longer than a window too: keys, values, and what masks are made for."""
    config = build(name).config
    generator = torch.Generator().manual_seed(seed)
    chunks = [int(n) for n in torch.randint(1, (4, 12, 30)[seed % 3], (8,), generator=generator)]
    cache = SplitCache(config, max_length=sum(chunks), batch=2, host_layers=[0, 2])
    config._attn_implementation = ATTENTION
    plain = DynamicCache(config=config)
    layers = layer_caches(config, 2, 1)
    for at, chunk in enumerate(chunks):
        sizes = [(cache.get_mask_sizes(chunk, i), cache.get_seq_length(i)) for i in range(LAYERS)]
        assert sizes == [(plain.get_mask_sizes(chunk, i), plain.get_seq_length(i)) for i in range(LAYERS)]
        for i in range(LAYERS):
            k, v = (torch.randn(2, layers[i].heads, chunk, layers[i].key_size, generator=generator) for _ in "kv")
            found, wanted = cache.update(k, v, i), plain.update(k, v, i)
            # in every other case nobody but the cache itself waits, until the end
            if seed % 2 or at == len(chunks) - 1:
                transfer.settle()
                assert torch.equal(found[0], wanted[0])
                assert torch.equal(found[1], wanted[1])
        if not chunk % 3:
            cache.reorder_cache(torch.tensor([1, 0]))
            plain.reorder_cache(torch.tensor([1, 0]))
    assert cache.get_seq_length() == sum(chunks)


def test_a_window_is_cropped_until_it_is_full() -> None:
    config = build("mistral window").config
    cache, plain = SplitCache(config, max_length=20, host_layers=[]), DynamicCache(config=config)

    def step(n: int) -> None:
        for i in range(LAYERS):
            k = torch.randn(1, 2, n, 8)
            for found, wanted in zip(cache.update(k, -k, i), plain.update(k, -k, i)):
                assert torch.equal(found, wanted)

    step(3)
    step(2)
    for x in (cache, plain):
        x.crop(-4)
    step(1)
    step(2)
    step(4)
    with pytest.raises(RuntimeError, match="8 tokens have filled a window of 6"):
        cache.crop(-1)
    cache.crop(0)


def test_a_window_that_is_longer_than_the_cache_ends_with_it() -> None:
    config = build("mistral window").config
    for length, fits in ((5, False), (6, True)):
        cache = SplitCache(config, max_length=length, host_layers=[])
        for n in (length, 1):
            k = torch.randn(1, 2, n, 8)
            if n == 1 and not fits:
                with pytest.raises(ValueError, match="planned for 5 tokens; 5 and 1 more"):
                    cache.update(k, k, 0)
                break
            for i in range(LAYERS):
                assert cache.update(k, k, i)[0].shape[2] == (n if n > 1 else 6)


# -- errors


def keys(config: Any, n: int = 1, batch: int = 1, dtype: torch.dtype = torch.float32, **options: Any) -> torch.Tensor:
    return torch.randn(batch, config.num_key_value_heads, n, 8, dtype=dtype, **options)


def test_what_is_not_as_planned_is_an_error() -> None:
    config = build("llama").config
    config._attn_implementation = ATTENTION
    cache = SplitCache(config, max_length=4, host_layers=[0], device="cpu")
    for k, said in (
        (keys(config, batch=2), r"\(1, 2, 8\); the model gives torch.float32 of \(2, 2, 8\)"),
        (keys(config, dtype=torch.bfloat16), "planned for keys torch.float32"),
        (keys(config, n=5), "planned for 4 tokens; 0 and 5 more do not fit"),
        (keys(config, device="meta"), "the cache is for cpu; keys are on meta"),
    ):
        with pytest.raises(ValueError, match=said):
            cache.update(k, k, 0)
    for held in (cache, SplitCache(config, max_length=4, host_layers=[])):
        with pytest.raises(RuntimeError, match=r"no_grad\(\)"):
            held.update(keys(config, requires_grad=True), keys(config), 0)
    with pytest.raises(RuntimeError, match="layer 2 is given keys where it is layer 0's turn"):
        cache.update(keys(config), keys(config), 2)
    cache.update(keys(config), keys(config), 0)
    with pytest.raises(ValueError, match="layer 1 is given 2 tokens and those before it 1"):
        cache.update(keys(config, 2), keys(config, 2), 1)
    for call in (lambda: cache.crop(-1), lambda: cache.reorder_cache(torch.tensor([0]))):
        with pytest.raises(RuntimeError, match="broke off after 1 layers"):
            call()
    cache.reset()
    for i in range(LAYERS):
        cache.update(keys(config), keys(config), i)
    with pytest.raises(ValueError, match="minus the number"):
        cache.crop(1)
    with pytest.raises(ValueError, match="2 tokens cannot be removed from 1"):
        cache.crop(-2)


def test_what_a_planned_cache_cannot_do_is_an_error() -> None:
    cache = SplitCache(build("mistral window").config, max_length=8, budget=0, device="cpu")
    for call in (
        lambda: cache.batch_repeat_interleave(2),
        lambda: cache.batch_select_indices(torch.tensor([0])),
        cache.activate_past_recording,
        cache.layers[0].reset,
        lambda: cache.layers[0].crop(-1),
    ):
        with pytest.raises(NotImplementedError):
            call()
    # a layer without a window keeps all of the past
    SplitCache(build("llama").config, max_length=8, budget=0, device="cpu").activate_past_recording()


def test_without_transformers_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [x for x in sys.modules if x.split(".")[0] == "transformers"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)
    for module, name in (("attention", "ATTENTION"), ("cache", "SplitCache")):
        monkeypatch.delitem(sys.modules, f"attnfuse.offload.{module}")
        monkeypatch.delitem(vars(attnfuse.offload), name, raising=False)
    for name in ("ATTENTION", "SplitCache"):
        with pytest.raises(ImportError, match=r"pip install 'attnfuse\[models\]'"):
            getattr(attnfuse.offload, name)
    assert importlib.reload(attnfuse.offload.planner).plan
    with pytest.raises(AttributeError, match="no attribute 'Splitcache'"):
        _ = attnfuse.offload.Splitcache
