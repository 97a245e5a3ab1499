"""Training and what else users do with a model over ranks: functions that run on each of several ranks."""

from __future__ import annotations

import contextlib
import io
from typing import Any
from unittest import mock

import sharded_models
import torch
import torch.distributed as dist
from sharded_models import build, drawn, error, fresh, gradients, option, told
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from attnfuse import backend
from attnfuse.distributed.layouts import rows_of_rank, tokens


def _autocast(on: bool) -> Any:
    return torch.autocast("cpu", torch.bfloat16) if on else contextlib.nullcontext()


def steps(
    name: str, count: int, checkpointing: bool = False, bf16: bool = False, **chosen: Any
) -> tuple[list[float], list[float], int]:
    """Losses of AdamW steps of one device and of the ranks, and over how many attentions the first call went."""
    losses: list[list[float]] = []
    fresh()
    for compiles in (False, True):
        model, inputs = build(name, 40)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        run = torch.compile(model, backend="attnfuse", options=option(**chosen)) if compiles else model
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses.append([])
        for _ in range(count):
            with _autocast(bf16):
                loss = run(**inputs).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    return losses[0], losses[1], told()[1]


def frozen(**chosen: Any) -> tuple[float, list[bool], int]:
    """Two small matrices beside one frozen projection of each layer train alone: error of gradients, which there are."""

    class Beside(nn.Module):
        def __init__(self, kept: nn.Linear, rank: int = 4) -> None:
            super().__init__()
            self.kept = kept
            self.down = nn.Linear(kept.in_features, rank, bias=False)
            self.up = nn.Linear(rank, kept.out_features, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.kept(x) + self.up(self.down(x))

    def made() -> tuple[nn.Module, dict[str, Any]]:
        model, inputs = build("llama", 40)
        model.requires_grad_(False)
        for layer in model.model.layers:
            layer.self_attn.v_proj = Beside(layer.self_attn.v_proj)
        drawn(model)
        return model, inputs

    fresh()
    model, inputs = made()
    model(**inputs).loss.backward()
    wanted = gradients(model)
    model.zero_grad()
    torch.compile(model, backend="attnfuse", options=option(**chosen))(**inputs).loss.backward()
    found = gradients(model)
    return error(found, wanted), [x is not None for x in found], told()[1]


def saved(**chosen: Any) -> tuple[list[str], float, float]:
    """Names of a compiled model's state, and how far a loaded one's loss is from the trained one's, and from the first."""
    fresh()
    model, inputs = build("llama", 40)
    run = torch.compile(model, backend="attnfuse", options=option(**chosen))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    first = run(**inputs).loss
    first.backward()
    optimizer.step()
    trained = run(**inputs).loss.item()
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other, _ = build("llama", 40)
    other.load_state_dict(torch.load(file))
    names = [name for name, _ in other.named_parameters()]
    return names, abs(other(**inputs).loss.item() - trained), abs(first.item() - trained)


def dropped(ranks_seed: bool, hidden: float, attention: float, checkpointing: bool, **chosen: Any) -> Any:
    """Loss, logits and some gradients of a model in training, after a seed; ranks_seed: rank r draws by another."""
    fresh()
    model = sharded_models._bert("MaskedLM", hidden, attention)
    drawn(model)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    inputs = sharded_models._text(40, "right")
    run = torch.compile(model, backend="attnfuse", options=option(**chosen))
    torch.manual_seed(7 + (100 * dist.get_rank() if ranks_seed else 0))
    made = []
    for _ in range(2):
        model.zero_grad()
        got = run(**inputs)
        got.loss.backward()
        made += [got.loss.detach(), got.logits.detach(), *(g for g in gradients(model) if g is not None)]
    return [x.tolist() if x.numel() < 2 else (x.double().sum().item(), x.double().norm().item()) for x in made], told()


def data_parallel(kind: str, **chosen: Any) -> tuple[float, float, int]:
    """DDP or FSDP2 over one dim of a 2 x 2 mesh and tokens over the other, or (kind 'mean') DDP over all ranks: the errors of
    the mean loss and of gradients against one device with the whole batch of 4."""
    fresh()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "sp"))
    model, _ = build("llama", 40)
    # no ignored labels, so that the mean over halves is that of the whole
    batch = {"input_ids": sharded_models._ids(40, 4)}
    batch["labels"] = batch["input_ids"].clone()
    want = model(**batch).loss
    want.backward()
    wanted = gradients(model)
    model.zero_grad()
    place = mesh["dp"].get_local_rank()
    mine = {k: v[2 * place : 2 * place + 2] for k, v in batch.items()}
    whole: Any = None
    if kind == "fsdp":
        from torch.distributed.fsdp import fully_shard

        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh["dp"])
        fully_shard(model, mesh=mesh["dp"])
        run = torch.compile(model, backend="attnfuse", options=option(mesh["sp"], **chosen))
        loss = run(**mine).loss
    elif kind == "ddp":
        whole = nn.parallel.DistributedDataParallel(model, process_group=mesh["dp"].get_group())
        loss = torch.compile(whole, backend="attnfuse", options=option(mesh["sp"], **chosen))(**mine).loss
    elif kind == "mean":
        whole = nn.parallel.DistributedDataParallel(model)
        options = option(mesh["sp"], gradients="mean", **chosen)
        loss = torch.compile(whole, backend="attnfuse", options=options)(**mine).loss
    else:
        # DDP around the compiled model
        inner = torch.compile(model, backend="attnfuse", options=option(mesh["sp"], gradients="mean", **chosen))
        whole = nn.parallel.DistributedDataParallel(inner)
        loss = whole(**mine).loss
    loss.backward()
    found = [
        None if p.grad is None else getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for p in model.parameters()
    ]
    mean = loss.detach().clone()
    dist.all_reduce(mean, group=mesh["dp"].get_group())
    return abs(mean.item() / 2 - want.item()), error(found, wanted), told()[1]


