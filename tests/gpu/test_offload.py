"""Split caches on a device: copies on a stream of their own, and models of transformers where that is installed."""

from __future__ import annotations

import pytest
import torch

from attnfuse.offload import observe, settle, transfer

pytestmark = pytest.mark.gpu


def busy(device: torch.device) -> torch.Tensor:
    """Products that keep the device busy for much longer than it takes to ask for a copy."""
    x = torch.randn(4096, 4096, device=device)
    for _ in range(200):
        x = x @ x / 64
    return x


def test_a_store_is_behind_what_is_computed(device: torch.device) -> None:
    x = torch.randn(2, 5, 300, 64, device=device).to(torch.bfloat16).transpose(1, 2).contiguous().transpose(1, 2)
    cache = torch.zeros(2, 5, 400, 64, dtype=torch.bfloat16, pin_memory=True)
    wanted = x.cpu()
    settle()
    before = busy(device)
    transfer.store(x, cache, 50)
    # what the device was told to do before is not done
    assert not transfer.pending[x.device].query()
    # the memory of what is stored may be used again
    del x
    after = [torch.full((2, 300, 5, 64), 7.0, dtype=torch.bfloat16, device=device) for _ in range(8)]
    settle()
    assert not transfer.pending
    assert torch.equal(cache[:, :, 50:350], wanted)
    assert not cache[:, :, :50].any()
    assert not cache[:, :, 350:].any()
    assert before.shape == (4096, 4096)
    assert len(after) == 8


def test_a_compiled_store_takes_what_its_tensor_held(device: torch.device) -> None:
    cache = torch.zeros(1, 2, 256, 32, pin_memory=True)

    @torch.compile
    def run(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        transfer.store(y, cache, 0)
        return y.sin().cos().exp() + 1

    x = torch.randn(1, 2, 256, 32, device=device)
    for _ in range(3):
        cache.zero_()
        run(x)
        settle()
        assert torch.equal(cache, x.cpu() * 2)


def test_rows_are_copied_and_moved_when_they_are_there(device: torch.device) -> None:
    cache = torch.zeros(1, 2, 64, 32, pin_memory=True)
    x = torch.randn(1, 2, 64, 32, device=device)
    for wait in (lambda: transfer.settled(cache, 0, 64), lambda: (transfer.move(x, torch.device("cpu")), cache)[1]):
        cache.zero_()
        busy(device)
        transfer.store(x, cache, 0)
        assert torch.equal(wait(), x.cpu())
    # one token waits
    busy(device)
    transfer.store(x[:, :, :1] + 1, cache, 3)
    assert torch.equal(cache[:, :, 3:4], x[:, :, :1].cpu() + 1)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("host", [(1,), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_generation_equals_that_with_all_on_the_device(
    name: str, host: tuple[int, ...], compiled: bool, device: torch.device
) -> None:
    pytest.importorskip("transformers")
    from split_models import NEW, build, generated, prompt

    from attnfuse.offload import ATTENTION, SplitCache

    torch.backends.cuda.matmul.allow_tf32 = False
    inputs = {key: x.to(device) for key, x in prompt().items()}
    wanted = generated(build(name).to(device), inputs)
    model, log = build(name).to(device), []
    model.set_attn_implementation(ATTENTION)
    if compiled:
        torch._dynamo.reset()
        model.forward = torch.compile(model.forward, backend="attnfuse", fullgraph=True, options={"strict": True})
    cache = SplitCache(model.config, max_length=10 + NEW, batch=2, host_layers=host, device=device)
    assert [x.keys.is_pinned() for x in cache.layers if x.on_host] == [True] * len(host)
    assert {x.keys.device.type for x in cache.layers if not x.on_host} <= {"cuda"}
    with observe(log.append):
        found = generated(model, inputs, past_key_values=cache)
    assert torch.equal(found.tokens, wanted.tokens)
    torch.testing.assert_close(found.logits, wanted.logits, rtol=1e-3, atol=1e-3)
    size = cache.plan.caches[0].key_size
    queries = [x for x in log if x.kind == "move" and x.source.type == "cuda" and x.bytes == 2 * 4 * size * 4]
    results = [x for x in log if x.kind == "move" and x.target.type == "cuda"]
    assert len(queries) == len(results) == len(host) * (NEW - 1)
