"""The command `attnfuse`."""

from __future__ import annotations

import typer

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Find and fuse every attention in PyTorch models.")


@app.command()
def demo() -> None:
    """Compile a BERT, a Llama and a T5 with random weights, show what was rewritten, and check it against float64."""
    from attnfuse import demo as module

    raise typer.Exit(module.main())


@app.command()
def version() -> None:
    """Print the versions of attnfuse and of torch."""
    import torch

    import attnfuse

    typer.echo(f"attnfuse {attnfuse.__version__}, torch {torch.__version__}")


@app.command()
def plan(
    config: str | None = typer.Argument(
        None, help="A transformers config.json, or a folder with one; else a Llama of 8B."
    ),
    tokens: str = typer.Option(..., help="Tokens of a sequence: 32768, 128k or 1M (k is 1024)."),
    ranks: str = typer.Option(..., help="Ranks, or nodes x ranks of a node: 8 or 16x8."),
    batch: int = typer.Option(1, help="Sequences."),
    device: str = typer.Option("cuda", help="Device type, for link speeds."),
    within: float | None = typer.Option(None, help="GB/s that a rank sends within a node."),
    between: float | None = typer.Option(None, help="GB/s that a rank sends to another node."),
    flops: float | None = typer.Option(None, help="TFLOP/s of a rank in 16 bits, at its peak."),
    layout: str = typer.Option("auto", help="auto, contiguous, zigzag or striped."),
    algorithm: str = typer.Option("auto", help="auto, gather, ring, burst, ulysses or ulysses_ring."),
    share: int = typer.Option(1, help="Ranks that share out the heads (Ulysses)."),
    inference: bool = typer.Option(False, help="Forward alone."),
    outputs: str = typer.Option("whole", help="whole: every rank gets all logits; own: those of its rows."),
    checkpointing: bool = typer.Option(False, help="Layers are computed again in backward."),
    layers: int | None = typer.Option(None, help="Layers; this and what follows instead of the config's."),
    heads: int | None = typer.Option(None, help="Query heads."),
    kv_heads: int | None = typer.Option(None, help="Key heads."),
    head_size: int | None = typer.Option(None),
    hidden: int | None = typer.Option(None),
    intermediate: int | None = typer.Option(None, help="Inner size of the MLP."),
    vocab: int | None = typer.Option(None),
    dtype: str | None = typer.Option(None),
    mask: str | None = typer.Option(None, help="causal, window, documents or none."),
    window: int | None = typer.Option(None, help="Keys that a query sees, its own among them."),
    as_json: bool = typer.Option(False, "--json", help="Data, not tables."),
) -> None:
    """Simulate sequence parallelism: what ranks would send, wait for and hold. No device is needed; docs/distributed.md."""
    from attnfuse.distributed import command
    from attnfuse.reasons import ReasonError

    shape = {"layers": layers, "heads": heads, "kv_heads": kv_heads, "head_size": head_size, "hidden": hidden}
    shape |= {"intermediate": intermediate, "vocab": vocab}
    changes = {**shape, "dtype": dtype, "mask": mask or ("window" if window else None), "window": window}
    try:
        found = command.from_text(
            config,
            {name: value for name, value in changes.items() if value is not None},
            tokens,
            ranks,
            {"within": within, "between": between, "flops": flops},
            device,
            batch=batch,
            layout=layout,
            algorithm=algorithm,
            heads=share,
            trains=not inference,
            outputs=outputs,
            checkpointing=checkpointing,
        )
    except (ValueError, OSError, ReasonError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None
    typer.echo(command.as_json(found) if as_json else str(found))


if __name__ == "__main__":
    app()
