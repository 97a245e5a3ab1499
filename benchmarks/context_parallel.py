"""A small model over two ranks of a CPU (gloo): torch's context_parallel beside attnfuse's sequence_parallel.

python -m benchmarks.context_parallel              what each needs declared, what is right, bytes that all ranks send for attentions
python -m benchmarks.context_parallel --no-write

The same model with no mask, a causal one, padding on the right, and documents in a row; errors are from the same model on one
device, of gradients in parts of the largest number. Written to benchmarks/results/context_parallel.json.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import os
import tempfile
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import torch
import torch.distributed as dist
import torch.multiprocessing as processes
import torch.nn.functional as F
import typer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import results

Row = dict[str, Any]

RANKS, LAYERS, HEADS, SIZE, VOCABULARY = 2, 2, 4, 8, 50
BATCH, LENGTH = 2, 64
CASES = ("no mask", "causal", "padding", "documents")
#: Labels of no token.
_IGNORED = -100
_MATH, _ORDERED = "MATH", "keys of masks reordered"
_HOWS = ("attnfuse", f"context_parallel, {_MATH}", f"context_parallel, {_MATH}, {_ORDERED}", "context_parallel")
_HEAD = ("case", "how", "declared", "raises", "loss", "logits", "gradients", "bytes")


class Small(nn.Module):
    """Embeddings of ids and positions, pre-norm blocks, logits."""

    def __init__(self) -> None:
        super().__init__()
        width = HEADS * SIZE
        self.embedding, self.places = nn.Embedding(VOCABULARY, width), nn.Embedding(LENGTH, width)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {"norm": nn.LayerNorm(width), "qkv": nn.Linear(width, 3 * width), "out": nn.Linear(width, width)}
            )
            for _ in range(LAYERS)
        )
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, ids: torch.Tensor, places: torch.Tensor, keep: torch.Tensor | None, causal: bool) -> torch.Tensor:
        x = self.embedding(ids) + self.places(places)
        for block in self.blocks:
            q, k, v = block["qkv"](block["norm"](x)).unflatten(-1, (3, HEADS, SIZE)).permute(2, 0, 3, 1, 4).unbind(0)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=keep, is_causal=causal and keep is None)
            x = x + block["out"](out.transpose(1, 2).flatten(2))
        return self.head(x)


def batch_of(case: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """ids, places, labels (not shifted) and what tells tokens apart: 1 and 0 of padding, or numbers of documents."""
    ids = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    places, labels, marks = torch.arange(LENGTH).expand(BATCH, -1).contiguous(), ids.clone(), None
    if case == "padding":
        marks = torch.ones_like(ids)
        marks[1, -9:] = 0
        labels[marks == 0] = _IGNORED
    if case == "documents":
        starts = torch.tensor([0, 20, 37])
        marks = (torch.searchsorted(starts, torch.arange(LENGTH), right=True) - 1).expand(BATCH, -1).contiguous()
        places = torch.arange(LENGTH) - starts[marks]
        labels[:, starts] = _IGNORED
    return ids, places, labels, marks


def kept(case: str, marks: torch.Tensor | None) -> torch.Tensor | None:
    """The mask [batch, 1, queries, keys] of what is kept."""
    if marks is None:
        return None
    n = torch.arange(marks.shape[1])
    own = marks[:, None, None, :] == 1 if case == "padding" else marks[:, None, :, None] == marks[:, None, None, :]
    return own & (n[:, None] >= n)


def loss_and_logits(model: nn.Module, case: str, *batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """As one writes it for one device."""
    ids, places, labels, marks = batch
    logits = model(ids, places, kept(case, marks), case != "no mask")
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=_IGNORED)
    return loss, logits


class _Counting(TorchDispatchMode):
    """Bytes that this rank sends by functional collectives, as a ring would send them."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Sequence[Any], args: Any = (), kwargs: Any = None) -> Any:
        from torch.distributed.tensor import DTensor

        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented
        shares = {
            "all_gather_into_tensor": RANKS - 1.0,
            "reduce_scatter_tensor": 1.0 - 1.0 / RANKS,
            "all_to_all_single": 1.0 - 1.0 / RANKS,
            "all_reduce": 2.0 - 2.0 / RANKS,
        }
        if func.namespace == "_c10d_functional" and func._schema.name.split("::")[1] in shares:
            self.bytes += int(args[0].nbytes * shares[func._schema.name.split("::")[1]])
        return func(*args, **(kwargs or {}))


