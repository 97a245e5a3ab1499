"""The first minutes on a device, in stages, each kept as it comes: is it right, is it as fast as predicted, what to do next.

python3 -m benchmarks.first_run                      all stages, in eight minutes
python3 -m benchmarks.first_run --results FOLDER     the results elsewhere; a second run there goes on with what is missing
python3 -m benchmarks.first_run --only tests         stages: machine, forward, tests, variants, headlines
python3 -m benchmarks.first_run --device cpu --smoke a dry run in Triton's interpreter

machine    versions, the device, and what a product and a copy reach
forward    one plain forward pass against float64; if it fails, nothing follows but what is known of it
tests      tests/gpu on up to 16 processes, a result for each test
variants   kernels in many configurations, compared with float64, then timed beside the static model's prediction
headlines  benchmarks.gpu, in the minutes that are left

Needs torch and Triton, and pytest for the tests; nothing is installed. Every stage runs in processes of its own, which are
killed when their time is over. first_run.json and first_run.txt are written into the folder of results. The exit status is 1
if something is wrong or tests did not run, 2 without the device.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from benchmarks import results
from benchmarks.first import advice, worker
from benchmarks.first.kept import STAGES, Kept
from benchmarks.first.pool import Found, Pool, called

Row = dict[str, Any]

#: What stages have of the time, one against the other: what one leaves goes to those after it.
_SHARES = {"machine": 8, "forward": 8, "tests": 34, "variants": 28, "headlines": 22}
#: Seconds: for the one forward pass, as its process has started; a variant; what is told of the device; one look by a tool.
FORWARD, _VARIANT, _FACTS, _LOOK = 15.0, 75.0, 30.0, 60.0
#: Of the time of tests, what all of them may take before those that failed are looked at; of that of variants, checks.
_TESTS, _CHECKS = 0.8, 0.55
#: How many tests are looked at again, one by one.
_AGAIN = 6
_MOST_PROCESSES = 16
#: What compute-sanitizer begins its lines with.
_SANITIZER = "========="
_GPU, _LOG = "gpu.json", "headlines.log"
#: What the dry run runs of tests and headlines.
_SMOKE_TESTS = "tests/interpreted/test_descriptors.py -k test_few_queries_by_descriptors"
_SMOKE_HEADLINES = ("--smoke", "--budget", "0.001", "--shard", "next", "--only", "decode float16 forward B1")


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    given = list(sys.argv[1:] if arguments is None else arguments)
    # what follows two hyphens is pytest's
    split = given.index("--") if "--" in given else len(given)
    parser = argparse.ArgumentParser(
        prog="python3 -m benchmarks.first_run",
        description=(__doc__ or "").split("\n")[0],
        epilog="What follows -- goes to pytest.",
    )
    parser.add_argument("--results", type=Path, default=None, help="folder of results (default: that of the device)")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all stages together (default: 8)")
    parser.add_argument("--again", action="store_true", help="run what is there as well")
    parser.add_argument("--only", default=",".join(STAGES), help="comma-separated: the stages to run")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--smoke", "--dry-run", action="store_true", help="tiny shapes; for --device cpu")
    parser.add_argument("--jobs", type=int, default=None, help="processes (default: one a core, at most 16)")
    parser.add_argument("--test-limit", type=float, default=90.0, help="seconds that a test may take (default: 90)")
    parser.add_argument("--mark", default="gpu and not slow", help="pytest's -m (default: %(default)s)")
    parser.add_argument("--tests", default="", help="what pytest is given in place of tests/gpu and --mark")
    parser.add_argument("--shard", choices=("headline", "next"), default="headline", help="of benchmarks.gpu")
    args = parser.parse_args(given[:split])
    args.pytest = given[split + 1 :]
    args.only = tuple(results.listed(args.only))
    unknown = [stage for stage in args.only if stage not in STAGES]
    if unknown or not args.only:
        parser.error(f"--only takes some of {', '.join(STAGES)}, not {', '.join(unknown) or 'nothing'}")
    if args.device == "cpu" and not args.smoke:
        parser.error("--device cpu needs --smoke")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stages; the exit status."""
    args = parsed(arguments)
    before = signal.signal(signal.SIGTERM, _ended)
    try:
        return _run(args)
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(args: argparse.Namespace) -> int:
    run = Run(args)
    if run.facts.get("absent"):
        print(run.facts["absent"], file=sys.stderr)
        return 2
    try:
        run.all()
    except (SystemExit, KeyboardInterrupt):
        # told to end: what there is by now says something too
        run.finish()
        raise
    return run.finish()


