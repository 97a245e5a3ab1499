"""`python -m attnfuse`: the command `attnfuse`."""

from attnfuse.cli import app

app(prog_name="attnfuse")
