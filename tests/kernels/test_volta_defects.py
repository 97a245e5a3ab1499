"""Seeded defects in the kernels for 7.0 and 7.5: whether the emulator and the error bars see them.

A defect is a small fault in the C++ text of one pass. It is caught if its case fails: by an error of the emulator, by a bank
conflict, or by a result beyond the bar. Without a defect the same cases pass.

Two barriers of `any_of_block` and one at the end of `Sums::finish` have no defect here: what they order is ordered by others too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import kernel_cases
import pytest
import torch
from emulated_volta import Emulated
from kernel_cases import INF, bounds_of, check, make_spec, qkv, randn
from repository import ROOT

from attnfuse.expr import causal, dense, documents
from attnfuse.kernels.inputs import Bounds, Inputs
from attnfuse.spec import Bias, ReplaceFill, Scale, Sink
from attnfuse.testing.emulated import EmulationError

HALF, BEFORE = Scale(0.25), ReplaceFill(causal(), -INF)

CASES: dict[str, Callable[[Emulated, bool], None]] = {}


def case(made: Callable[[Emulated, bool], None]) -> Callable[[Emulated, bool], None]:
    CASES[made.__name__] = made
    return made


@case
def plain(kernel, backward):
    check(kernel, *qkv(1, 2, 70, 200, 16), backward=backward)


@case
def growing(kernel, backward):
    """Later keys have larger scores: what was summed up before fades."""
    q, k, v = qkv(1, 1, 70, 200, 16)
    k *= torch.linspace(0.1, 4.0, 200).to(k.dtype)[:, None]
    check(kernel, q, k, v, steps=(Scale(1.0),), backward=backward)


@case
def head_size_64(kernel, backward):
    check(kernel, *qkv(1, 1, 70, 100, 64), backward=backward)


@case
def head_size_256(kernel, backward):
    check(kernel, *qkv(1, 1, 40, 70, 16, E=256), backward=backward)


@case
def before(kernel, backward):
    check(kernel, *qkv(1, 1, 129, 130, 16), steps=(HALF, BEFORE), backward=backward)


@case
def tile_ends(kernel, backward):
    """Causal masks whose first or last key begins or ends a tile."""
    for queries in (65, 97):
        for offset in (0, 30, 62):
            steps = (HALF, ReplaceFill(causal(offset), -INF))
            check(kernel, *qkv(1, 1, queries, 130, 16), steps=steps, backward=backward)


@case
def far_before(kernel, backward):
    """No query sees a key."""
    steps = (HALF, ReplaceFill(causal(-200), -INF))
    check(kernel, *qkv(1, 1, 70, 90, 16), steps=steps, hidden="zero", backward=backward)


@case
def last_row_alone(kernel, backward):
    """The last query and the last keys are of a document of their own."""
    of_queries, of_keys = torch.arange(70) >= 69, torch.arange(129) >= 128
    operands = [of_queries.long().view(1, 1, 70, 1), of_keys.long().view(1, 1, 1, 129)]
    check(
        kernel, *qkv(1, 1, 70, 129, 16), operands, steps=(HALF, ReplaceFill(documents(0, 1), -INF)), backward=backward
    )


@case
def keys_hidden_at_first(kernel, backward):
    keep = torch.ones(1, 1, 70, 200, dtype=torch.bool)
    keep[..., ::2, :140] = False
    check(kernel, *qkv(1, 1, 70, 200, 16), [keep], steps=(HALF, ReplaceFill(dense(0), -INF)), backward=backward)


@case
def hidden_rows(kernel, backward):
    """Rows that see no key give 0."""
    steps = (HALF, ReplaceFill(causal(-20), -INF))
    check(kernel, *qkv(1, 1, 70, 90, 16), steps=steps, hidden="zero", backward=backward)


@case
def second_look(kernel, backward):
    """Rows of finite fills alone see all keys, the skipped ones too: the first rows, or the last ones."""
    check(kernel, *qkv(1, 1, 70, 200, 16), steps=(HALF, ReplaceFill(causal(-20), -1e9)), backward=backward)
    # queries of a document that no key is of
    of_queries, of_keys = torch.arange(200) >= 140, torch.zeros(1, 1, 1, 100, dtype=torch.int64)
    operands = [of_queries.long().view(1, 1, 200, 1) * 5, of_keys]
    check(
        kernel, *qkv(1, 1, 200, 100, 16), operands, steps=(HALF, ReplaceFill(documents(0, 1), -1e9)), backward=backward
    )


@case
def dropped(kernel, backward):
    check(kernel, *qkv(1, 2, 70, 90, 16), seed=torch.tensor([77]), dropout=0.3, backward=backward)


@case
def sinks(kernel, backward):
    check(kernel, *qkv(1, 2, 40, 70, 16), [randn(1, 2, 1, 1)], sink=Sink(operand=0), backward=backward)


@case
def log_sum_exps(kernel, backward):
    check(kernel, *qkv(1, 2, 40, 70, 16), lse=True, backward=backward)


@case
def decoding(kernel, backward):
    q, k, v = randn(2, 1, 4, 5, 16), randn(2, 1, 1, 650, 16), randn(2, 1, 1, 650, 16)
    k *= torch.linspace(0.1, 4.0, 650).to(k.dtype)[:, None]
    bias = randn(1, 1, 4, 1, 650)
    check(kernel, q, k, v, [bias], steps=(HALF, Bias(0)), backward=backward)


@case
def grouped(kernel, backward):
    """Elements that share keys are not next to each other."""
    q, k, v = randn(2, 3, 2, 40, 16), randn(2, 1, 2, 70, 16), randn(2, 1, 2, 70, 16)
    bias = randn(1, 3, 1, 1, 70)
    check(kernel, q, k, v, [bias], steps=(HALF, Bias(0)), backward=backward)


@case
def bias_of_rows(kernel, backward):
    check(kernel, *qkv(2, 2, 70, 90, 16), [randn(1, 2, 70, 1)], steps=(HALF, Bias(0)), backward=backward)


@case
def bias_of_heads(kernel, backward):
    check(kernel, *qkv(2, 2, 70, 90, 16), [randn(1, 2, 1, 1)], steps=(HALF, Scale(operand=0)), backward=backward)


@case
def bias_of_all(kernel, backward):
    check(kernel, *qkv(2, 2, 70, 90, 16), [randn(1, 2, 70, 90)], steps=(HALF, Bias(0)), backward=backward)


@case
def packed(kernel, backward):
    lengths = (5, 0, 1, 33, 64, 70)
    q, k, v = (randn(1, 2, sum(lengths), 16) for _ in range(3))
    ends = bounds_of(*lengths)
    bounds = Bounds(ends, ends)
    check(kernel, q, k, v, bounds=bounds, layout="packed", steps=(HALF, BEFORE), backward=backward)


def within_nan(x):
    """The same numbers, with NaN around."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 4), torch.nan, dtype=x.dtype)
    wide[..., 1:-3] = x
    return wide[..., 1:-3]