class Whole(TorchDispatchMode):
    """Notes ops that make a tensor with all `length` tokens, alone or merged with sequences, and at least `width` elements for
    each."""

    def __init__(self, length: int, batch: int, width: int = 8) -> None:
        super().__init__()
        self.dims, self.least = (length, length * batch), length * width
        self.found: list[tuple[str, tuple[int, ...]]] = []
        self.ops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.ops += 1
        for x in pytree.tree_leaves(made):
            if isinstance(x, torch.Tensor) and x.numel() >= self.least and any(n in self.dims for n in x.shape):
                self.found.append((str(func), tuple(x.shape)))
        return made


def whole_tensors(
    name: str, loss_only: bool, checkpointing: bool = False, **chosen: Any
) -> tuple[list[Any], list[Any], int, float, float]:
    """What a second call and its backward make that is whole: (compiled, uncompiled); ops seen; errors of loss and gradients.

    loss_only: the compiled function gives nothing but the loss.
    """
    fresh()
    model, inputs = build(name, 44)
    # of 3, so that 3 times a rank's tokens is another number
    inputs = {key: torch.cat([x, x[1:]]) for key, x in inputs.items()}
    if checkpointing:
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    function = (lambda **kwargs: model(**kwargs).loss) if loss_only else model
    with Whole(44, 3) as one:
        found = function(**inputs)
        want = found if loss_only else found.loss
        want.backward()
    wanted = gradients(model)
    model.zero_grad()
    seen, inner = Whole(44, 3), backend._inner

    # Dynamo compiles nothing while a mode is on: this one is on within what is compiled
    def watched(gm: Any, *args: Any) -> Any:
        graph = inner(gm, *args)

        def run(*args: Any) -> Any:
            with seen:
                return graph(*args)

        return run

    with mock.patch.object(backend, "_inner", watched):
        found = torch.compile(function, backend="attnfuse", options=option(**chosen))(**inputs)
    loss = found if loss_only else found.loss
    with seen:
        loss.backward()
    return seen.found, one.found, seen.ops, abs(loss.item() - want.item()), error(gradients(model), wanted)


def own_rows(layout: Any, length: int, **chosen: Any) -> tuple[float, float, float, tuple[int, ...]]:
    """outputs="own": errors of the loss, of the rank's logits against those rows of one device's, and of gradients of a loss of
    logits that each rank makes of its own rows; and the logits' shape."""
    fresh()
    model, inputs = build("llama", length)
    weights = torch.randn(2, length, sharded_models.VOCABULARY, generator=torch.Generator().manual_seed(3))
    want = model(**inputs)
    (want.loss + (want.logits * weights).sum() / length).backward()
    wanted = gradients(model)
    model.zero_grad()
    run = torch.compile(model, backend="attnfuse", options=option(layout=layout, outputs="own", **chosen))
    got = run(**inputs)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    n = rows_of_rank(layout, ranks, length)
    numbers = tokens(layout, rank, ranks, n)
    real = numbers < length
    numbers = numbers.clamp(max=length - 1)
    logits = (got.logits - want.logits[:, numbers])[:, real].abs().max().item()
    (got.loss + (got.logits * weights[:, numbers] * real[:, None]).sum() / length).backward()
    return abs(got.loss.item() - want.loss.item()), logits, error(gradients(model), wanted), tuple(got.logits.shape)


