"""Checkpointed regions and autocast on packed rows: they hold for the rows of tokens as they did for padded ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import attnfuse
from attnfuse.passes.padding import checkpointed, modes

C = 16


class Encoder(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how = how
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(C, 2, 32, 0.0, batch_first=True) for _ in range(2))

    def encoded(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            if self.how == "checkpointed":
                x = checkpoint(layer, x, src_key_padding_mask=mask == 0, use_reentrant=False)
            else:
                x = layer(x, src_key_padding_mask=mask == 0)
        return (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        if self.how != "autocast":
            return self.encoded(x, mask)
        with torch.autocast("cpu", torch.bfloat16):
            return self.encoded(x, mask)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    lengths = torch.tensor([9, 4, 1])
    return torch.randn(3, 9, C), (torch.arange(9) < lengths[:, None]).long()


@pytest.mark.parametrize("how", ["checkpointed", "autocast"])
def test_tokens_are_computed_in_the_mode_of_the_graph(how: str) -> None:
    model, (x, mask) = Encoder(how), batch()
    results = []
    options = {"inner": "aot_eager", "strict": True}
    for run in (model, torch.compile(model, backend="attnfuse", options=options)):
        model.zero_grad()
        out = run(x, mask)
        out.square().sum().backward()
        results.append([out.detach(), *(p.grad for p in model.parameters())])
    (report,) = attnfuse.reports()
    assert all("packed" in site.reads for site in report.sites), report
    close = {"atol": 1e-5, "rtol": 1e-4} if how == "checkpointed" else {"atol": 2e-2, "rtol": 2e-2}
    for got, expected in zip(*reversed(results), strict=True):
        torch.testing.assert_close(got, expected, **close)
    # the regions that were there compute padding no more
    assert report.after.count("tag_activation_checkpoint(") == (2 if how == "checkpointed" else 0)
    assert "autocast" in report.after or how == "checkpointed"


def test_what_has_to_lie_between_the_nodes_of_a_region_is_refused() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    first = graph.call_function(torch.relu, (x,))
    other = graph.call_function(torch.tanh, (first,))
    last = graph.call_function(torch.add, (first, other))
    graph.output(last)
    with pytest.raises(Exception, match="checkpoint"):
        checkpointed._together(graph, [first, last], {first, last})


def test_within_no_region_nothing_is_cast() -> None:
    with modes.within(()):
        assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.float32
