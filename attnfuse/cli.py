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


if __name__ == "__main__":
    app()
