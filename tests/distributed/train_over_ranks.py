"""Training and what else users do with a model over ranks: functions that run on each of several ranks."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import sharded_models
import torch
import torch.distributed as dist
from sharded_models import build, drawn, error, fresh, gradients, option, told
from torch import nn
from torch.distributed.device_mesh import init_device_mesh


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
    return [
        x.tolist() if x.numel() < 10 else (x.double().sum().item(), x.double().abs().max().item()) for x in made
    ], told()[1]


def data_parallel(kind: str, **chosen: Any) -> tuple[float, float, int]:
    """DDP or FSDP2 over one dim of a 2 x 2 mesh and tokens over the other, or (kind 'mean') DDP over all ranks: the errors of
    the mean loss and of gradients against one device with the whole batch of 4."""
    fresh()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "sp"))
    model, inputs = build("llama", 40)
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


def call(name: str, chosen: dict[str, Any]) -> Any:
    return globals()[name](**chosen)
