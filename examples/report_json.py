"""Reports of everything that was compiled in this process, as JSON: to keep, to compare between versions, to plot.

python examples/report_json.py
"""

import json

import torch

import attnfuse


@torch.compile(backend="attnfuse", options={"inner": "eager"})
def encoder(x: torch.Tensor) -> torch.Tensor:
    heads = x.unflatten(-1, (4, -1)).transpose(1, 2)
    weights = torch.softmax(heads @ heads.mT * 0.25, dim=-1)
    return (weights @ heads).transpose(1, 2).flatten(2)


@torch.compile(backend="attnfuse", options={"inner": "eager"})
def weights_too(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    weights = torch.softmax(x @ x.mT, dim=-1)
    return weights @ x, weights


def main() -> None:
    encoder(torch.randn(2, 16, 64))
    weights_too(torch.randn(2, 16, 64))
    data = [json.loads(report.to_json()) for report in attnfuse.reports()]
    for report in data:
        for site in report["sites"]:
            print(json.dumps({key: site[key] for key in ("where", "status", "reads", "kernel", "reason")}))
    print(json.dumps(data[0]["sites"][0]["spec"], indent=2))


if __name__ == "__main__":
    main()
