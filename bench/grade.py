"""How long grading takes, and whether it stays the same: python bench/grade.py [--data FILE.jsonl] [--soak N].

A grade is `Grader.programs` of one program; its run without the observation of the first call is timed too.
Everything is measured in one run, in turns with `python -I -S -c pass` on the same machine. FILE is a problem file of
the public LeetCode release. Prints a table and, with --json, writes the numbers.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path

from machine import machine
from rich.console import Console
from rich.table import Table

from vgrout.envs.grade import Grader, job_of
from vgrout.envs.jobs import LIMITS, Job
from vgrout.envs.leetcode import load
from vgrout.envs.micro import HEAD, problems
from vgrout.envs.micro_env import ask
from vgrout.envs.modes import MODES
from vgrout.envs.problems import prompt_of
from vgrout.envs.sandbox import Sandbox
from vgrout.types import Problem, Prompt

PROGRAM = "class Solution:\n    def f(self, a, b):\n        return a {} b"
RIGHT, WRONG = PROGRAM.format("+"), PROGRAM.format("-")
ADD = Problem("add", "Add.", "Solution.f", RIGHT, (((2, 3), 5),), (((4, 5), 9),), mode="run_tests")
BARE = [sys.executable, "-I", "-S", "-c"]
BUSY = "x = 0\nwhile True: x += 1"
HOSTILE = (  # each is over in no time, and leaves the wrong answer
    "import os\nos.fork()",
    "import os\nos._exit(0)",
    "import os\nos.kill(os.getppid(), 9)",
    "import os\nos.kill(os.getpid(), 11)",
    "import os\nwhile True: os.open('.', 0)",
    "import os\nfor fd in range(3, 32): os.write(fd, b'5')",
    "import threading\nthreading.Thread(target=print).start()",
    "for i in range(64): open(str(i), 'w').write('x' * 65536)",
    "x = bytearray(8 << 30)",
    "print('x' * 10**7)",
    "def g(): g()\ng()",
    "import gc\nfor x in gc.get_objects(): x.clear()",
)
ROUNDS, EACH = 15, 40
NEAR = 0.7  # of the CPU time that a program has
REPEATS, LOADED = 5, 2
EQUAL = f"verdicts equal over {REPEATS} repeats, {LOADED} of them loaded"
_numbers = count()


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def trivial(sources: Sequence[str]) -> list[tuple[Problem, Prompt, str]]:
    """Something to grade for each program; no two programs are equal, so none is known already."""
    prompt = prompt_of(ADD)
    return [(ADD, prompt, f"{source}  # {next(_numbers)}") for source in sources]


def overhead(one: Sandbox, two: Sandbox) -> dict:
    """Milliseconds of a trivial grade and its parts, one at a time and in batches, in turns with a bare interpreter."""
    bare, single, values, batch = [], [], [], []
    for _ in range(ROUNDS):
        bare.append(seconds(lambda: subprocess.run([*BARE, "pass"], check=True)))
        for _ in range(EACH):
            item, (*_, source) = trivial([RIGHT] * 2)
            job = job_of(ADD, source)
            single.append(seconds(lambda item=item: Grader(one).programs([item])))
            values.append(seconds(lambda job=job: one.run([job])))
        items = trivial([RIGHT] * 8 * EACH)
        batch.append(seconds(lambda items=items: Grader(two).programs(items)) / len(items))
    ms = {
        "python -I -S -c pass": bare,
        "trivial grade": single,
        "without observation": values,
        "trivial grade in a batch, 2 workers": batch,
    }
    return {name: 1000 * statistics.median(times) for name, times in ms.items()}


def timed(problem) -> Job:
    """The canonical program; each call answers with its own CPU seconds."""
    owner, _, name = problem.entry.rpartition(".")
    call = f"{owner}().{name}" if owner else name
    clock = f"def _timed(*a, **k):\n    t = _now()\n    {call}(*a, **k)\n    return _now() - t\n"
    source = f"{problem.canonical}\nfrom time import thread_time as _now\n{clock}"
    inputs = tuple(args for args, _ in problem.reward_tests + problem.oracle_tests)
    return Job(source, "_timed", inputs, setup=problem.setup, cpu_s=60.0)


def throughput(sandbox: Sandbox, chosen: Sequence[Problem], workers: int) -> dict:
    """Canonical programs over all their tests, against the bound that the tests' own CPU time sets: whole grades, and
    runs without observation."""
    own = sum(sum(v for v in r.values if type(v) is float) for r in sandbox.run([timed(p) for p in chosen]))
    chosen = [replace(p, cpu_s=60.0) for p in chosen]
    jobs = [job_of(p, p.canonical) for p in chosen]
    items = [(p, prompt_of(p), p.canonical) for p in chosen]
    assert all(verdict.solved for verdict in Grader(sandbox).programs(items))
    wall = min(seconds(lambda: sandbox.run(jobs)) for _ in range(3))
    graded = min(seconds(lambda: Grader(sandbox).programs(items)) for _ in range(3))
    return {
        "problems": len(chosen),
        "tests": sum(len(job.inputs) for job in jobs),
        "tests' own CPU, s": own,
        "bound, programs/s": workers * len(chosen) / own,
        "without observation, programs/s": len(chosen) / wall,
        "grades, programs/s": len(chosen) / graded,
        "without observation, share of the bound": own / workers / wall,
        "grades, share of the bound": own / workers / graded,
    }


def near_budget(problem: Problem) -> str:
    """The canonical micro program, which takes `NEAR` of its CPU time first."""
    return (
        f"{problem.canonical}\nfrom time import thread_time\nright = Solution.solve\ndef late(self, *a):\n"
        f"    while thread_time() < {NEAR * LIMITS.cpu_s}: pass\n    return right(self, *a)\nSolution.solve = late\n"
    )


@contextmanager
def every_core_busy() -> Iterator[None]:
    """One spinning process bound to each core."""
    spinners = []
    try:
        for core in os.sched_getaffinity(0):
            spinners.append(subprocess.Popen([*BARE, BUSY]))
            os.sched_setaffinity(spinners[-1].pid, {core})
        yield
    finally:
        for process in spinners:
            process.kill()
            process.wait()


def steady(sandbox: Sandbox) -> bool:
    """Whether verdicts are equal over the repeats, the last of them with every core loaded: right programs, hacks, some
    that take `NEAR` of their CPU time and pass, some that would never end."""
    chosen = [(p, ask(p, "train")) for p in problems("train")[:16]]
    near = [(p, prompt, near_budget(p)) for p, prompt in chosen[:4]]
    items = near + [(p, prompt, BUSY) for p, prompt in chosen[:2]]
    items += [(p, prompt, p.canonical) for p, prompt in chosen]
    items += [(p, prompt, MODES[p.mode].hack(HEAD, "return 0", prompt.marker)) for p, prompt in chosen]
    records = []
    for repeat in range(REPEATS):
        with every_core_busy() if repeat >= REPEATS - LOADED else nullcontext():
            verdicts = Grader(sandbox).programs(items)
        assert all(v.solved for v in verdicts[: len(near)])
        records.append(json.dumps([{k: v for k, v in asdict(v).items() if k != "cpu_s"} for v in verdicts]))
    return len(set(records)) == 1


def soak(sandbox: Sandbox, grades: int) -> dict:
    """Memory and descriptors of the server and of this process before and after many grades: right, wrong and hostile
    programs in turns."""

    def state() -> dict:
        who_is = {"server": sandbox.pid, "parent": os.getpid()}
        pages = {who: int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for who, pid in who_is.items()}
        fds = {f"{who} descriptors": len(os.listdir(f"/proc/{pid}/fd")) for who, pid in who_is.items()}
        return {f"{who} MiB": n * os.sysconf("SC_PAGE_SIZE") / 2**20 for who, n in pages.items()} | fds

    sources = [source for before in HOSTILE for source in (RIGHT, WRONG, f"{before}\n{WRONG}")]

    def work(grades: int) -> None:
        for _ in range(-(-grades // (10 * len(sources)))):
            verdicts = Grader(sandbox).programs(trivial(10 * sources))
            assert [v.solved for v in verdicts] == [source is RIGHT for source in 10 * sources]

    work(6000)  # fills caches
    before, server = state(), sandbox.pid
    work(grades)
    after = state()
    assert sandbox.pid == server, "the server was replaced"
    return {name: [round(before[name], 1), round(after[name], 1)] for name in before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--soak", type=int, default=20_000)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    console = Console()
    result: dict = {"machine": machine()}
    with Sandbox() as one, Sandbox(workers=2) as two:
        result["tier"] = one.tier
        result["milliseconds"] = overhead(one, two)
        result["micro"] = throughput(two, problems("test"), 2)
        if args.data:
            result["leetcode"] = throughput(two, load(args.data).problems, 2)
        result[EQUAL] = steady(two)
        result[f"soak of {args.soak} grades: before, after"] = soak(one, args.soak)
    table = Table(title=", ".join(f"{k} {v}" for k, v in result["machine"].items()), caption=result["tier"])
    for column in ("what", "value", "/ python -I -S -c pass"):
        table.add_column(column, justify="left" if column == "what" else "right")
    bare = result["milliseconds"]["python -I -S -c pass"]
    for name, value in result["milliseconds"].items():
        table.add_row(f"{name}, ms", f"{value:.2f}", f"{value / bare:.2f}")
    rate = 1000 / result["milliseconds"]["trivial grade in a batch, 2 workers"]
    table.add_row("trivial grades/s, 2 workers", f"{rate:.0f}", f"{rate * bare / 1000:.1f} per start")
    for section in [k for k in result if isinstance(result[k], dict) and k not in ("machine", "milliseconds")]:
        table.add_section()
        for name, value in result[section].items():
            shown = f"{value:.3g}" if isinstance(value, float) else str(value)
            ratio = f"{value * bare / 1000:.2f} per start" if name.endswith("/s") else ""
            table.add_row(f"{section}: {name}", shown, ratio)
    table.add_row(EQUAL, str(result[EQUAL]), "")
    console.print(table)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
