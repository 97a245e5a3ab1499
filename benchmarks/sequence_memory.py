"""Peak memory of a rank in training, for one sequence over 1, 2 and 4 ranks: bytes for each more token go as 1 over the ranks.

    python -m benchmarks.sequence_memory

What does not grow with the sequence (gradients, and the buffers that sum them over ranks) falls out of the difference of two
lengths. Every rank is a fresh process (gloo, one thread). Writes benchmarks/results/sequence_memory.json.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from benchmarks import results
from benchmarks.memory import peak_of
from benchmarks.preload import preload

RANKS = (1, 2, 4)


class Case(NamedTuple):
    """A Llama with sequences of two lengths, and what the compiled function returns: 'loss', or 'own' or 'whole' logits too."""

    tokens: tuple[int, int]
    batch: int = 1
    layers: int = 4
    hidden: int = 256
    vocabulary: int = 4096
    algorithm: str = "burst"
    returned: str = "loss"
    dtype: str = "float32"


class Found(NamedTuple):
    """Of one rank, for each length. peaks: bytes above what was resident before forward and backward; losses; lines: what the
    reports say."""

    peaks: list[int]
    losses: list[float]
    lines: tuple[str, ...]


def one_rank(case: Case, rank: int, ranks: int, store: str) -> Found:
    """Forward and backward on a rank; a first call compiles, and leaves gradients that the second one adds to."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, ranks), rank=rank, world_size=ranks)
    preload()
    from transformers import LlamaConfig, LlamaForCausalLM

    import attnfuse
    from attnfuse.distributed.options import SequenceParallel

    config = LlamaConfig(
        hidden_size=case.hidden,
        intermediate_size=4 * case.hidden,
        num_hidden_layers=case.layers,
        num_attention_heads=case.hidden // 64,
        vocab_size=case.vocabulary,
        max_position_embeddings=max(case.tokens),
        use_cache=False,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    outputs: Any = "own" if case.returned == "own" else "whole"
    option = SequenceParallel(dist.group.WORLD, algorithm=case.algorithm, layout="zigzag", outputs=outputs)  # type: ignore[arg-type]

    def function(ids: torch.Tensor) -> Any:
        made = model(input_ids=ids, labels=ids)
        return made.loss if case.returned == "loss" else (made.loss, made.logits)

    run = torch.compile(
        function,
        backend="attnfuse",
        options={"sequence_parallel": option, "inner": "eager", "strict": True},
        dynamic=False,
    )
    peaks, losses = [], []
    for tokens in case.tokens:
        ids = torch.randint(0, case.vocabulary, (case.batch, tokens), generator=torch.Generator().manual_seed(1))
        last: list[float] = []

        def step(ids: torch.Tensor = ids, last: list[float] = last) -> None:
            found = run(ids)
            loss = found if case.returned == "loss" else found[0]
            loss.backward()
            last.append(loss.item())

        step()
        peaks.append(peak_of(step))
        losses.append(last[-1])
    lines = tuple(line for report in attnfuse.reports() for line in report.sharding)
    dist.destroy_process_group()
    return Found(peaks, losses, lines)


def measured(case: Case, ranks: int) -> list[Found]:
    """Each rank's, in fresh processes."""
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(ranks, mp_context=spawn) as pool:
        store = os.path.join(folder, "store")
        return list(pool.map(one_rank, *zip(*((case, rank, ranks, store) for rank in range(ranks)), strict=True)))


def row(case: Case, ranks: Sequence[int] = RANKS) -> dict[str, Any]:
    """A case, and for each number of ranks the highest peak of any rank, in bytes, for each length, and for each more token."""
    figures: dict[str, Any] = {}
    for count in ranks:
        found = measured(case, count)
        short, long = (max(x.peaks[i] for x in found) for i in range(2))
        figures[str(count)] = {
            "peaks": [short, long],
            "bytes_a_token": (long - short) / (case.tokens[1] - case.tokens[0]) / case.batch,
            "losses": found[0].losses,
            "sharding": found[0].lines,
        }
    first = figures[str(ranks[0])]
    for each in figures.values():
        each["part"] = each["bytes_a_token"] / first["bytes_a_token"]
    return {"case": case._asdict(), "ranks": figures}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sequence_memory", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--tokens", default="1024,4096", help="two lengths")
    parser.add_argument("--returned", default="loss,own", help="what the compiled function returns")
    chosen = parser.parse_args(arguments)
    rows = []
    for returned in results.listed(chosen.returned):
        short, long = map(int, results.listed(chosen.tokens))
        rows.append(row(Case((short, long), returned=returned)))
        for count, each in rows[-1]["ranks"].items():
            peaks = " and ".join(f"{peak / 2**20:.0f}" for peak in each["peaks"])
            a_token = f"{each['bytes_a_token'] / 1024:.1f} KiB a token, {each['part']:.3f} of one rank's"
            print(f"{returned}, {count} ranks: {peaks} MiB, {a_token}", flush=True)
        # a row takes minutes
        path = results.save("sequence_memory", {"environment": results.environment(1), "memory": rows})
        print(path.relative_to(results.ROOT), flush=True)


if __name__ == "__main__":
    main()