@case
def odd_widths(kernel, backward):
    """What is read beyond a row is NaN, and the memory ends with the last one."""
    check(kernel, *map(within_nan, qkv(1, 2, 40, 70, 19, E=33)), backward=backward)
    check(kernel, *qkv(1, 2, 40, 70, 19, E=33), backward=backward)


@case
def unshifted(kernel, backward):
    q = torch.full((1, 1, 4, 1), 20.0, dtype=torch.float16)
    k = torch.tensor([10.0, 1.0], dtype=torch.float16).view(1, 1, 2, 1)
    out, _ = kernel.forward(make_spec(q, k, k, softmax="unshifted", steps=()), Inputs(q, k, k))
    assert bool(out.isnan().all())


@case
def zeroed_weights(kernel, backward):
    """A row that is NaN has weights that are filled with 0: NaN is left where one is not."""
    keep = torch.rand(2, 1, 1, 90) < 0.7
    keep[0] = False
    check(
        kernel,
        *qkv(2, 1, 40, 90, 16),
        [keep],
        steps=(ReplaceFill(dense(0), -INF),),
        weight_steps=(ReplaceFill(dense(0), 0.0),),
        backward=backward,
    )


@dataclass(frozen=True)
class Defect:
    """In the text of one pass, `new` stands for `old`, which is there `times` times."""

    name: str
    old: str
    new: str
    case: str
    backward: bool = False
    capabilities: tuple[int, ...] = (70, 75)
    times: int = 1

    def change(self, text: str) -> str:
        if ("attention_rows(" in text) != self.backward:
            return text
        assert text.count(self.old) == self.times, f"{self.name}: the text is there {text.count(self.old)} times"
        return text.replace(self.old, self.new)


