"""Padding taken out around attentions (passes/padding/region.py), and what must stay as it is."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from padded_cases import (
    HEADS,
    JAGGED_TO_PADDED,
    LENGTHS,
    LONGEST,
    PADDED_TO_JAGGED,
    PADS,
    C,
    back_by_mask,
    back_by_op,
    by_gather,
    by_nested,
    by_op,
    by_write,
    heads,
    layouts,
    mask_of,
    merged,
)
from repository import ROOT
from torch import nn

import attnfuse
from attnfuse import reasons


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.manual_seed(3)
    torch._dynamo.reset()
    attnfuse.reset()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        yield


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(C), nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.feed = nn.Sequential(nn.Linear(C, 2 * C), nn.GELU(), nn.Linear(2 * C, C))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return x + self.feed(x)


class Encoder(nn.Module):
    """pad, learned positions, blocks, padding set to 0, unpad."""

    def __init__(self, pad: Callable[..., Any], unpad: Callable[..., Any], blocks: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(blocks)])
        self.places = nn.Embedding(64, C)
        self.pad, self.unpad = pad, unpad

    def forward(self, values: Any, offsets: torch.Tensor) -> torch.Tensor:
        x, mask = self.pad(values, offsets)
        x = x + self.places(torch.arange(x.shape[1]))
        for block in self.blocks:
            x = block(x, mask)
        x = x * mask[..., None]
        return self.unpad(x, mask, values, offsets)


# --- ways to pad, giving (padded [B, N, C], mask [B, N]), and to take padding away -------------------------------------


def inputs(lengths: tuple[int, ...] = LENGTHS, nested: bool = False) -> tuple[Any, torch.Tensor]:
    offsets = F.pad(torch.tensor(lengths).cumsum(0), (1, 0))
    values = torch.randn(sum(lengths), C)
    return torch.nested.nested_tensor_from_jagged(values, offsets) if nested else values, offsets


def compiled(module: Callable[..., Any], inner: str = "aot_eager") -> Any:
    return torch.compile(
        module, backend="attnfuse", fullgraph=True, options={"inner": inner, "strict": True, "padding": "keep"}
    )


def sites(count: int = 1) -> list[Any]:
    found = [s for report in attnfuse.reports() for s in report.sites]
    assert len(found) == count, found
    return found


def padded_tensors() -> list[str]:
    """Floating tensors in the rewritten graphs that have a dim of the padded length."""
    graphs = [report.after for report in attnfuse.reports()]
    found = [line for graph in graphs for line in graph.splitlines() if f"[{len(LENGTHS)}, {LONGEST}" in line]
    return [line for line in found if '"f' in line]


@pytest.mark.parametrize("pad", PADS)
@pytest.mark.parametrize("unpad", [back_by_op, back_by_mask])
def test_what_is_padded_and_unpadded_runs_on_packed_rows(pad: Any, unpad: Any) -> None:
    model = Encoder(pad, unpad).eval()
    values, offsets = inputs(nested=pad is by_nested)
    with torch.no_grad():
        expected = model(values, offsets)
        found = compiled(model)(values, offsets)
    assert layouts() == ["packed", "packed"]
    assert not padded_tensors()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pad", [by_gather, by_write, by_nested])
def test_training_runs_on_packed_rows(pad: Any) -> None:
    """Gradients of all parameters and of the rows are those of the padded model, in which nothing reads padding."""
    model = Encoder(pad, back_by_mask)
    values, offsets = inputs()
    weights = torch.randn(sum(LENGTHS), C)
    names = [name for name, _ in model.named_parameters()]

    def gradients(run: Any) -> list[torch.Tensor]:
        leaf = values.clone().requires_grad_()
        given = torch.nested.nested_tensor_from_jagged(leaf, offsets) if pad is by_nested else leaf
        loss = (run(given, offsets) * weights).sum()
        return list(torch.autograd.grad(loss, [leaf, *model.parameters()]))

    expected, found = gradients(model), gradients(compiled(model))
    assert layouts() == ["packed", "packed"]
    for name, a, b in zip(["values", *names], found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_packed_rows_through_inductor_with_other_lengths() -> None:
    """Other lengths of other batches run on the graphs that are there."""
    model = Encoder(by_gather, back_by_op, blocks=1).eval()
    run = torch.compile(
        model, backend=(counter := torch._dynamo.testing.CompileCounterWithBackend("attnfuse")), fullgraph=True
    )
    for lengths in (LENGTHS, (40, 2, 3, 9, 11), (3, 3, 40, 1, 2)):
        values, offsets = inputs(lengths)
        with torch.no_grad():
            torch.testing.assert_close(run(values, offsets), model(values, offsets), rtol=1e-5, atol=1e-5)
    assert counter.frame_count <= 2
    assert set(layouts()) == {"packed"}


# --- other attentions --------------------------------------------------------------------------------------------------


def check(function: Callable[..., Any], *given: Any, layout: str = "packed", rtol: float = 1e-5) -> Any:
    """The function's result is eager's, its attention has the layout, and gradients are eager's too."""
    leaves = [x.requires_grad_() if x.is_floating_point() else x for x in given]
    expected, found = function(*leaves), compiled(function)(*leaves)
    assert layouts() == [layout], [s.notes for r in attnfuse.reports() for s in r.sites]
    torch.testing.assert_close(found, expected, rtol=rtol, atol=1e-5)
    weights = torch.randn_like(expected)
    wrt = [x for x in leaves if x.requires_grad]
    for a, b in zip(*(torch.autograd.grad((out * weights).sum(), wrt) for out in (found, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    return found


def test_a_causal_attention_with_a_bias_spelled_out() -> None:
    bias = torch.randn(HEADS, LONGEST, LONGEST)
    values, offsets = inputs()

    def run(values: torch.Tensor, offsets: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        x, mask = by_gather(values, offsets)
        q = k = v = heads(x)
        causal = torch.ones(LONGEST, LONGEST, dtype=torch.bool).tril()
        scores = q @ k.transpose(-2, -1) / 3.0 + bias
        scores = scores.masked_fill(~(mask[:, None, None] & causal), torch.finfo(scores.dtype).min)
        return merged(scores.softmax(-1) @ v)[mask]

    check(run, values, offsets, bias)


def test_queries_and_keys_of_other_lengths() -> None:
    (values, offsets), (others, bounds) = inputs(), inputs((7, 40, 1, 3, 2))

    def run(values: Any, offsets: Any, others: Any, bounds: Any) -> torch.Tensor:
        (x, mask), (y, seen) = by_gather(values, offsets), by_gather(others, bounds)
        found = F.scaled_dot_product_attention(heads(x), heads(y), heads(y), attn_mask=seen[:, None, None])
        return merged(found)[mask]

    check(run, values, offsets, others, bounds)


def test_dense_queries_need_no_unpad() -> None:
    values, offsets = inputs()

    def run(query: torch.Tensor, values: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        x, mask = by_gather(values, offsets)
        return merged(F.scaled_dot_product_attention(heads(query), heads(x), heads(x), mask[:, None, None]))

    check(run, torch.randn(len(LENGTHS), 3, C), values, offsets, layout="packed_keys")


def test_padded_queries_of_dense_keys() -> None:
    values, offsets = inputs()

    def run(values: torch.Tensor, offsets: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        x, mask = by_gather(values, offsets)
        return merged(F.scaled_dot_product_attention(heads(x), heads(keys), heads(keys)))[mask]

    check(run, values, offsets, torch.randn(len(LENGTHS), 6, C), layout="packed_queries")


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_what_each_sequence_adds_to_its_rows(dtype: torch.dtype) -> None:
    values, offsets = inputs()
    offsets = offsets.to(dtype)

    def run(values: torch.Tensor, offsets: torch.Tensor, each: torch.Tensor, both: torch.Tensor) -> torch.Tensor:
        x, mask = by_gather(values, offsets)
        x = (x + each[:, None]) * both.sigmoid()
        q = heads(x)
        return merged(F.scaled_dot_product_attention(q, q, q, mask[:, None, None]))[mask]

    check(run, values, offsets, torch.randn(len(LENGTHS), C), torch.randn(len(LENGTHS), LONGEST, C))


def test_rows_that_are_written_into_the_heads_at_once() -> None:
    values, offsets = inputs()

    def run(values: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        x, mask = by_write(values, offsets)
        q = x.view(-1, LONGEST, HEADS, C // HEADS).transpose(1, 2)
        return merged(F.scaled_dot_product_attention(q, q, q, mask[:, None, None]))[mask]

    check(run, values, offsets)


def test_numbers_made_of_padded_sizes_stay_what_they_are() -> None:
    """N is the padded length, not the number of packed rows that its dim has afterwards."""

    def run(values: torch.Tensor) -> torch.Tensor:
        padded = values.to_padded_tensor(0.0)
        mask = mask_of(values.offsets().diff(), padded.shape[1])
        return (attended(padded / padded.shape[1], mask) * padded.size(1) ** 0.5)[mask]

    for lengths in ((5, 1, 33, 2, 17), (4, 9, 3, 3, 20)):
        rows = [torch.randn(n, C) for n in lengths]
        nested = torch.nested.nested_tensor(rows, layout=torch.jagged)
        torch.testing.assert_close(compiled(run)(nested), run(nested), rtol=1e-5, atol=1e-5)
    assert set(layouts()) == {"packed"}


def test_operators_that_write_are_told_from_those_that_only_end_like_them() -> None:
    """operator.and_ writes nothing; &= does, and beside nested tensors, whose memory is not followed, that leaves all as it is."""

    def run(values: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        padded = values.to_padded_tensor(0.0)
        mask = mask_of(values.offsets().diff(), padded.shape[1])
        return attended(padded, mask & keep)[mask]

    def written(values: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        keep &= keep
        return run(values, keep)

    nested = torch.nested.nested_tensor([torch.randn(n, C) for n in LENGTHS if n], layout=torch.jagged)
    keep = torch.ones(4, 1, dtype=torch.bool)
    torch.testing.assert_close(compiled(run)(nested, keep), run(nested, keep), rtol=1e-5, atol=1e-5)
    assert layouts() == ["packed"]
    with pytest.raises(Exception, match="something is written in place beside nested tensors"):
        compiled(written)(nested, keep)


def test_what_is_taken_out_is_memory_of_its_own() -> None:
    """Writing to it changes neither the rows that came in nor what backward needs."""
    values, offsets = inputs()
    weights = torch.randn(C, requires_grad=True)

    def run(values: torch.Tensor, offsets: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = JAGGED_TO_PADDED(values, [offsets], [LONGEST], 0.0)
        found = attended(x * weights, mask_of(offsets.diff(), LONGEST))
        return PADDED_TO_JAGGED(x, [offsets], values.shape[0]), PADDED_TO_JAGGED(found, [offsets], values.shape[0])

    kept = values.clone()
    same, found = compiled(run, "eager")(values, offsets, weights)
    assert layouts() == ["packed"]
    with torch.no_grad():
        same.zero_()
        found.zero_()
    assert torch.equal(values, kept)
    found.sum().backward()
    assert weights.grad is not None and weights.grad.abs().sum() > 0


def _one_row_for_all(values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    mask = mask_of(lengths, 6)
    x = values.new_zeros(3, 6, C)
    x[mask] = values
    return attended(x, mask)[mask]


def _starts_alone(values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Sequences that begin anywhere are no packed rows."""
    mask = mask_of(lengths, 6)
    x = values[((lengths * 2)[:, None] + torch.arange(6)).clamp(max=values.shape[0] - 1)]
    return attended(x, mask)[mask]


@pytest.mark.parametrize("function", [_one_row_for_all, _starts_alone])
def test_rows_that_are_not_one_after_the_other_are_no_padding(function: Callable[..., Any]) -> None:
    values, lengths = torch.randn(1, C), torch.tensor([2, 5, 1])
    run = torch.compile(
        function,
        backend="attnfuse",
        fullgraph=True,
        dynamic=False,
        options={"inner": "eager", "strict": True, "padding": "keep"},
    )
    with torch.no_grad():
        torch.testing.assert_close(run(values, lengths), function(values, lengths), rtol=1e-5, atol=1e-5)
    assert layouts() == ["dense"]


def test_dropout_between_the_pad_and_the_unpad() -> None:
    """Drops as much, scales what is left, and gradients flow where rows were kept."""
    values, offsets = inputs((40, 40, 39))

    def run(values: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        x, mask = by_gather(values, offsets)
        return F.dropout(attended(x, mask), 0.25)[mask]

    values.requires_grad_()
    found = compiled(run)(values, offsets)
    assert layouts() == ["packed"]
    plain = attended(by_gather(values, offsets)[0], mask_of(offsets.diff(), LONGEST))[mask_of(offsets.diff(), LONGEST)]
    kept = found != 0
    torch.testing.assert_close(found[kept], (plain / 0.75)[kept], rtol=1e-5, atol=1e-5)
    assert 0.7 < kept.float().mean() < 0.8
    assert torch.autograd.grad(found.sum(), values)[0].abs().sum() > 0


@pytest.mark.filterwarnings("ignore:attnfuse. kernel 'cpu' failed:RuntimeWarning")
@pytest.mark.parametrize("offsets", [(0, 7, 5, 20), (-3, 5, 9, 20), (0, 5, 9, 99)])
def test_offsets_that_are_inconsistent(offsets: tuple[int, ...]) -> None:
    """Strict says what is wrong with them; else nothing is read out of bounds."""
    values, given = torch.randn(20, C), torch.tensor(offsets)

    def run(values: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        x = JAGGED_TO_PADDED(values, [offsets], [LONGEST], 0.0)
        return PADDED_TO_JAGGED(attended(x, mask_of(offsets.diff(), LONGEST)), [offsets], values.shape[0])

    with pytest.raises(ValueError, match="offsets of sequences are"):
        compiled(run)(values, given)
    torch._dynamo.reset()
    loose = torch.compile(run, backend="attnfuse", fullgraph=True, options={"inner": "eager", "padding": "keep"})
    assert loose(values, given).shape == values.shape


def test_rows_beyond_the_padded_length_are_cut_off() -> None:
    """The padded tensor holds the first rows of a longer sequence, and so do the packed bounds."""
    values, offsets = inputs((5, 60, 2))

    def run(values: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        x, mask = by_gather(values, offsets)
        q = heads(x)
        return merged(F.scaled_dot_product_attention(q, q, q, mask[:, None, None]))[mask]

    assert check(run, values, offsets).shape[0] == 5 + LONGEST + 2


@pytest.mark.parametrize("lengths", [LENGTHS, (5, 60, 2)])
def test_fbgemm(lengths: tuple[int, ...], fbgemm: Any) -> None:
    """Rows beyond the padded length, which FBGEMM sets to 0, included."""

    def run(values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        offsets = fbgemm.asynchronous_complete_cumsum(lengths)
        x = fbgemm.jagged_to_padded_dense(values, [offsets], [LONGEST], 0.0)
        found, same = fbgemm.dense_to_jagged(attended(x, mask_of(lengths, LONGEST)), [offsets], values.shape[0])
        return found * same[0].shape[0]

    values, offsets = inputs(lengths)
    check(run, values, offsets.diff())


def test_transformer_encoder_of_pytorch() -> None:
    layer = nn.TransformerEncoderLayer(C, HEADS, 32, dropout=0.0, batch_first=True, norm_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    values, offsets = inputs()

    def run(values: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        x, mask = by_gather(values, offsets)
        return model(x, src_key_padding_mask=~mask)[mask]

    expected = run(values, offsets)
    found = compiled(run)(values, offsets)
    assert layouts() == ["packed", "packed"], [s.notes for r in attnfuse.reports() for s in r.sites]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


# --- what stays as it is -----------------------------------------------------------------------------------------------


def attended(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    q = heads(x)
    return merged(F.scaled_dot_product_attention(q, q, q, None if mask is None else mask[:, None, None]))


def _not_hidden(values: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    x, mask = by_gather(values, offsets)
    return attended(x, None)[mask]


def _hidden_by_others(values: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    x, mask = by_gather(values, offsets)
    return attended(x, mask_of(offsets.diff() + 1, LONGEST))[mask]


def _taken_out_by_others(values: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    x, mask = by_gather(values, offsets)
    return attended(x, mask)[mask_of(offsets.diff() + 1, LONGEST)]


def _mixed(values: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    x, mask = by_gather(values, offsets)
    return (attended(x, mask) + x.mean(1, keepdim=True))[mask]


def _shifted(values: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    x, mask = by_gather(values, offsets)
    return attended(torch.roll(x, 1, 1), mask)[mask]


def _kept(values: torch.Tensor, offsets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x, mask = by_gather(values, offsets)
    found = attended(x, mask)
    return found[mask], found


def _near(values: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    x, mask = by_gather(values, offsets)
    q = heads(x)
    scores = (q @ q.transpose(-2, -1)).masked_fill(~mask[:, None, None], -8.0)
    return merged(scores.softmax(-1) @ q)[mask]


def _whole_rows(values: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Rows that hide all keys see padding too, by a finite fill."""
    x, mask = by_gather(values, offsets)
    q = heads(x)
    far = torch.arange(LONGEST)[:, None] > torch.arange(LONGEST) + 3
    keep = mask[:, None, None] & far
    scores = (q @ q.transpose(-2, -1)).masked_fill(~keep, torch.finfo(q.dtype).min)
    return merged(scores.softmax(-1) @ q)[mask]


def _written(values: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    x, mask = by_gather(values, offsets)
    x.mul_(1.5)
    return attended(x, mask)[mask]


def _read_later(values: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    x, mask = by_gather(values, offsets)
    factor = torch.ones(C)
    x = x * factor
    factor.mul_(2.0)
    return attended(x, mask)[mask] * factor


def _by_a_mask_that_comes_in(values: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    x, mask = by_gather(values, offsets)
    return attended(x, torch.rand(x.shape[0], LONGEST) < 2.0)[mask]


STAYS = {
    _not_hidden: reasons.PADDING_NOT_HIDDEN,
    _hidden_by_others: reasons.PADDING_NOT_HIDDEN,
    _taken_out_by_others: reasons.PADDING_OTHER_MASK,
    _mixed: reasons.PADDING_ALONG,
    _shifted: reasons.PADDING_OP,
    _kept: reasons.PADDING_USED,
    _near: reasons.PADDING_NEAR_FILL,
    _whole_rows: reasons.PADDING_MASKED_ROW,
    _written: reasons.PADDING_WRITTEN,
    _read_later: reasons.PADDING_WRITES_NEAR,
    _by_a_mask_that_comes_in: reasons.PADDING_NOT_HIDDEN,
}


@pytest.mark.parametrize("function", STAYS, ids=lambda f: f.__name__.strip("_"))
def test_what_stays_padded_says_why(function: Callable[..., Any]) -> None:
    values, offsets = inputs()
    with torch.no_grad():
        expected, found = function(values, offsets), compiled(function)(values, offsets)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    (site,) = sites()
    assert site.status == "fused" and site.spec.layout == "dense"
    (note,) = (note for note, cause in zip(site.notes, site.note_causes) if cause == STAYS[function].name)
    assert note.startswith("padding stays: ")


def _clamped_to_a_lower_row(values: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    mask = mask_of(offsets.diff(), LONGEST)
    x = values[(offsets[:-1, None] + torch.arange(LONGEST)).clamp(max=9)]
    return attended(x, mask)[mask]


def _offsets_edited_in_a_copy(values: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    own = offsets.clone()
    own[1:3].add_(1)
    x, mask = by_op(values, own)
    return attended(x, mask)[mask]


def _lengths_edited(values: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    lengths = offsets.diff()
    lengths[2] += 3
    mask = mask_of(lengths, LONGEST)
    return attended(by_gather(values, offsets)[0], mask)[mask]


def _lengths_edited_behind(values: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    lengths = offsets.diff()
    mask = mask_of(lengths, LONGEST)
    x = values.new_zeros(mask.shape[0], LONGEST, C)
    x[mask] = values
    x = attended(x, mask)
    lengths[:3] = 1
    return x[mask]


def _offsets_edited_behind(values: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    x, mask = by_gather(values, offsets)
    x = attended(x, mask)
    offsets.add_(1)
    return x[mask]


def _bias_edited_behind(values: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    bias = torch.arange(LONGEST * LONGEST).view(LONGEST, LONGEST).sin()
    x, mask = by_gather(values, offsets)
    q = heads(x)
    scores = (q @ q.transpose(-2, -1) + bias).masked_fill(~mask[:, None, None], -torch.inf)
    x = merged(scores.softmax(-1) @ q)
    bias.mul_(3.0)
    return x[mask]


def _one_feature_for_all(values: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    mask = mask_of(offsets.diff(), LONGEST)
    x = values.new_zeros(mask.shape[0], LONGEST, C)
    x[mask] = values[:, :1]
    return attended(F.linear(x, torch.eye(C)), mask)[mask]


def _added_place_by_place(values: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    x, mask = by_gather(values, offsets)
    each = torch.arange(x.shape[0] * LONGEST)[:, None].sin()
    x = (x.transpose(0, 1).reshape(-1, C) + each).view(LONGEST, -1, C).transpose(0, 1)
    return attended(x, mask)[mask]


def _last_places(values: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    # of no op that is read: a tensor that is one less than the lengths
    last = torch.stack([offsets.diff() - 1] * 2).amax(0)
    mask = torch.arange(LONGEST) <= last[:, None]
    x = values.new_zeros(mask.shape[0], LONGEST, C)
    x[mask] = values
    # what is hidden and taken out has one place less than what was written
    mask = torch.arange(LONGEST) < last[:, None]
    return attended(x, mask)[mask]


@pytest.mark.parametrize(
    "function",
    [
        *(_clamped_to_a_lower_row, _offsets_edited_in_a_copy, _lengths_edited, _lengths_edited_behind),
        *(_offsets_edited_behind, _bias_edited_behind, _one_feature_for_all, _added_place_by_place, _last_places),
    ],
    ids=lambda f: f.__name__.strip("_"),
)
def test_what_only_looks_like_padding_stays(function: Callable[..., Any]) -> None:
    values, offsets = inputs()
    with torch.no_grad():
        expected, found = function(values, offsets.clone()), compiled(function, "eager")(values, offsets.clone())
    assert layouts() == ["dense"]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_tensor_of_two_paddings_is_packed_by_one() -> None:
    (values, offsets), (others, bounds) = inputs(), inputs((7, 40, 1, 3, 2))

    def run(values: Any, offsets: Any, others: Any, bounds: Any) -> torch.Tensor:
        (x, mask), (y, seen) = by_gather(values, offsets), by_gather(others, bounds)
        both = mask & seen
        return attended(x + y, both)[both]

    check(run, values, offsets, others, bounds)


def test_all_sizes_of_what_a_mask_takes_out() -> None:
    values, offsets = inputs()

    def run(values: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        x, mask = by_gather(values, offsets)
        found = attended(x, mask)[mask]
        return found + torch.ones(found.size())

    check(run, values, offsets)


def test_lengths_of_more_sequences_than_there_are() -> None:
    values, offsets = inputs()

    def run(values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        mask = mask_of(lengths[: len(LENGTHS)], LONGEST)
        x = values.new_zeros(len(LENGTHS), LONGEST, C)
        x[mask] = values * 1.0
        return attended(x, mask)[mask]

    check(run, values, torch.cat([offsets.diff(), torch.tensor([3, 4])]))


def test_rows_that_are_padded_without_gradients_get_none() -> None:
    values, offsets = inputs()
    weights = torch.randn(C, requires_grad=True)

    def run(values: torch.Tensor, offsets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            x, mask = by_gather(values, offsets)
        return attended(x * weights, mask)[mask]

    found = compiled(run)(values.requires_grad_(), offsets, weights)
    assert torch.autograd.grad(found.sum(), [values, weights], allow_unused=True)[0] is None


def test_what_is_computed_without_gradients_gets_none() -> None:
    values, offsets = inputs()

    def run(values: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            x, mask = by_gather(values, offsets)
            x = attended(x, mask)
        return x[mask] + values

    values.requires_grad_()
    found = compiled(run)(values, offsets)
    torch.testing.assert_close(found, run(values, offsets), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), values)[0], torch.ones_like(values))


def test_padding_that_is_nan_is_not_passed_over_under_the_eager_policy() -> None:
    values, offsets = inputs()
    model = Encoder(by_gather, back_by_mask, blocks=1).eval()
    options = {"inner": "eager", "nan_policy": "eager"}
    with torch.no_grad():
        found = torch.compile(model, backend="attnfuse", fullgraph=True, options=options)(values, offsets)
        torch.testing.assert_close(found, model(values, offsets), rtol=1e-5, atol=1e-5)
    assert layouts() == ["dense"]


@pytest.mark.parametrize("inner", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_the_guide_runs_and_prints_what_it_says(inner: str, tmp_path: Path) -> None:
    guide = (ROOT / "docs" / "padding.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", guide, re.M | re.S)
    assert len(blocks) == guide.count("```python")
    code, first = "".join(blocks), "import torch"
    assert code.startswith(f"{first}\n")
    if inner != "inductor":
        # what is printed is not Inductor's, which takes long; on one line, as lines are counted
        options = f"{{**k, 'options': {{'inner': {inner!r}, **k.get('options', {{}})}}}}"
        own = f"lambda *a, c=torch.compile, **k: c(*a, **({options} if k['backend'] == 'attnfuse' else k))"
        code = code.replace(first, f"{first}; torch.compile = {own}", 1)
    # a file, since Dynamo looks for the module of what it compiles
    script = tmp_path / "guide.py"
    script.write_text(code)
    env = {**os.environ, "PYTHONPATH": str(Path(attnfuse.__file__).resolve().parents[1])}
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=False, timeout=600, env=env
    )
    assert done.returncode == 0, done.stderr[-4000:]
    text = re.sub(r"^```python\n.*?^```", "", guide, flags=re.M | re.S)
    shown = [line for line in re.findall(r"^ {4}(.*)$", text, re.M) if not line.startswith("torch.compile(")]
    assert len(shown) > 5
    assert done.stdout.splitlines() == [*shown, *re.findall(r"print\(.*\)  # (.*)$", code, re.M)]
