"""Seeded defects: whether the tests still see what they are there to see. `make mutants` runs this; it is no part of CI.

Each of `DEFECTS` is a small fault in the product, with the tests that must fail by it. The tracked files are copied, the text
is replaced in the copy, and those tests run there with -x. A defect is caught if a test fails. An error while tests are
collected, a run without a test and one that takes too long catch nothing: the fault would be seen by anyone, or the tests that
are named are the wrong ones. Without a defect (`--clean`) the same tests must pass.

Add one where a fault would be silent, and so that the program still runs: a sign, a bound, a check that is forgotten, a
part of a key. `old` must be in its file once; `tests/house/test_mutants.py` holds the list to that.

The list found these survivors at first, and what sees each now:

    a maximum over another dim, a number divided by the scores,      near misses and examples of the idioms
        the factor of rsub, a causal mask that begins one late
    tensors of indices with a gap between them                       test_tensors_of_indices_are_read_at_the_same_elements
    an index one past the end of its table                           test_a_table_is_one_where_it_surely_has_every_index
    a mask that keeps one more place                                 test_what_only_looks_like_padding_stays[last_places]
    a norm over rows                                                 test_each_op_that_mixes_rows_leaves_the_padding
    two opposite bounds that leave a number out                      test_two_comparisons_of_one_sum_are_joined_as_numbers_are
    arguments of another dtype                                       test_arguments_that_are_not_the_specs_... after one that fits
    a library that is used again                                     test_a_library_is_named_for_every_file_that_is_compiled
    queries that see no key of a tile                                test_heads_that_share_keys_and_not_their_mask_with_few_queries
    queries that begin one late                                      test_the_first_and_last_rows_of_tiles_are_seen_whole
    a sum that stays in 32 bits                                      '31 bits' of WRAPPING in kernel_cases.py
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from repository import ROOT


@dataclass(frozen=True)
class Defect:
    """In `file` the text `new` stands for `old`. tests: files, or tests in them, that must fail; only: what -k takes.

    interpreted: the tests need Triton's interpreter.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    only: str = ""

    @property
    def interpreted(self) -> bool:
        return any(test.startswith("tests/interpreted") for test in self.tests)

    @property
    def compiles(self) -> bool:
        """Whether it is in what the C++ compiler reads."""
        return self.file.endswith((".h", ".cpp"))


