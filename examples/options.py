"""attnfuse's options, one by one. Options of Inductor may stand beside them in the same dict.

python examples/options.py
"""

import torch

import attnfuse


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.softmax(q @ k.transpose(-2, -1) * 0.125, dim=-1) @ v


def compiled(**options: object) -> str:
    """What became of the attention above under these options."""
    torch.compiler.reset()
    attnfuse.reset()
    q, k, v = (torch.randn(1, 4, 64, 64) for _ in range(3))
    out = torch.compile(attention, backend="attnfuse", options=options)(q, k, v)  # type: ignore[arg-type]
    torch.testing.assert_close(out, attention(q, k, v))
    (site,) = attnfuse.reports()[0].sites
    return f"{site.status}, {site.kernel or site.reason}"


def main() -> None:
    examples: dict[str, dict[str, object]] = {
        "the rest of the graph runs eagerly": {"inner": "eager"},
        "one kernel, by name": {"inner": "eager", "kernel": "reference"},
        "stop after n rewrites, to bisect": {"inner": "eager", "fuel": 0},
        "nothing is skipped, NaN in hidden keys included": {"inner": "eager", "nan_policy": "eager"},
        "compare the first calls with eager": {"inner": "eager", "verify": 1},
        "raise where attnfuse would fall back": {"inner": "eager", "strict": True},
        "with an option of Inductor's": {"inner": "inductor", "max_autotune": False},
    }
    for what, options in examples.items():
        print(f"{what:50} {options!s:50} {compiled(**options)}")
    try:
        compiled(kernal="cpu")
    except Exception as error:  # the message is the example
        print(
            str(error).splitlines()[-1]
            if "unknown option" not in str(error)
            else "an unknown option is refused by name"
        )


if __name__ == "__main__":
    main()