def _ended(number: int, frame: FrameType | None) -> None:
    # as an exception, so that processes are killed on the way out
    sys.exit(128 + number)


class Run:
    """One run: it ends after args.minutes, and its file is whole at any time."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.started = time.monotonic()
        self.until = self.started + 60.0 * args.minutes
        self.width = args.jobs or min(os.cpu_count() or 1, _MOST_PROCESSES)
        self.interpreter: dict[str, str] = {}
        if args.device == "cpu":
            self.interpreter |= {"TRITON_INTERPRET": "1", "ATTNFUSE_KERNEL": "triton"}
            self.interpreter |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        # of processes side by side
        self.environment = {"TORCHINDUCTOR_COMPILE_THREADS": "1", **self.interpreter}
        self.facts = self.device_facts()
        if self.facts.get("absent"):
            return
        self.folder = (args.results or results.RESULTS / str(self.facts.get("slug", "unknown"))).absolute()
        told = {name: str(value) for name, value in vars(args).items()}
        self.kept = Kept(self.folder, self.facts, args.only if args.again else (), told)
        for stage, count in self.kept.dropped.items():
            why = "are left out by --again" if args.again else "are of other code, another device or other versions"
            self.say(f"{stage}: {count} results in {self.kept.path} {why}")

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.started:4.0f} s] {text}", flush=True)

    def all(self) -> None:
        """Run the chosen stages."""
        self.say(f"{self.facts.get('device', 'a device that tells nothing of itself')}: results in {self.folder}")
        stages: dict[str, Callable[[float], None]] = {
            "machine": self.machine,
            "forward": self.forward,
            "tests": self.tests,
            "variants": self.variants,
            "headlines": self.headlines,
        }
        for i, stage in enumerate(STAGES):
            if stage not in self.args.only:
                continue
            if advice.failure(self.kept.rows("forward").get("forward", {})) and i > STAGES.index("forward"):
                self.say(f"{stage}: not run, as one forward pass fails")
                continue
            later = sum(_SHARES[x] for x in STAGES[i:] if x in self.args.only)
            begun = time.monotonic()
            until = begun + max(self.until - begun, 0.0) * _SHARES[stage] / later
            self.kept.note(stage, broken=None)
            try:
                stages[stage](until)
            except Exception as error:
                # a mistake of a stage must not cost those after it; it fails the run
                self.kept.note(stage, broken=f"{type(error).__name__}: {error}", trace=traceback.format_exc())
                self.say(f"{stage} broke: {type(error).__name__}: {error}")
            self.kept.note(stage, took=round(time.monotonic() - begun, 1))

    def finish(self) -> int:
        """Say what the results come to; the exit status."""
        found = advice.advice(self.kept.content, self.args.only)
        path = self.kept.say(found.text, found.next)
        print(f"\n{found.text}\n\n{path}", flush=True)
        return 1 if found.wrong else 0

    # -- stages

    def machine(self, until: float) -> None:
        def ended(item: str, row: Row) -> None:
            self.kept.put("machine", item, row)
            figure = next(
                (f"{row[x]:.0f} {unit}" for x, unit in (("tflops", "TFLOP/s"), ("gbytes", "GB/s")) if x in row), ""
            )
            self.say(f"{item}: {advice.failure(row) or figure}")

        self._pool("machine", [*self.own("machine"), "ceilings"], ended, 1, _FACTS, until)

    def forward(self, until: float) -> None:
        # one that failed is tried again: nothing else can be done
        if "forward" in self.kept.rows("forward") and not advice.failure(self.kept.rows("forward")["forward"]):
            return
        self.kept.rows("forward").clear()
        rows: dict[str, Row] = {}
        command = [*self.own("machine"), "forward"]
        # the time of its process to start is beside its own
        latest = max(until, min(self.until, time.monotonic() + 4 * FORWARD))
        found = self._pool("forward", command, rows.__setitem__, 1, FORWARD, latest)
        row = rows.get("forward", {"failed": f"did not end: {found.why}"})
        why = advice.failure(row)
        if why:
            row["sanitizer"] = self._sanitized(command, self.until)
        self.kept.put("forward", "forward", row)
        self.say(f"forward: {why or 'right'}")

    def tests(self, until: float) -> None:
        if importlib.util.find_spec("pytest") is None:
            self.kept.note("tests", why="pytest is not installed")
            return
        count = {"passed": 0}

        def ended(item: str, row: Row) -> None:
            outcome = next((x for x in ("hung", "crashed") if x in row), None)
            if outcome:
                row = {**row, "outcome": outcome, "text": row[outcome]}
            elif "outcome" not in row:
                row = {**row, "outcome": "failed", "text": row["failed"]}
            self.kept.rows("tests").pop(item, None)
            self.kept.put("tests", item, row)
            if row["outcome"] in ("failed", "hung", "crashed"):
                self.say(f"{row['outcome']}: {item}: {row['text'][:160]}")
                return
            count["passed"] += 1
            if count["passed"] % 50 == 0:
                self.say(f"{count['passed']} tests passed or skipped")

        now = time.monotonic()
        found = self._pool(
            "tests", self._pytest(), ended, self.width, self.args.test_limit, now + _TESTS * (until - now)
        )
        for gone in set(self.kept.rows("tests")) - set(found.items) if found.items else ():
            del self.kept.rows("tests")[gone]
        self._again(ended, until)

    def _again(self, ended: Callable[[str, Row], None], until: float) -> None:
        """What fails is looked at alone: without others that take memory, then by compute-sanitizer."""
        rows = self.kept.rows("tests")
        failed = [name for name, row in rows.items() if row["outcome"] in ("failed", "crashed", "hung")]
        short = [
            name for name in failed if "out of memory" in f"{rows[name]['text']}{rows[name].get('trace', '')}".lower()
        ]
        for name in short[:_AGAIN]:
            if time.monotonic() < until and "alone" not in rows[name]:
                row = self._alone(name, until)
                ended(name, {**row, "alone": True} if row else {**rows[name], "alone": False})
        for name in [x for x in failed if rows[x]["outcome"] != "passed" and "sanitizer" not in rows[x]][:_AGAIN]:
            if time.monotonic() >= until:
                return
            told = self._sanitized(self._pytest(name, shared=False), until)
            if told is None:
                return
            self.kept.put("tests", name, {"sanitizer": told})
            self.say(f"compute-sanitizer: {name}: {told.splitlines()[0] if told else ''}")

    def _alone(self, name: str, until: float) -> Row | None:
        rows: dict[str, Row] = {}
        limit = self.args.test_limit
        Pool(
            self._pytest(name), rows.__setitem__, width=1, limit=limit, until=until, environment=self.environment
        ).run()
        return rows.get(name)

    def variants(self, until: float) -> None:
        def checked(item: str, row: Row) -> None:
            self.kept.put("variants", item, row)
            why = advice.failure(row)
            if why:
                self.say(f"{item}: {why[:160]}")

        def timed(item: str, row: Row) -> None:
            self.kept.put("variants", item, row)
            model = self.kept.rows("variants")[item].get("predicted", {})
            figures = f"{row['tflops']:.1f} TFLOP/s" if "tflops" in row else advice.failure(row)[:160]
            said = f"predicted {model['in_turn']:.0f} to {model['overlapped']:.0f}" if "in_turn" in model else ""
            self.say(f"{item}: {figures} {said}".rstrip())

        command = self.own("variants")
        now = time.monotonic()
        found = self._pool(
            "variants", [*command, "check"], checked, self.width, _VARIANT, now + _CHECKS * (until - now)
        )
        rows = self.kept.rows("variants")
        for gone in set(rows) - set(found.items) if found.items else ():
            del rows[gone]
        # what is wrong has no speed, and what has one is not timed again
        fit = [name for name in found.items if name in rows and not advice.failure(rows[name])]
        todo = [name for name in fit if "seconds" not in rows[name]]
        if todo:
            done = [name for name in found.items if name not in todo]
            pool = Pool(
                [*command, "time"],
                timed,
                width=1,
                limit=_VARIANT,
                until=until,
                done=done,
                environment=self.environment,
            )
            why = pool.run().why
            left = [name for name in todo if "seconds" not in rows[name] and not advice.failure(rows[name])]
            self.kept.note("variants", left=[*found.left, *left], why=found.why or why)

    def headlines(self, until: float) -> None:
        finished = self.kept.rows("headlines") and not self.kept.noted("headlines", "left")
        if finished and self.args.shard == "headline":
            return
        minutes = max(until - time.monotonic(), 0.0) / 60.0
        command = [sys.executable, "-m", "benchmarks.gpu", "--device", self.args.device, "--results", str(self.folder)]
        command += ["--minutes", f"{minutes:.3f}"]
        command += _SMOKE_HEADLINES if self.args.smoke else ("--shard", self.args.shard)
        command += ["--again"] if self.args.again else []
        # a row that takes longer than those before it is cut off; the file is whole after each
        status, text = called(command, until - time.monotonic(), self.interpreter)
        (self.folder / _LOG).write_text(text)
        path = self.folder / _GPU
        content = json.loads(path.read_text()) if path.exists() else {"rows": {}, "headlines": []}
        rows = {name: {"wrong": row.get("wrong", [])} for name, row in content["rows"].items()}
        stage: Row = {"rows": rows, "lines": content["headlines"], "failed": None}
        if status not in (0, 1, None):
            stage["failed"] = f"exit status {status}: {text[-600:].strip()}"
        stage["left"] = sorted(
            {line["row"] for line in content["headlines"] if line["row"] not in rows} if not self.args.smoke else ()
        )
        self.kept.note("headlines", **stage)
        self.say(f"headlines: {len(rows)} rows{', cut off' if status is None else ''}")

    # -- processes

    def own(self, module: str) -> list[str]:
        smoke = ["--smoke"] if self.args.smoke else []
        return [sys.executable, "-m", f"benchmarks.first.{module}", "--device", self.args.device, *smoke]

    def _pytest(self, test: str = "", shared: bool = True) -> list[str]:
        """pytest on all tests, or on one."""
        chosen = self.args.tests or (_SMOKE_TESTS if self.args.smoke else "")
        which = [test] if test else shlex.split(chosen) if chosen else ["tests/gpu", "-m", self.args.mark]
        plugin = ["-p", "benchmarks.first.plugin"] if shared else []
        # pytest's own summary has nobody who reads it, and its cache no place
        return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *plugin, *which, *self.args.pytest]

    def _pool(
        self,
        stage: str,
        command: list[str],
        ended: Callable[[str, Row], None],
        width: int,
        limit: float,
        until: float,
    ) -> Found:
        """The stage's items that have no row yet."""
        done, complete = list(self.kept.rows(stage)), shlex.join(command)
        if self.kept.noted(stage, "complete") == complete:
            return Found(done)
        pool = Pool(command, ended, width=width, limit=limit, until=until, done=done, environment=self.environment)
        found = pool.run()
        if found.why and (found.left or not found.items):
            self.say(f"{stage}: {len(found.left)} of {len(found.items)} left: {found.why}")
        done = "" if found.why else complete
        self.kept.note(stage, items=len(found.items), left=found.left, why=found.why, complete=done)
        return found

    def device_facts(self) -> Row:
        """What the device is. It is asked in every run: results are those of one device."""
        rows: dict[str, Row] = {}
        command = [*self.own("machine"), "facts"]
        until = min(self.until, time.monotonic() + 4 * _FACTS)
        found = Pool(command, rows.__setitem__, width=1, limit=_FACTS, until=until, environment=self.environment).run()
        row = {**rows.get("facts", {}), "dry": self.args.smoke}
        if found.why or advice.failure(row):
            return {"absent": f"nothing can be learnt of the device: {found.why or advice.failure(row)}"}
        return row

    def _sanitized(self, command: list[str], until: float) -> str | None:
        """What compute-sanitizer says of a command; None where there is no such tool or no time."""
        path = self.facts.get("tools", {}).get("compute-sanitizer")
        limit = min(_LOOK, until - time.monotonic())
        if path is None or limit <= 0:
            return None
        # memory that torch keeps for later is not out of bounds
        environment = {**self.environment, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        with tempfile.TemporaryDirectory(prefix="attnfuse-first-") as name:
            # a worker of no pool
            environment |= {worker.LINES: f"{name}/lines", worker.CLAIMS: name}
            status, text = called([path, "--tool", "memcheck", *command], limit, environment)
        lines = [line.removeprefix(_SANITIZER).strip() for line in text.splitlines() if line.startswith(_SANITIZER)]
        told = [line for line in lines if line and not line.startswith("COMPUTE-SANITIZER")][:12]
        return "\n".join(told) or (
            f"no end after {limit:.0f} s" if status is None else f"nothing, exit status {status}"
        )


if __name__ == "__main__":
    sys.exit(main())