DEFECTS = (
    # -- graph: moves, labels, products, memory, constants, names
    Defect(
        "a flip begins past the end",
        "passes/graph/moves.py",
        "Slice(d, own[d] - 1, -1)",
        "Slice(d, own[d], -1)",
        ("tests/passes/test_moves.py",),
        "where_it_comes_from",
    ),
    Defect(
        "a tile is labelled as an interleave",
        "passes/graph/views.py",
        "inner = isinstance(x, moves.Tile)",
        "inner = isinstance(x, moves.Interleave)",
        ("tests/passes/test_moves.py",),
        "labels_are_carried",
    ),
    Defect(
        "what is left of a split dim comes last",
        "passes/graph/labels.py",
        "queue.insert(0, inner)",
        "queue.append(inner)",
        ("tests/passes/test_moves.py",),
        "labels_are_carried",
    ),
    Defect(
        "the factors of baddbmm are exchanged",
        "passes/graph/contraction.py",
        "float(alpha), float(beta)",
        "float(beta), float(alpha)",
        ("tests/passes/test_idioms.py",),
        "bias and example_fuses_reads",
    ),
    Defect(
        "a tensor is stale only where its first reader comes after a write",
        "passes/graph/memory.py",
        "last = max((order[u] for u in node.users), default=-1)",
        "last = min((order[u] for u in node.users), default=-1)",
        ("tests/passes/test_aliasing.py",),
        "eager and not aot_eager",
    ),
    Defect(
        "a full tensor holds its number unrounded",
        "passes/graph/constants.py",
        "return number_in(torch.full((), number, dtype=dtype).item(), dtype)",
        "return number_in(number, dtype)",
        ("tests/passes/test_integer_masks.py", "tests/passes/test_masks.py"),
        "numbers",
    ),
    Defect(
        "a running sum counts as elementwise",
        "passes/graph/vocabulary.py",
        '*("rsub", "sub", "xlogy"),',
        '*("rsub", "sub", "xlogy", "cumsum"),',
        ("tests/passes/test_vocabulary.py",),
        "elementwise",
    ),
    # -- capture
    Defect(
        "the result of an opaque call lies in memory of its own",
        "passes/capture/recorder.py",
        "self._memory.join([node, *_keys_of(env[node]), *given])",
        "self._memory.join([node, *_keys_of(env[node])])",
        ("tests/passes/test_foreign.py",),
    ),
    Defect(
        "autograd records what runs under no_grad",
        "passes/capture/recorder.py",
        "grad = torch.is_grad_enabled()",
        "grad = True",
        ("tests/passes/test_aliasing.py", "tests/models/test_conditions.py"),
        "no_grad or without_grad",
    ),
    Defect(
        "a mapped dim comes back in front of the outer ones",
        "passes/capture/vmap.py",
        "to = len(levels) + dim % (have.rank + 1)",
        "to = dim % (have.rank + 1)",
        ("tests/passes/test_masks.py",),
        "vmap or spelling_is_read_as",
    ),
    # -- read
    Defect(
        "exp of a difference to the log-sum-exp is a softmax in every row",
        "passes/read/anchors.py",
        'return Anchor(scores, normed["dim"][0], node, inside, by_log_sum_exp=True)',
        'return Anchor(scores, normed["dim"][0], node, inside)',
        ("tests/passes/test_idioms.py",),
        "near_miss and sink",
    ),
    Defect(
        "a maximum over another dim is subtracted",
        "passes/read/maxima.py",
        "return (scores, frozenset(passed)) if over[0] % rank == dim % rank else None",
        "return scores, frozenset(passed)",
        ("tests/passes/test_idioms.py",),
        "near_miss and spelled",
    ),
    Defect(
        "a sink in front is taken for one behind",
        "passes/read/sinks.py",
        "return isinstance(taken, Slice) and taken.step == 1 and known_equal(taken.start, 1 if first else 0)",
        "return isinstance(taken, Slice) and taken.step == 1",
        ("tests/passes/test_idioms.py",),
        "sink",
    ),
    Defect(
        "any fill moves with the maximum of its row",
        "passes/read/peel.py",
        "return step.value <= BELOW_ALL_SCORES",
        "return True",
        ("tests/passes/test_sinks.py",),
        "passed_over",
    ),
    Defect(
        "a number divided by the scores is a factor",
        "passes/read/operands.py",
        'pairs = [(a, b)] if name == "div" else [(a, b), (b, a)]',
        "pairs = [(a, b), (b, a)]",
        ("tests/passes/test_idioms.py",),
        "scale and (near_miss or example_fuses_reads)",
    ),
    Defect(
        "a site may be partly under no_grad",
        "passes/read/isolation.py",
        "if any(view.grad.get(n, True) != grad for n in site.inside):",
        "if False:",
        ("tests/passes/test_aliasing.py", "tests/models/test_conditions.py"),
        "no_grad or without_grad",
    ),
    Defect(
        "a causal mask that begins one key late keeps a key in every row",
        "passes/read/fully_masked.py",
        'getattr(keep.args[1], "const", 0) >= 0',
        'getattr(keep.args[1], "const", 0) >= -1',
        ("tests/passes/test_idioms.py",),
        "near_miss and sink",
    ),
    Defect(
        "the factor of rsub is that of the other term",
        "passes/read/idioms/bias.py",
        '"rsub": (-alpha, 1.0)',
        '"rsub": (-1.0, alpha)',
        ("tests/passes/test_idioms.py",),
        "bias and example_fuses_reads",
    ),
    # -- masks
    Defect(
        "triu leaves out its diagonal",
        "passes/masks/terms.py",
        '"le" if name_of(node) == "tril" else "ge"',
        '"le" if name_of(node) == "tril" else "gt"',
        ("tests/passes/test_masks.py",),
        "spelling_is_read_as",
    ),
    Defect(
        "an integer need not fit its dtype",
        "passes/masks/terms.py",
        'if e.type == "int" and not expr.within(self.algebra.bounds(e), range_of(dtype)):',
        "if False:",
        ("tests/passes/test_integer_masks.py",),
    ),
    Defect(
        "tensors of indices with a gap between them stand where the first was",
        "passes/masks/terms.py",
        "first = at[0] if together else 0",
        "first = at[0]",
        ("tests/passes/test_moves.py",),
        "tensors_of_indices",
    ),
    Defect(
        "an index may be one past the end of its table",
        "passes/masks/structure.py",
        "if not isinstance(size, int) or low < 0 or high >= size:",
        "if not isinstance(size, int) or low < 0 or high > size:",
        ("tests/passes/test_masks.py",),
        "surely_has",
    ),
    Defect(
        "a running sum is that of the element at its end",
        "passes/masks/terms.py",
        'value = t.at(named["self"], (*index[:dim], anywhere, *index[dim + 1 :]), frozen)',
        'value = t.at(named["self"], index, frozen)',
        ("tests/passes/test_index_programs.py",),
        "index_arithmetic_is_read and False",
    ),
    # -- padding
    Defect(
        "a mask that keeps one more place tells the lengths",
        "passes/padding/sources.py",
        'e == reader.algebra.compare("lt", place, x)',
        'e in (reader.algebra.compare("lt", place, x), reader.algebra.compare("le", place, x))',
        ("tests/packing/test_padding.py",),
        "looks_like",
    ),
    Defect(
        "a norm over rows keeps them apart",
        "passes/padding/rowwise.py",
        'range(-len(arguments(node)["normalized_shape"]), 0)',
        "range(-1, 0)",
        ("tests/packing/test_padding_properties.py",),
        "mixes_rows",
    ),
    Defect(
        "the first row of a sequence is the last of the one before",
        "passes/padding/rewrite.py",
        '{"right": True}',
        '{"right": False}',
        ("tests/packing/test_padding.py",),
        "adds_to_its_rows",
    ),
    # -- emit
    Defect(
        "results of the graph are not the caller's to write to",
        "passes/emit/emitter.py",
        "if any(same_memory(n, site.final) for n in output.all_input_nodes):",
        "if False:",
        ("tests/models/test_regressions.py",),
        "edit",
    ),
    Defect(
        "a part of a tensor is read from its beginning",
        "passes/emit/writer.py",
        "node = self.call(torch.narrow, (node, at, start, self.size(length)))",
        "node = self.call(torch.narrow, (node, at, 0, self.size(length)))",
        ("tests/passes/test_masks.py",),
        "part_of_a_larger",
    ),
    Defect(
        "two values of one call may be one of another",
        "passes/emit/repeated.py",
        "found.setdefault(a, b) is b and back.setdefault(b, a) is a",
        "back.setdefault(b, a) is a",
        ("tests/passes/test_regions.py",),
    ),
    # -- attnfuse
    Defect(
        "of two opposite bounds that leave a number out, every number is in one",
        "attnfuse/expr.py",
        'if op == "or" and const + opposite[0] <= 1:',
        'if op == "or" and const + opposite[0] <= 2:',
        ("tests/house/test_expr.py",),
        "joined_as_numbers",
    ),
    Defect(
        "arguments of another dtype were checked already",
        "attnfuse/ops.py",
        "(None,) if x is None else (x.shape, x.dtype, x.device)",
        "(None,) if x is None else (x.shape, x.device)",
        ("tests/kernels/test_op_calls.py",),
        "not_the_specs",
    ),
    Defect(
        "a plan is taken for tensors with other strides",
        "kernels/triton/plans.py",
        "(x.shape, x.stride(), x.dtype, x.data_ptr()",
        "(x.shape, x.dtype, x.data_ptr()",
        ("tests/kernels/test_plans.py",),
        "its_own_kind",
    ),
    Defect(
        "sequences with gaps between them reach to the next one",
        "attnfuse/nested.py",
        "offsets[1:] if lengths is None else begin + lengths",
        "offsets[1:]",
        ("tests/user/test_nested.py",),
        "gaps",
    ),
    # -- kernels: the CPU's
    Defect(
        "a library is used again when decoding has changed",
        "kernels/cpu/build.py",
        '    "decode.h",\n',
        "",
        ("tests/kernels/test_kernel_cpu_build.py",),
        "every_file",
    ),
    Defect(
        "an operand that is read twice gets one of its gradients",
        "kernels/cpu/plan.py",
        "again = i >= 3 and used.count(i - 3) > 1",
        "again = False",
        ("tests/kernels/test_kernel_cpu.py",),
        "used_twice",
    ),
    Defect(
        "a tile at the first key of a window is taken for whole",
        "kernels/cpu/masks.h",
        "k0 >= plus(f.from_q, last) && k0 >= f.from) f.band = KEEPS_ALL;",
        "k0 >= plus(f.from_q, q0) && k0 >= f.from) f.band = KEEPS_ALL;",
        ("tests/kernels/test_kernel_cpu.py",),
        "masks_as_expressions_match or window",
    ),
    Defect(
        "queries that see no key of a tile weigh it with what was left there",
        "kernels/cpu/decode.h",
        "if (unseen[r / p.Q]) lo[r] = hi[r] = 0;",
        "if (unseen[r / p.Q] && r < p.Q) lo[r] = hi[r] = 0;",
        ("tests/kernels/test_kernel_cpu.py",),
        "few_queries",
    ),
    # -- kernels: Triton's
    Defect(
        "queries of a tile of keys begin one late",
        "kernels/program/module.py",
        'low.append(f"{first} - {x} + 1")',
        'low.append(f"{first} - {x} + 2")',
        ("tests/interpreted/test_kernel_triton.py",),
        "seen_whole",
    ),
    Defect(
        "full tiles of backward begin where a tile is full in part",
        "kernels/triton/template.py",
        "first = tl.minimum(tl.cdiv(tl.maximum(first, lo), SIZE) * SIZE, last)",
        "first = tl.minimum(tl.maximum(first, lo) // SIZE * SIZE, last)",
        ("tests/interpreted/test_kernel_triton.py",),
        "offsets",
    ),
    Defect(
        "tiles of a list are full where a mask may hide something",
        "kernels/triton/template.py",
        "full = some & sure & (start >= first) & (start + SIZE <= last)",
        "full = some & (start >= first) & (start + SIZE <= last)",
        ("tests/interpreted/test_tiles.py",),
        "in_full_tiles",
    ),
    Defect(
        "a list forgets the tiles of the chunks before",
        "kernels/triton/template.py",
        "edges += tl.sum(counts, 0)",
        "edges = tl.sum(counts, 0)",
        ("tests/interpreted/test_tiles.py",),
        "chunks_of_tiles",
    ),
    Defect(
        "gradients of queries that are added up lack the spec's factor",
        "kernels/triton/gradients.py",
        "return dq if call.traits.slope == 1.0 else",
        "return dq if True else",
        ("tests/interpreted/test_descriptors.py",),
        "one_pass",
    ),
    Defect(
        "a weight is taken without the scale that is left to the kernels",
        "kernels/triton/template.py",
        "p = tl.exp2(s * (FACTOR * LOG2E) - shift)",
        "p = tl.exp2(s * LOG2E - shift)",
        ("tests/interpreted/test_kernel_triton.py",),
        "taken_together",
    ),
    Defect(
        "a sum of indices stays in 32 bits up to twice their range",
        "kernels/program/traits.py",
        "return reach >= 2**31",
        "return reach >= 2**32",
        ("tests/interpreted/test_kernel_triton.py",),
        "wrap",
    ),
    Defect(
        "delta has no part of the log-sum-exp",
        "kernels/triton/template.py",
        "delta -= of_lse",
        "delta -= 0.0 * of_lse",
        ("tests/interpreted/test_kernel_triton.py",),
        "log_sum_exp or sinks",
    ),
    # -- kernels: the reference
    Defect(
        "the gradient of the log-sum-exp is taken off that of the weights",
        "kernels/reference/kernel.py",
        "less = part.of(delta if dlse is None else delta - dlse, -1).unsqueeze(-1)",
        "less = part.of(delta if dlse is None else delta + dlse, -1).unsqueeze(-1)",
        ("tests/kernels/test_kernel_reference.py",),
        "sinks_forward or add_up",
    ),
)