def forward(name: str, old: str, new: str, case: str, capabilities=(70, 75), times=1) -> Defect:
    return Defect(name, old, new, case, False, capabilities, times)


def backward(name: str, old: str, new: str, case: str, capabilities=(70, 75), times=1) -> Defect:
    return Defect(name, old, new, case, True, capabilities, times)


SYNC = "sync_block();\n"

DEFECTS = (
    # -- fragments
    forward(
        "rows of fragments are exchanged",
        "(lane() >> 2) + 8 * slot;",
        "(lane() >> 2) + 8 * (slot ^ 1);",
        "plain",
        (75,),
    ),
    forward(
        "rows of fragments are exchanged, 7.0",
        "first_row() + (lane() & 1) + 2 * slot",
        "first_row() + 2 * (lane() & 1) + slot",
        "plain",
        (70,),
    ),
    forward(
        "a lane reads another row of the left factor",
        "return first_row() + (lane() & 3);",
        "return first_row() + ((lane() & 3) ^ 1);",
        "plain",
        (70,),
    ),
    forward(
        "columns of fragments lie apart",
        "block * 8 + 2 * (lane() & 3) + (i & 1)",
        "block * 8 + (lane() & 3) + 4 * (i & 1)",
        "before",
        (75,),
    ),
    forward(
        "columns of scores lie as those of the other product",
        "return block * 8 + (i & 4) + (lane() & 2) + (i & 1);",
        "return block * 8 + 2 * (i & 2) + (lane() & 2) + (i & 1);",
        "before",
        (70,),
    ),
    forward(
        "columns of sums lie as those of scores",
        "return (block >> 1) * 16 + 2 * (i & 4) + (block & 1) * 4 + (lane() & 2) + (i & 1);",
        "return column_of(block, i);",
        "plain",
        (70,),
    ),
    forward(
        "words of the left factor are exchanged",
        "multiply_884<false, false>(acc[block], a.x, a.y, b.x, b.y);",
        "multiply_884<false, false>(acc[block], a.y, a.x, b.x, b.y);",
        "plain",
        (70,),
    ),
    forward(
        "words of the right factor are those of the first half twice",
        "multiply_884<false, false>(acc[block], a.z, a.w, b.z, b.w);",
        "multiply_884<false, false>(acc[block], a.z, a.w, b.x, b.y);",
        "plain",
        (70,),
    ),
    forward(
        "halves of the left factor are exchanged",
        "multiply_1688(low, a[0], a[1], b);",
        "multiply_1688(low, a[1], a[0], b);",
        "plain",
        (75,),
    ),
    forward(
        "a right factor is not transposed",
        "load_matrices_transposed(b, right",
        "load_matrices(b, right",
        "plain",
        (75,),
    ),
    forward(
        "the right factor by columns is read as one by rows",
        "multiply_884<false, true>(acc[block + 1], first, second, b.z, b.w);",
        "multiply_884<false, false>(acc[block + 1], first, second, b.z, b.w);",
        "plain",
        (70,),
    ),
    forward(
        "the second left factor multiplies the first rows",
        "right + moved + (step >> 1) * In::EIGHT_ROWS",
        "right + moved + (step & 1) * In::EIGHT_ROWS",
        "plain",
        (70,),
    ),
    forward(
        "left factors are exchanged",
        "multiply_32(acc[block + u], a, b[2 * u]);",
        "multiply_32(acc[block + u], a2, b[2 * u]);",
        "plain",
        (75,),
    ),
    forward(
        "lanes exchange the rows that they have to keep",
        "a[2 * g] = upper ? given : own;",
        "a[2 * g] = upper ? own : given;",
        "plain",
        (70,),
    ),
    forward(
        "numbers of a pair are exchanged",
        "half_pair(x[2 * j], x[2 * j + 1])",
        "half_pair(x[2 * j + 1], x[2 * j])",
        "plain",
        (75,),
    ),
    forward(
        "the maximum is that of other lanes",
        "return greatest(x, shuffle_xor(x, 2)); }",
        "return greatest(x, shuffle_xor(x, 1)); }",
        "growing",
        (70,),
    ),
    forward(
        "the sum of a row leaves lanes out", "x += shuffle_xor(x, 1);", "x += 0.0f * shuffle_xor(x, 1);", "plain", (75,)
    ),
    forward(
        "pieces are written where they are not read",
        "first = In::at(own / In::N, own % In::N);",
        "first = own * 4;",
        "head_size_64",
    ),
    forward(
        "pieces of all rows lie in the same banks",
        "return (row * N + ((row >> (3 - TWOS)) & BITS)) * 4;",
        "return row * N * 4;",
        "head_size_64",
    ),
    forward(
        "half of a tile is written",
        "for (int j = 0; j < EACH; ++j) {\n            int at = own + j * THREADS;\n            int place",
        "for (int j = 0; j < (EACH + 1) / 2; ++j) {\n            int at = own + j * THREADS;\n            int place",
        "head_size_64",
    ),
    forward("a row behind the last is read", "row < rows && column < width", "row <= rows && column < width", "plain"),
    forward("a column behind the last is read", "c + 1 < width ? load_global", "c < width ? load_global", "odd_widths"),
    forward(
        "a column behind the last is written",
        "if (column + 1 < width) store_global(to + (column + 1) * m.column, half_of_float(second));",
        "if (column < width) store_global(to + (column + 1) * m.column, half_of_float(second));",
        "odd_widths",
    ),
    # -- forward: order
    forward(
        "keys are read before they are written",
        f"while (tile.k0 < hi) {{\n            {SYNC}",
        "while (tile.k0 < hi) {\n",
        "plain",
    ),
    forward(
        "values are read before they are written",
        f"values.store(v_tile, zero);\n            {SYNC}",
        "values.store(v_tile, zero);\n",
        "plain",
    ),
    forward(
        "values of the tile before are used",
        "values.store(v_tile, zero);",
        "if (tile.k0 == lo) values.store(v_tile, zero);",
        "plain",
    ),
    forward("keys of the tile before are used", "if (after.k0 < hi) keys.store(k_tile, zero);", "", "plain"),
    forward(
        "whether a row is in doubt is read before it is known",
        f"store_shared(slots + thread_index() / 32, any ? 1u : 0u);\n    {SYNC}",
        "store_shared(slots + thread_index() / 32, any ? 1u : 0u);\n",
        "second_look",
    ),
    forward(
        "keys of the next tile are written while some read",
        f"values.store(v_tile, zero);\n            {SYNC}",
        "values.store(v_tile, zero);\n            Tile soon = next(tile.k0 + KEYS, hi, range, whole, shared);\n            "
        "Pieces<KEYS, DP, THREADS> early;\n            early.load(p.k, k_base, soon.k0, Kn, D, zero);\n            "
        f"if (soon.k0 < hi) early.store(k_tile, zero);\n            {SYNC}",
        "plain",
    ),
    # -- forward: numbers
    forward(
        "queries of the first warp alone",
        "(s, q_tile, row0, k_tile, 0, zero)",
        "(s, q_tile, 0, k_tile, 0, zero)",
        "plain",
    ),
    forward("sums do not fade", "acc[b][i] *= fade[slot_of(i)];", "acc[b][i] *= 1.0f;", "growing"),
    forward("the sum of weights does not fade", "l[z] *= fade[z];", "", "growing"),
    forward(
        "a row without scores so far is shifted by infinity",
        "shift[z] = top[z] == -infinity() ? 0.0f : top[z];",
        "shift[z] = top[z];",
        "keys_hidden_at_first",
    ),
    forward("keys behind the last count", "if (FULL == 0 && k >= Kn) x = -infinity();", "", "plain"),
    forward("dropout of the next row", "row(row0 + row_of(s)).line);", "row(row0 + row_of(s)).line + 1);", "dropped"),
    forward(
        "weights that dropout keeps are not scaled",
        "kept(k, p.threshold) ? w * p.keep_scale : 0.0f",
        "kept(k, p.threshold) ? w : 0.0f",
        "dropped",
    ),
    forward(
        "each lane counts the sink",
        "m[s] == -infinity() || lane_of_row() != 0 ? 0.0f",
        "m[s] == -infinity() ? 0.0f",
        "sinks",
    ),
    forward(
        "the second half of columns is the first", "8 * b, side * SUM_BLOCKS, zero", "8 * b, 0, zero", "head_size_256"
    ),
    forward(
        "rows that see nothing are NaN",
        "if (HIDDEN == 1 && none) { zero[s] = true; added[s] = 0.0f; }",
        "",
        "hidden_rows",
    ),
    forward(
        "sums that overflow are numbers",
        "broken = broken || ((sum == 0.0f || sum == infinity() || sum != sum) && Kn > 0);",
        "",
        "unshifted",
    ),
    forward(
        "weights that are filled are NaN",
        "added[s] = stays ? not_a_number() : 0.0f;",
        "added[s] = not_a_number();",
        "zeroed_weights",
    ),
    forward(
        "statistics of the next row",
        "store_global(stats + of.line, marked",
        "store_global(stats + of.line + 1, marked",
        "log_sum_exps",
    ),
    # -- forward: ranges
    forward(
        "the last query has no keys of its own",
        "MODE == WHOLE ? smaller(q0 + ROWS, Qn) - 1 :",
        "MODE == WHOLE ? smaller(q0 + ROWS, Qn) - 2 :",
        "tile_ends",
    ),
    forward(
        "a tile with one hidden key is full", "k0 + KEYS <= range.last;", "k0 + KEYS <= range.last + 1;", "tile_ends"
    ),
    forward(
        "a range without keys ends before 0",
        "if (lo >= hi) hi = 0;\n        lo = smaller(lo, hi) / KEYS * KEYS;\n        lo = larger(lo, 0);",
        "lo = smaller(lo, hi) / KEYS * KEYS;",
        "far_before",
    ),
    forward(
        "keys begin within a tile",
        "lo = smaller(lo, hi) / KEYS * KEYS;",
        "lo = smaller(lo, hi) / KEYS * KEYS + 8;",
        "before",
    ),
    forward(
        "there is no second look",
        "if (DOUBT == -infinity() || whole || !any_of_block<WARPS>(doubtful(), slots)) break;",
        "break;",
        "second_look",
    ),
    forward(
        "the second look adds to the first", "whole = true;\n            begin(c);", "whole = true;", "second_look"
    ),
    forward(
        "the second look has the range of the first",
        "pass(whole ? 0 : lo, whole ? Kn : hi,",
        "pass(lo, hi,",
        "second_look",
    ),
    forward("keys of the first sequence", "p.k.batch) + k_start * p.k.row;", "p.k.batch);", "packed"),
    forward("queries of the first sequence", "p.q.batch) + q_start * p.q.row, q0, Qn", "p.q.batch), q0, Qn", "packed"),
    forward(
        "results of the first sequence",
        "p.o.batch) + (q_start + of.query) * p.o.row",
        "p.o.batch) + of.query * p.o.row",
        "packed",
    ),
    forward(
        "tiles are dealt from the next slot on",
        "load_global(deal + middle) > slot",
        "load_global(deal + middle) >= slot",
        "packed",
    ),
    # -- forward: parts
    forward(
        "a part is a tile short",
        "share = tiles_of(tiles_of(hi - lo, KEYS), p.parts) * KEYS;",
        "share = tiles_of(hi - lo, KEYS) / p.parts * KEYS;",
        "decoding",
    ),
    forward(
        "parts overlap",
        "smaller(lo + share, hi), range, false",
        "smaller(lo + share + 1, hi), range, false",
        "decoding",
    ),
    forward(
        "parts write to one place",
        "((i64)tile * p.parts + part) * NUMBERS",
        "((i64)tile * p.parts) * NUMBERS",
        "decoding",
    ),
    forward(
        "the sum of a part is not scaled",
        "load_global(from + (2 * s + 1) * THREADS) * gain[s];",
        "load_global(from + (2 * s + 1) * THREADS);",
        "decoding",
    ),
    forward(
        "sums of parts do not fade",
        "acc[b][i] = acc[b][i] * fade[s] + own * gain[s];",
        "acc[b][i] = acc[b][i] + own * gain[s];",
        "decoding",
    ),
    forward("heads of a tile read what the first has", "return MODE == WHOLE ? 0 : slot; }", "return 0; }", "decoding"),
    # -- backward: order
    backward(
        "a tile is overwritten while it is multiplied",
        f"while (tile.at < hi) {{\n            {SYNC}",
        "while (tile.at < hi) {\n",
        "plain",
    ),
    backward(
        "a tile is read before it is written",
        f"if (KEYS_OWN) number_rows(tile.at);\n            {SYNC}",
        "if (KEYS_OWN) number_rows(tile.at);\n",
        "plain",
    ),
    backward(
        "gradients of scores are read before they are written",
        f"else slope<0>(tile.at, c, zero);\n            {SYNC}",
        "else slope<0>(tile.at, c, zero);\n",
        "plain",
    ),
    backward(
        "gradients of the operand are written over those of scores",
        f"row0 = warp / SIDES_B * WARP_ROWS;\n            {SYNC}",
        "row0 = warp / SIDES_B * WARP_ROWS;\n",
        "bias_of_rows",
    ),
    backward(
        "gradients of the operand are read before they are written",
        f"bits_of(total));\n            }}\n            {SYNC}",
        "bits_of(total));\n            }\n",
        "bias_of_rows",
    ),
    # -- backward: numbers
    backward(
        "weights of the first tile are used for all",
        "if (KEYS_OWN) {\n                as_left(s[b], a);",
        "if (KEYS_OWN && other0 == 0) {\n                as_left(s[b], a);",
        "plain",
    ),
    backward("gradients of scores have no delta", "float ds = w * (dw - of_delta);", "float ds = w * dw;", "plain"),
    backward(
        "weights are powers of two",
        "exp2_approximate((x - of_shift) * LOG2E) * of_inverse",
        "exp2_approximate(x - of_shift) * of_inverse",
        "plain",
    ),
    backward(
        "weights are not divided by the sum",
        "float inverse = broken ? not_a_number() : 1.0f / l;",
        "float inverse = broken ? not_a_number() : 1.0f;",
        "plain",
    ),
    backward("delta leaves out a column", "column < E; column += 32", "column < E - 1; column += 32", "plain"),
    backward(
        "the gradient of the log-sum-exp has the other sign", "delta -= of_lse;", "delta += of_lse;", "log_sum_exps"
    ),
    backward("dropout of the first rows", "Dropped of(p, line + q0 + at);", "Dropped of(p, line + at);", "dropped"),
    backward(
        "gradients of weights are not dropped",
        "dw = kept ? dw * p.keep_scale : 0.0f;",
        "dw = dw * p.keep_scale;",
        "dropped",
    ),
    backward("weights of dv are not dropped", "dropped_w = kept ? dropped_w * p.keep_scale : 0.0f;", "", "dropped"),
    backward(
        "rows and keys outside of the matrix count", "live = live && q < Qn && k < Kn;", "live = live;", "bias_of_rows"
    ),
    backward(
        "the other side's columns are those of the first warp",
        "int column0 = side * OTHER_BLOCKS * 8;",
        "int column0 = 0;",
        "plain",
    ),
    backward(
        "the second half of columns is the first",
        "other_d, 8 * j, side * D_BLOCKS, zero",
        "other_d, 8 * j, 0, zero",
        "head_size_64",
    ),
    backward(
        "fragments of P are stored a piece on",
        "row + left_row_of() + zero, piece), U4{",
        "row + left_row_of() + zero, piece ^ 1), U4{",
        "plain",
        (70,),
    ),
    backward(
        "fragments of P are stored a piece on, 7.5",
        "row + (own >> 2), piece) + (own & 3)",
        "row + (own >> 2), piece ^ 1) + (own & 3)",
        "plain",
        (75,),
    ),
    backward("numbers of other rows", "row_numbers + 2 * OTHER + column", "row_numbers + OTHER + column", "plain"),
    backward(
        "the last tile's rows are zeros of nobody",
        "q < Qn ? load_global(work + at / OTHER * p.lines + q) : 0.0f",
        "load_global(work + at / OTHER * p.lines + q)",
        "packed",
    ),
    # -- backward: ranges, elements
    backward(
        "the last own row has no others",
        "KEYS_OWN ? Kn : Qn) - 1, n = KEYS_OWN",
        "KEYS_OWN ? Kn : Qn) - 2, n = KEYS_OWN",
        "last_row_alone",
    ),
    backward(
        "a tile with one hidden row is full",
        "at >= range.first && at + OTHER <= range.last;",
        "at >= range.first - 1 && at + OTHER <= range.last + 1;",
        "tile_ends",
    ),
    backward(
        "rows in doubt are not marked",
        "if (HIDES && marked && lane() == 0) {",
        "if (HIDES && marked && lane() == 32) {",
        "second_look",
    ),
    backward("marks of the first queries", "mark + at / MARKED) != 0", "mark) != 0", "second_look"),
    backward("an element has no mark", "max_global((int*)p.flags + p.marks + e, 1);", "", "second_look"),
    backward(
        "an element of the first keys",
        "(int)(offset(head, p.outer, p.element) + offset(member, p.inner, p.element))",
        "(int)(offset(head, p.outer, p.element) + member)",
        "grouped",
    ),
    backward("one element of those that share keys", "member < p.members", "member < 1", "grouped"),
    backward("keys of the first sequence", "p.k.batch) + of_keys.start * p.k.row", "p.k.batch)", "packed"),
    backward("results of the first sequence", "p.dq.batch) + own.start * p.dq.row", "p.dq.batch)", "packed"),
    # -- gradients of operands
    backward(
        "sums are those of one lane", "float total = sum_of_row(own[i][s]);", "float total = own[i][s];", "bias_of_rows"
    ),
    backward("sums are not cleared for the next element", f"{SYNC}        clear();", SYNC, "grouped"),
    backward(
        "sums of one side",
        "for (int j = 0; j < SIDES_B; ++j) total +=",
        "for (int j = 0; j < 1; ++j) total +=",
        "bias_of_rows",
    ),
    backward(
        "a row behind the last has a gradient",
        "if (rows && own0 + r < own_n)",
        "if (rows && own0 + r <= own_n)",
        "bias_of_rows",
    ),
    backward(
        "a number's gradient is added by each thread",
        "if (!rows && thread_index() == 0)",
        "if (!rows && thread_index() < 32)",
        "bias_of_heads",
    ),
    backward(
        "gradients of elements outside of the matrix", "} else if (q < Qn && k < Kn) {", "} else {", "bias_of_all"
    ),
    backward(
        "the gradient of an element belongs to the next key",
        "col = OPERAND_COLUMNS[I] ? within(k, I, 1) : 0;",
        "col = OPERAND_COLUMNS[I] ? within(k ^ 1, I, 1) : 0;",
        "bias_of_all",
    ),
)

