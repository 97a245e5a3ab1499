"""Train a small Llama on a sequence that several processes share: each computes its own tokens, and attention goes over all.

torchrun --nproc-per-node 4 examples/long_context.py
"""

import argparse
import os
import time

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import attnfuse
from attnfuse.demo import torchvision_ops
from attnfuse.distributed.agreement import assert_same

# where the torchvision that is installed does not fit this torch, transformers could not be imported
_KEPT = torchvision_ops()


def batch_of(tokens: int) -> dict[str, torch.Tensor]:
    """One sequence, in which every token tells the next: the same on every rank, as a loader with one seed gives it."""
    drawn = torch.randint(3, 250, (1, tokens // 2), generator=torch.Generator().manual_seed(1))
    ids = torch.stack([drawn, drawn + 1], dim=-1).flatten(1)
    return {"input_ids": ids, "labels": ids}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=None, help="in the sequence: 32768, or 1024 without torchrun")
    parser.add_argument("--steps", type=int, default=2)
    chosen = parser.parse_args()
    started_by_torchrun = "RANK" in os.environ
    if started_by_torchrun:
        dist.init_process_group("gloo")
    else:
        # the same code on one process
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    tokens = chosen.tokens or (32768 if started_by_torchrun else 1024)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("sp",))
    # processes of one machine share its cores
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // mesh.size()))

    from transformers import LlamaConfig, LlamaForCausalLM

    # the same weights on every rank
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=256,
        max_position_embeddings=tokens,
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def loss_of(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        loss: torch.Tensor = model(**batch).loss
        return loss

    # only the loss is returned, so that no rank holds the logits of all tokens
    step = torch.compile(
        loss_of, backend="attnfuse", options={"sequence_parallel": mesh, "inner": "eager"}, dynamic=False
    )
    batch = batch_of(tokens)
    assert_same(batch, mesh)
    for number in range(chosen.steps):
        start = time.perf_counter()
        loss = step(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if dist.get_rank() == 0:
            print(f"step {number}: loss {loss.item():.4f}, {time.perf_counter() - start:.1f} s", flush=True)
    if dist.get_rank() == 0:
        print(*attnfuse.reports()[-1].sharding, sep="\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