#: Minutes for all of them.
MINUTES = 45.0
#: Seconds for the tests of one; with a library to compile, and in the interpreter.
SECONDS, SECONDS_SLOW = 150.0, 240.0
CAUGHT = "caught"


@dataclass(frozen=True)
class Outcome:
    """verdict: 'caught', 'survived' or what went wrong; test: the first that failed."""

    defect: Defect
    verdict: str
    test: str
    seconds: float


def misplaced(defect: Defect, root: Path = ROOT) -> str:
    """Why the defect cannot be made in the tree; '' if it can."""
    path = root / defect.file
    if not path.is_file():
        return f"{defect.file} is no file"
    count = path.read_text().count(defect.old)
    if count != 1:
        return f"{defect.file} has the text {count} times: {defect.old!r}"
    if defect.old == defect.new:
        return "it changes nothing"
    gone = [test for test in defect.tests if not (root / test.split("::")[0]).is_file()]
    return f"there is no {', '.join(gone)}" if gone else ""


def copied(root: Path, to: Path) -> None:
    """The tracked files of the tree, links as links."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, check=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        source, target = root / name, to / name
        if source.is_symlink() or source.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target, follow_symlinks=False)


def commanded(defect: Defect) -> list[str]:
    """What runs its tests."""
    given = ["-x", "-q", "-p", "no:cacheprovider", "-m", "not slow and not gpu", *defect.tests]
    return [sys.executable, "-m", "pytest", *given, *(["-k", defect.only] if defect.only else [])]


def environment(defect: Defect, tree: Path, own: Path, shared: Path) -> dict[str, str]:
    """own: a folder of this run alone; shared: one of all runs, for what no defect reaches."""
    found = {
        **os.environ,
        "PYTHONPATH": str(tree),
        "ATTNFUSE_CACHE_DIR": str(own if defect.compiles else shared),
        "TORCHINDUCTOR_CACHE_DIR": str(own / "inductor"),
        # a failure is enough: nobody reads the smallest example
        "HYPOTHESIS_PROFILE": "mutants",
    }
    if defect.interpreted:
        found |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return found


def run(defect: Defect, shared: Path, clean: bool = False) -> Outcome:
    """The tests of a defect in a copy that has it; clean: that has it not."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="attnfuse-mutant-") as folder:
        tree, own = Path(folder, "tree"), Path(folder, "own")
        own.mkdir(mode=0o700)
        copied(ROOT, tree)
        if not clean:
            path = tree / defect.file
            path.write_text(path.read_text().replace(defect.old, defect.new))
        limit = SECONDS_SLOW if defect.compiles or defect.interpreted else SECONDS
        # a folder for what is printed: a pipe would be waited for as long as any process of the tests holds it
        with open(own / "printed", "w+") as printed:
            process = subprocess.Popen(
                commanded(defect),
                cwd=tree,
                env=environment(defect, tree, own, shared),
                stdout=printed,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            code: int | None = None
            try:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    code = process.wait(limit)
            finally:
                # also where this program is interrupted; what the tests have started is of the same group
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            printed.seek(0)
            verdict, test = judged(code, printed.read())
    return Outcome(defect, verdict, test, time.monotonic() - start)


def judged(code: int | None, printed: str) -> tuple[str, str]:
    """The verdict on a run of pytest that ended with `code` (None: it took too long), and the test that failed first."""
    lines = printed.splitlines()
    failed = next((line for line in lines if line.startswith("FAILED ")), "")
    if code is None:
        return "too slow", ""
    if code == 0:
        return "survived", ""
    if code == 1 and failed:
        return CAUGHT, failed.removeprefix("FAILED ").split(" - ")[0]
    if code == 5:
        return "no test ran", ""
    error = next((line for line in lines if line.startswith(("ERROR ", "E  "))), lines[-1] if lines else "")
    return f"error {code}", error.strip()


def listed(defects: Iterable[Defect]) -> None:
    for defect in defects:
        only = f" -k {shlex.quote(defect.only)}" if defect.only else ""
        print(f"{defect.name}\n    {defect.file}: {' '.join(defect.tests)}{only}")


def table(outcomes: Sequence[Outcome]) -> None:
    print("\n| defect | file | seconds | verdict | by |\n|---|---|---|---|---|")
    for x in outcomes:
        print(f"| {x.defect.name} | `{x.defect.file}` | {x.seconds:.0f} | {x.verdict} | {x.test} |")


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the tests that must fail by each seeded defect.")
    parser.add_argument("--only", metavar="NAME", action="append", help="defects whose name or file has this in it")
    parser.add_argument("--list", action="store_true", help="show the defects and run nothing")
    parser.add_argument("--clean", action="store_true", help="run the same tests without any defect: they must pass")
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="defects that are not begun by then are not run")
    given = parser.parse_args()
    wanted = given.only or [""]
    defects = [d for d in DEFECTS if any(part in d.name or part in d.file for part in wanted)]
    if given.list:
        listed(defects)
        return 0
    problems = [f"{d.name}: {problem}" for d in DEFECTS if (problem := misplaced(d))]
    if problems or not defects:
        print("\n".join(problems) or "no defect of that name")
        return 2
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="attnfuse-mutants-") as shared, ThreadPoolExecutor(given.jobs) as pool:

        def one(defect: Defect) -> Outcome:
            if time.monotonic() - start > 60.0 * given.minutes:
                return Outcome(defect, "not run", "", 0.0)
            outcome = run(defect, Path(shared), given.clean)
            print(f"{outcome.seconds:4.0f} s  {outcome.verdict:<9}  {defect.name}  {outcome.test}", flush=True)
            return outcome

        # an interrupt reaches what runs here, and not what runs in a thread
        outcomes = list((map if given.jobs == 1 else pool.map)(one, defects))
    table(outcomes)
    right = "survived" if given.clean else CAUGHT
    wrong = [x for x in outcomes if x.verdict != right]
    minutes = (time.monotonic() - start) / 60.0
    what = "passed" if given.clean else CAUGHT
    print(f"\n{len(outcomes) - len(wrong)} of {len(outcomes)} {what}, in {minutes:.1f} minutes")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