def _by_context(case: str, how: str, model: nn.Module, mesh: Any) -> tuple[list[torch.Tensor], int]:
    """Loss, logits, gradients and bytes of context_parallel, with all that it needs done by hand."""
    from torch.distributed.tensor.experimental import context_parallel
    from torch.nn.attention import SDPBackend, sdpa_kernel

    ids, places, labels, marks = batch_of(case)
    # numbers of tokens tell afterwards which ones a rank had
    numbers = torch.arange(LENGTH).expand(BATCH, -1).contiguous()
    shifted = F.pad(labels[:, 1:], (0, 1), value=_IGNORED).contiguous()
    count = (shifted != _IGNORED).sum()
    buffers, dims, keep = [ids, places, shifted, numbers], [1] * 4, kept(case, marks)
    if keep is not None:
        # of a mask each rank has the rows of its queries
        buffers, dims = [*buffers, keep], [*dims, 2]
        if how.endswith(_ORDERED):
            # keys are gathered as ranks have them, each a piece of the start and one of the end
            pieces = torch.arange(LENGTH).chunk(2 * RANKS)
            order = torch.cat([torch.cat([pieces[r], pieces[-1 - r]]) for r in range(RANKS)])
            keep.copy_(keep[..., order])
    counting = _Counting()
    error: Exception | None = None
    with context_parallel(mesh, buffers=buffers, buffer_seq_dims=dims):
        # what is raised in here must not meet what raises on the way out
        try:
            with sdpa_kernel(SDPBackend.MATH) if _MATH in how else contextlib.nullcontext(), counting:
                logits = model(ids, places, keep, case != "no mask")
                loss = (
                    F.cross_entropy(logits.flatten(0, 1), shifted.flatten(), ignore_index=_IGNORED, reduction="sum")
                    / count
                )
                loss.backward()
            found = [logits.detach().contiguous(), numbers.clone()]
        except Exception as raised:
            error = raised
    if error is not None:
        raise error
    whole = []
    for x in found:
        parts = [torch.empty_like(x) for _ in range(RANKS)]
        dist.all_gather(parts, x)
        whole.append(torch.cat(parts, 1))
    logits = whole[0][:, whole[1][0].argsort()]
    total = loss.detach()
    for x in (total, *(p.grad for p in model.parameters())):
        dist.all_reduce(x)
    return [total, logits, *(p.grad for p in model.parameters())], counting.bytes


def _by_attnfuse(case: str, model: nn.Module, mesh: Any) -> tuple[list[torch.Tensor], int]:
    """The same of attnfuse: one option."""
    import attnfuse
    from attnfuse.distributed import ops

    sent = 0

    def observe(which: str, hops: Any) -> None:
        nonlocal sent
        sent += sum(n for key, n in hops.sent.items() if key[0] == "bytes")

    ops.observers.append(observe)
    options = {"sequence_parallel": mesh, "inner": "eager", "strict": True}
    loss, logits = torch.compile(loss_and_logits, backend="attnfuse", options=options)(model, case, *batch_of(case))
    loss.backward()
    ops.observers.remove(observe)
    sites = [site for report in attnfuse.reports() for site in report.sites]
    over = sum(any(note.startswith(f"over {RANKS} ranks") for note in site.notes) for site in sites)
    if over != LAYERS:
        raise RuntimeError(f"{over} of {LAYERS} attentions are over ranks")
    attnfuse.reset()
    return [loss.detach(), logits.detach(), *(p.grad for p in model.parameters())], sent


_DECLARED = {
    "context_parallel": (
        "ids, positions, shifted labels as buffers with their dims",
        "the loss's sum and count over ranks",
        "the sum of gradients over ranks",
        "the order of gathered logits",
    ),
    "attnfuse": ("sequence_parallel",),
}


def measure(case: str, how: str, mesh: Any) -> Row:
    """One row, on each rank."""
    torch.manual_seed(0)
    model = Small()
    loss, logits = loss_and_logits(model, case, *batch_of(case))
    loss.backward()
    wanted = [loss.detach(), logits.detach(), *(p.grad for p in model.parameters())]
    model.zero_grad()
    declared = list(_DECLARED[how.split(",")[0]])
    if how.startswith("context") and case in ("padding", "documents"):
        declared[0] = declared[0].replace(" as", ", mask as")
    if _MATH in how:
        declared.append("SDPBackend.MATH")
    if how.endswith(_ORDERED):
        declared.append("the mask's keys in the order of ranks")
    row: Row = {"case": case, "how": how, "declared": declared}
    try:
        if how == "attnfuse":
            found, sent = _by_attnfuse(case, model, mesh)
        else:
            found, sent = _by_context(case, how, model, mesh)
    except (RuntimeError, NotImplementedError, ValueError, AssertionError) as error:
        return {**row, "raises": f"{type(error).__name__}: {error}".split("\n")[0]}
    size = max(x.abs().max().item() for x in wanted[2:])
    apart = [(a - b).abs().max().item() for a, b in zip(found, wanted, strict=True)]
    total = torch.tensor(sent)
    dist.all_reduce(total)
    return {**row, "loss": apart[0], "logits": apart[1], "gradients": max(apart[2:]) / size, "bytes": int(total)}


def _rank(rank: int, folder: str, cases: Sequence[str], write: bool) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(folder, "store"), RANKS)
    limit = datetime.timedelta(minutes=5)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=limit)
    mesh = dist.init_device_mesh("cpu", (RANKS,), mesh_dim_names=("sp",))
    rows = []
    # the last one takes a minute a row: DTensor looks for a sharding of an operator that has none
    for how, case in itertools.product(_HOWS, cases):
        if how.endswith(_ORDERED) and batch_of(case)[3] is None:
            continue
        rows.append(measure(case, how, mesh))
        if rank == 0:
            print(" | ".join(_cells(rows[-1])), flush=True)
            if write:
                results.save("context_parallel", {"environment": results.environment(1), "ranks": RANKS, "rows": rows})
    dist.barrier()
    dist.destroy_process_group()


def _cells(row: Row) -> Iterator[str]:
    yield from (row["case"], row["how"], "; ".join(row["declared"]), row.get("raises", ""))
    yield from (f"{row[name]:.0e}" if name in row else "" for name in ("loss", "logits", "gradients"))
    yield str(row.get("bytes", ""))


def main(
    cases: Annotated[str, typer.Option(help="some of the cases")] = ",".join(CASES),
    write: Annotated[bool, typer.Option(help="write the JSON file")] = True,
) -> None:
    """Run both on two ranks, and write what comes out."""
    print(" | ".join(_HEAD), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        processes.start_processes(_rank, (folder, results.listed(cases), write), RANKS, start_method="spawn")


if __name__ == "__main__":
    typer.run(main)
