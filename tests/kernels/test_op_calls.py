"""Calls of the op itself: whose fault an error is, what is remembered of it, and every transform of a compiled function."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnfuse import kernels, ops
from attnfuse.expr import dense
from attnfuse.kernels import CPU, REFERENCE
from attnfuse.spec import Attention, Bias, Operand, ReplaceFill, Scale

Q, K, D, E = 7, 5, 8, 6
SPEC = Attention(
    ("B", "H"),
    (2, 3, Q, K, D, E),
    "float32",
    "float32",
    "float32",
    (Scale(0.3), Bias(0), ReplaceFill(dense(1), -torch.inf)),
    (Operand("float32", ("1", "H", "Q", "K")), Operand("bool", ("B", "1", "1", "K"))),
    hidden="zero",
    dropout=0.25,
)
FREE = replace(SPEC, sizes=(None,) * 6)


def arguments() -> dict[str, Any]:
    keep = torch.ones(2, 1, 1, K, dtype=torch.bool)
    keep[0, ..., 2] = False
    return {
        "q": torch.randn(2, 3, Q, D),
        "k": torch.randn(2, 3, K, D),
        "v": torch.randn(2, 3, K, E),
        "operands": [torch.randn(1, 3, Q, K), keep],
        "seed": torch.tensor([5]),
        "q_bounds": None,
        "k_bounds": None,
    }


def call(spec: Attention, given: dict[str, Any], kernel: str = "cpu", strict: bool = False) -> torch.Tensor:
    out, _ = torch.ops.attnfuse.attention(*given.values(), spec.text, kernel, strict)
    return out


# --- the caller's errors ----------------------------------------------------------------------------------------------


def _cut(name: str, dim: int) -> Callable[[dict[str, Any]], None]:
    def spoil(given: dict[str, Any]) -> None:
        given[name] = given[name].narrow(dim, 0, given[name].shape[dim] - 1)

    return spoil


def _cut_operand(index: int, dim: int) -> Callable[[dict[str, Any]], None]:
    def spoil(given: dict[str, Any]) -> None:
        x = given["operands"][index]
        given["operands"][index] = torch.cat([x, x], dim)

    return spoil


def _to(name: str, dtype: torch.dtype) -> Callable[[dict[str, Any]], None]:
    return lambda given: given.update({name: given[name].to(dtype)})


WRONG: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "keys of k": (_cut("k", 2), r"one number of keys"),
    "keys of v": (_cut("v", 2), r"one number of keys"),
    "head size of q": (_cut("q", 3), "one head size"),
    "head size of k": (_cut("k", 3), "one head size"),
    "heads of v": (_cut("v", 1), r"dim H of v .* must be"),
    "batch of k": (lambda g: g.update(k=torch.cat([g["k"]] * 2)), r"dim B of k .* must be"),
    "queries of a bias": (_cut_operand(0, 2), r"dim -2 of operand 0"),
    "keys of a mask": (_cut_operand(1, 3), r"dim -1 of operand 1"),
    "a mask that is not one for all heads": (
        lambda g: g["operands"].__setitem__(1, g["operands"][1].expand(2, 3, 1, K)),
        r"dim H of operand 1 .* must be 1",
    ),
    "rank": (lambda g: g.update(q=g["q"][0]), r"q must have the 4 dims of \[B, H, rows, columns\]"),
    "dtype of q": (_to("q", torch.bfloat16), r"q must be float32; got bfloat16"),
    "dtype of v": (_to("v", torch.float64), r"v must be float32; got float64"),
    "dtype of a mask": (
        lambda g: g["operands"].__setitem__(1, g["operands"][1].long()),
        r"operand 1 must be bool; got int64",
    ),
    "device": (lambda g: g.update(k=g["k"].to("meta")), "k is on meta, q on cpu"),
    "an operand less": (lambda g: g["operands"].pop(), "1 operands for a spec with 2"),
    "no operands": (lambda g: g.update(operands=None), "0 operands for a spec with 2"),
    "no seed": (lambda g: g.update(seed=None), "needs a seed"),
    "dtype of the seed": (lambda g: g.update(seed=torch.tensor([1.0])), "must be one int64"),
    "two seeds": (lambda g: g.update(seed=torch.tensor([1, 2])), "must be one int64"),
    "bounds of a dense layout": (lambda g: g.update(q_bounds=torch.zeros(2, 2, dtype=torch.int32)), "bounds of q"),
}


@pytest.fixture
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any) -> Any:
        raise AssertionError("a kernel ran")

    for kernel in (CPU, REFERENCE):
        for part in ("forward", "backward"):
            monkeypatch.setattr(kernel.load(), part, never)
    ops._loaded.clear()


@pytest.mark.parametrize("spec", [SPEC, FREE], ids=["known sizes", "any sizes"])
@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("later", [False, True], ids=["the first call", "after one that fits"])
def test_arguments_that_are_not_the_specs_are_a_value_error_before_any_kernel_runs(
    later: bool, wrong: str, spec: Attention, nothing_runs: None
) -> None:
    spoil, message = WRONG[wrong]
    if later:
        # what has been checked once is not checked again
        with pytest.raises(AssertionError, match="a kernel ran"):
            call(spec, arguments())
    given = arguments()
    spoil(given)
    with pytest.raises(ValueError, match=message):
        call(spec, given)
    assert not ops.failed


@given(name=st.sampled_from("qkv"), dim=st.integers(0, 3), size=st.integers(0, 9))
def test_a_size_that_does_not_fit_is_refused_and_one_that_does_runs(name: str, dim: int, size: int) -> None:
    spec, given = replace(FREE, steps=(Scale(0.3),), operands=(), dropout=0.0), arguments()
    given.update(operands=[], seed=None)
    shape = list(given[name].shape)
    shape[dim] = size
    given[name] = torch.randn(shape)
    q, k, v = (given[x] for x in "qkv")
    try:
        expected = (q @ k.mT * 0.3).softmax(-1) @ v
    except RuntimeError:
        with pytest.raises(ValueError, match="attnfuse: "):
            call(spec, given)
        return
    torch.testing.assert_close(call(spec, given), expected, rtol=1e-4, atol=1e-5)


def test_a_bad_call_leaves_the_next_one_on_its_kernel() -> None:
    given = arguments()
    with pytest.raises(ValueError, match="one number of keys"):
        call(FREE, {**given, "v": torch.randn(2, 3, K + 1, E)})
    with pytest.raises(ValueError, match="no kernel 'gpu'"):
        call(FREE, given, kernel="gpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        call(FREE, given, strict=True)
        call(FREE, given)
    assert not ops.failed


def test_backward_is_held_to_its_arguments_too(nothing_runs: None) -> None:
    given = arguments()
    out, stats = torch.empty(2, 3, Q, E), torch.empty(2, 2, 3, Q)
    needs = [True] * 3 + [False] * 2

    def back(dout: Any = out, stats: Any = stats, dlse: Any = None, needs: Any = needs, **more: Any) -> Any:
        return torch.ops.attnfuse.attention_backward(
            dout, dlse, *{**given, **more}.values(), out, stats, SPEC.text, "cpu", False, needs
        )

    for wrong, message in (
        ({"dout": out[..., 1:]}, "is not that of a result"),
        ({"stats": stats[:1]}, "statistics"),
        ({"dlse": torch.empty(2, 3, Q + 1)}, "log-sum-exp's gradient"),
        ({"needs": needs[:3]}, "5 inputs"),
        ({"v": given["v"][:, :, 1:]}, "one number of keys"),
    ):
        with pytest.raises(ValueError, match=message):
            back(**wrong)


# --- the kernel's errors ----------------------------------------------------------------------------------------------

OUT_OF_MEMORY = {
    "torch": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    "Python": MemoryError("no memory for the tiles of an attention"),
    "CPU": RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    "Windows": RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"),
}


class Failing:
    """Stands for the cpu kernel; raises `error` in the calls that `when` says, and counts them."""

    def __init__(self, error: BaseException, when: Callable[[int], bool] = lambda n: True) -> None:
        self.error, self.when, self.calls = error, when, 0

    def forward(self, *args: Any) -> Any:
        self.calls += 1
        if self.when(self.calls):
            raise self.error
        return CPU.load().forward(*args)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Failing]]:
    def put(error: BaseException, when: Callable[[int], bool] = lambda n: True) -> Failing:
        made = Failing(error, when)
        monkeypatch.setitem(ops._loaded, "cpu", made)
        return made

    yield put
    ops._loaded.clear()


@pytest.mark.parametrize("error", [*OUT_OF_MEMORY.values(), ValueError("sequences that share rows")], ids=str)
def test_an_error_of_one_call_is_forgotten_with_it(error: Exception, failing: Callable[..., Failing]) -> None:
    kernel, given = failing(error, lambda n: n in (1, 3)), arguments()
    with pytest.warns(RuntimeWarning, match="kernel 'reference' runs instead"):
        found = [call(FREE, given)]
    with warnings.catch_warnings():
        # one warning is enough
        warnings.simplefilter("error", RuntimeWarning)
        found += [call(FREE, given) for _ in range(3)]
    assert kernel.calls == 4 and not ops.failed
    for out in found[1:]:
        torch.testing.assert_close(out, found[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("error", OUT_OF_MEMORY.values(), ids=OUT_OF_MEMORY)
def test_out_of_memory_is_raised_where_the_reference_would_take_more(
    error: Exception, failing: Callable[..., Failing], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any) -> Any:
        raise AssertionError("the reference ran")

    monkeypatch.setattr(REFERENCE.load(), "forward", never)
    kernel = failing(error, lambda n: n == 1)
    x = torch.randn(1, 2, 500, 4)
    spec = Attention(("B", "H"), (None,) * 6, "float32", "float32", "float32", (Scale(1.0),))
    given = {"q": x, "k": x, "v": x, "operands": [], "seed": None, "q_bounds": None, "k_bounds": None}
    with pytest.raises(type(error), match=str(error)[:12].replace("[", r"\[")):
        call(spec, given)
    assert call(spec, given).shape == x.shape
    assert kernel.calls == 2 and not ops.failed


def test_a_failure_that_another_kernel_mends_is_remembered(failing: Callable[..., Failing]) -> None:
    kernel, given = failing(RuntimeError("the tiles fell off")), arguments()
    with pytest.warns(RuntimeWarning, match="the tiles fell off"):
        call(FREE, given)
    call(FREE, given)
    assert kernel.calls == 1
    assert list(ops.failed) == [("cpu", FREE.text, "cpu")]
    ops.forget()
    with pytest.warns(RuntimeWarning, match="the tiles fell off"):
        call(FREE, given)
    assert kernel.calls == 2


def test_a_call_that_no_kernel_runs_says_nothing_against_them(
    failing: Callable[..., Failing], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any) -> Any:
        raise RuntimeError("the reference too")

    kernel, given = failing(RuntimeError("the tiles fell off"), lambda n: n == 1), arguments()
    with monkeypatch.context() as patch:
        patch.setattr(REFERENCE.load(), "forward", broken)
        with pytest.raises(RuntimeError, match="the reference too"):
            call(FREE, given)
    assert not ops.failed
    call(FREE, given)
    assert kernel.calls == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3)], ids=["interrupt", "exit"])
def test_what_ends_the_program_passes_and_is_not_remembered(
    error: BaseException, failing: Callable[..., Failing]
) -> None:
    failing(error, lambda n: n == 1)
    with pytest.raises(type(error)):
        call(FREE, arguments())
    assert not ops.failed
    call(FREE, arguments())


def test_memory_of_a_failed_kernel_is_given_back_before_the_next_one_runs(
    failing: Callable[..., Failing], monkeypatch: pytest.MonkeyPatch
) -> None:
    import weakref

    held: list[Any] = []

    class Hungry:
        def forward(self, *args: Any) -> Any:
            scratch = torch.empty(1000)
            held.append(weakref.ref(scratch))
            raise MemoryError("no more")

    monkeypatch.setitem(ops._loaded, "cpu", Hungry())
    original = kernels.REFERENCE.load().forward

    def looking(*args: Any) -> Any:
        assert held[0]() is None
        return original(*args)

    monkeypatch.setattr(REFERENCE.load(), "forward", looking)
    with pytest.warns(RuntimeWarning, match="no more"):
        call(FREE, arguments())
    assert len(held) == 1