def generated(cache: str, count: int = 4, **chosen: Any) -> tuple[float, list[str], int, list[str]]:
    """A prompt and then a token at a time, with a cache: the largest error of logits; statuses, how many went over ranks, lines."""
    import transformers

    fresh()
    model, inputs = build("llama_sdpa", 40)
    ids = inputs["input_ids"]

    def tokens_of(run: Any) -> list[torch.Tensor]:
        kind = {"dynamic": transformers.DynamicCache, "static": transformers.StaticCache}[cache]
        past = kind(config=model.config, **({"max_cache_len": 64} if cache == "static" else {}))
        made = []
        given = ids
        with torch.no_grad():
            for _ in range(count):
                logits = run(input_ids=given, past_key_values=past, use_cache=True).logits[:, -1:]
                made.append(logits)
                given = logits.argmax(-1)
        return made

    wanted = tokens_of(model)
    found = tokens_of(torch.compile(model, backend="attnfuse", options=option(**chosen)))
    worst = max((a - b).abs().max().item() for a, b in zip(found, wanted, strict=True))
    statuses, over, _, lines, _ = told()
    return worst, statuses, over, lines


def loader(sampler: bool) -> str:
    """What assert_same says of the batches of an unchanged loader, or of one that deals samples to ranks."""
    from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

    from attnfuse.distributed.agreement import Disagreement, assert_same

    data = TensorDataset(torch.arange(24).view(8, 3), torch.arange(8.0))
    torch.manual_seed(0)
    dealt = DistributedSampler(data, shuffle=False) if sampler else None
    try:
        for batch in DataLoader(data, batch_size=2, shuffle=not sampler, sampler=dealt):
            assert_same(batch, dist.group.WORLD)
    except Disagreement as error:
        return str(error)
    return ""


def used(how: str, length: int = 37, mesh: tuple[int, ...] = (), **chosen: Any) -> tuple[float, float, float, int]:
    """A Llama used in one of several ways: errors of the loss, of all other results, and of gradients; how many went over ranks."""
    fresh()
    model, inputs = build("llama_left" if how == "mask" else "llama", length)
    extra: list[torch.Tensor] = []
    if how == "embeds":
        embeds = model.get_input_embeddings()(inputs.pop("input_ids")).detach().requires_grad_()
        inputs["inputs_embeds"] = embeds
        extra = [embeds]
    elif how == "items":
        # as the Trainer of transformers gives it: the loss is a sum over so many
        inputs["num_items_in_batch"] = torch.tensor(29)
    elif how == "hidden":
        inputs["output_hidden_states"] = True
    elif how == "mask":
        # a mask of the user's own: scores are added
        keep = torch.ones(length, length, dtype=torch.bool).tril()
        own = torch.where(keep, 0.0, torch.finfo(torch.float32).min)
        own[5:, 2] = torch.finfo(torch.float32).min
        inputs["attention_mask"] = own.expand(2, 1, -1, -1).contiguous()
    elif how == "one":
        inputs = {key: x[:1] for key, x in inputs.items()}

    def weighed(found: Any) -> torch.Tensor:
        total: torch.Tensor = found.loss
        for h in found.hidden_states or ():
            total = total + h.square().mean()
        return total

    def results(found: Any) -> list[torch.Tensor]:
        return [found.logits, *(found.hidden_states or ())]

    want = model(**inputs)
    weighed(want).backward()
    wanted = [*gradients(model), *(None if x.grad is None else x.grad.clone() for x in extra)]
    model.zero_grad()
    for x in extra:
        x.grad = None
    names = ("outer", "inner")[: len(mesh)]
    ranks = init_device_mesh("cpu", mesh, mesh_dim_names=names) if mesh else None
    got = torch.compile(model, backend="attnfuse", options=option(ranks, **chosen))(**inputs)
    weighed(got).backward()
    found = [*gradients(model), *(x.grad for x in extra)]
    worst = max((a - b).abs().max().item() for a, b in zip(results(got), results(want), strict=True))
    return abs(got.loss.item() - want.loss.item()), worst, error(found, wanted), told()[1]


def call(name: str, chosen: dict[str, Any]) -> Any:
    return globals()[name](**chosen)