#: Those that run always.
SAMPLE = {
    "pieces of all rows lie in the same banks",
    "values are read before they are written",
    "sums do not fade",
    "a part is a tile short",
    "weights of the first tile are used for all",
    "sums are those of one lane",
    "gradients of scores have no delta",
}
_ALL = [(defect, capability) for defect in DEFECTS for capability in defect.capabilities]


def _marks(at: int, defect: Defect) -> list[pytest.MarkDecorator]:
    # one capability of each, in turn
    always = defect.name in SAMPLE and (len(defect.capabilities) == 1 or at % 2 == DEFECTS.index(defect) % 2)
    return [] if always else [pytest.mark.slow]


@pytest.fixture(autouse=True)
def _halves(monkeypatch):
    monkeypatch.setattr(kernel_cases, "DTYPE", torch.float16)


@pytest.mark.parametrize(
    ("defect", "capability"),
    [pytest.param(*each, id=f"{each[0].name}-{each[1]}", marks=_marks(at, each[0])) for at, each in enumerate(_ALL)],
)
def test_a_defect_is_caught(defect, capability):
    kernel = Emulated(capability, change=defect.change)
    with pytest.raises((AssertionError, EmulationError)) as found:
        CASES[defect.case](kernel, defect.backward)
    assert "the text is there" not in str(found.value)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [70, 75])
@pytest.mark.parametrize("name", CASES)
def test_without_a_defect_the_cases_pass(name, capability):
    CASES[name](Emulated(capability), True)


@pytest.mark.parametrize("backward", [False, True])
def test_what_defects_stand_for_is_in_the_text(backward):
    folder = ROOT / "kernels" / "volta"
    names = ("problem.cuh", "fragments.cuh", "backward.cuh" if backward else "forward.cuh")
    text = "".join((folder / name).read_text() for name in names)
    found = {defect.name: text.count(defect.old) for defect in DEFECTS if defect.backward == backward}
    assert found == {defect.name: defect.times for defect in DEFECTS if defect.backward == backward}


def test_names_are_of_one_defect_and_samples_are_there():
    names = [(defect.name, defect.backward) for defect in DEFECTS]
    assert len(set(names)) == len(names)
    assert {defect.name for defect in DEFECTS} >= SAMPLE and {defect.case for defect in DEFECTS} == set(CASES)
