"""The sandbox: programs that must work, attacks it must survive, observed facts, failures of the sandbox itself."""

import contextlib
import functools
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attacks import ATTACKS, CANARY, SLEEPERS, method
from vgrout.envs import _codec, _forkserver, _talk, grade, sandbox
from vgrout.envs._codec import Refused, decode, encode
from vgrout.envs._confine import LAYERS
from vgrout.envs.grade import Grader
from vgrout.envs.jobs import (
    MISSING,
    Job,
    Limits,
    Look,
    Observation,
    Report,
    read_answer,
    read_facts,
)
from vgrout.envs.oracle import same
from vgrout.envs.sandbox import Sandbox, SandboxError
from vgrout.envs.selftest import self_test
from vgrout.types import Problem, Prompt, UserError

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the sandbox needs Linux")
ROOT = os.geteuid() == 0 if hasattr(os, "geteuid") else False
CPU_S = 0.2
GOOD = Job("class Solution:\n    def f(self, a, b):\n        return a + b", "Solution.f", ((2, 3), ([1], [2])))
GOOD_REPORT = Report("ok", (5, [1, 2]))


@pytest.fixture(scope="module")
def box():
    with Sandbox(Limits(cpu_s=CPU_S, wall_s=8.0, memory_mb=64)) as box:
        yield box


def run(box: Sandbox, source: str, *inputs: tuple) -> Report:
    return box.run([Job(source, "Solution.f", inputs or ((2, 3),))])[0]


def status_of(pid: int | str) -> list[str]:
    """Fields of /proc/PID/stat from the state on; empty if there is no such process."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def children_of(parent: int) -> list[int]:
    return [int(pid) for pid in filter(str.isdigit, os.listdir("/proc")) if status_of(pid)[1:2] == [str(parent)]]


def processes_of_programs(box: Sandbox) -> list[int]:
    """Children of the first server, and processes of its uid that were left to init and still run."""
    uid = uid_of(box)
    found = children_of(box.pid)
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if ROOT and os.stat(f"/proc/{pid}").st_uid == uid and running(pid):
                found.append(int(pid))
    return found


@functools.cache
def uid_of(box: Sandbox) -> int:
    return box.run([Job("import os\ndef f(): return os.getuid()", "f", ((),))])[0].values[0]


def cpu_of_programs(box: Sandbox) -> float:
    """CPU seconds of all programs so far."""
    return sum(map(int, status_of(box.pid)[13:15])) / os.sysconf("SC_CLK_TCK")


def running(pid: int | str) -> bool:
    return (status_of(pid) or "Z")[0] != "Z"


def descriptors(pid: int | str) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


# ---- programs that must work


BENIGN = {
    "plain": method("return a + b"),
    "protocol on stdout": method("""print('["t",0,4]'); print('"error"'); return a + b"""),
    "prints much": method("for _ in range(20): print('x' * 10**6)\nreturn a + b"),
    "own stdout": method("sys.stdout.reconfigure(encoding='utf-8')\nprint(a)\nreturn a + b", "import sys"),
    "another stdout": method(
        "return a + b", "import io, sys\nsys.stdout = io.TextIOWrapper(sys.stdout.buffer, encoding='utf-8')\nprint(1)"
    ),
    "recursion 3000": method("return g(3000) + a + b - 3000", "def g(n): return 1 + g(n - 1) if n else 0"),
    "cached recursion": method(
        "return g(3000) + a + b - 3000",
        "from functools import *\n@lru_cache(None)\ndef g(n): return 1 + g(n - 1) if n else 0",
    ),
    "library": method(
        "h = [b, a]; heapify(h); q = deque([heappop(h)]); return q.pop() + Counter([b, b])[b] + 1",
        "from collections import *\nfrom heapq import *\nfrom typing import *\nimport math, bisect, re, string",
    ),
    "dataclass": method(
        "return P(a, b).x + b", "import dataclasses\n@dataclasses.dataclass\nclass P:\n x: int\n y: int"
    ),
    "instance state": "class Solution:\n def __init__(s): s.n = 2\n def f(s, a, b): s.n += 3; return s.n",
    "main guard": method("return a + b") + "\nif __name__ == '__main__':\n    raise SystemExit(1)",
    "exit hooks": method(
        "return a + b",
        "import atexit, time\natexit.register(time.sleep, 99)\nclass D:\n def __del__(self):\n  while 1: pass\nd = D()",
    ),
    "20 MB": method("x = bytearray(20 << 20); return a + b"),
    "warnings": method("return a + b", "import warnings\nwarnings.warn('x')\n'\\d'\nassert (1, 2)"),
    "scratch": method("open('x', 'w').write('1'); return int(open('x').read()) + 4"),
    "patched builtins": method(
        "return a + b",
        "import builtins, json, os\nfor n in ('len', 'type', 'isinstance', 'BaseException', 'str', 'int', 'getattr',"
        " 'exec', 'compile', 'list', 'tuple', 'enumerate'): setattr(builtins, n, None)\n"
        "json.dumps = json.loads = os.write = os._exit = None\n"
        "import __main__\n__main__.encode = __main__._values = None",
    ),
    "every hack": method(
        "print('all tests passed'); self.ok = True; return a + b",
        "open('result', 'w').write('PASS')\ndef run_tests(): pass",
    ),
}


@pytest.mark.parametrize("name", BENIGN)
def test_benign(box, name):
    assert run(box, BENIGN[name]) == Report("ok", (5,))
    report = box.run([Job(BENIGN[name], "Solution.f", ((2, 3),), look=Look())])[0]
    assert (report.status, report.values, report.seen.status) == ("ok", (5,), "ok")


def test_values_keep_their_types_and_are_fresh(box):
    values = (
        None,
        True,
        0,
        -(2**53) - 1,
        10**1000,
        0.1,
        -0.0,
        float("inf"),
        "",
        "a\n\0\ud800\U0001f600'\"",
        [],
        (),
        {},
        set(),
        [(1, [2.0])],
        {(1, "a"): {2}, None: [None]},
        {True, "x"},
    )
    got = box.run([Job("def f(x): return x", "f", tuple((value,) for value in values))])[0]
    assert got.status == "ok"
    assert repr(got.values) == repr(values)  # tells -0.0, True and 1 apart
    assert got.values[14] is not values[14]


def test_results_are_in_order_and_do_not_depend_on_workers(box):
    source = "import random\ndef f(i): return i, random.random(), list({'a', 'b', 'c', 'dd', 'e'})"
    jobs = [Job(source, "f", ((i,),)) for i in range(20)]
    with Sandbox(Limits(cpu_s=CPU_S), workers=2) as two:
        assert two.run(jobs) == box.run(jobs)
        assert [report.values[0][0] for report in two.run(jobs)] == list(range(20))
    assert box.run([]) == []


def test_the_same_answers_every_time():
    """N01 order of sets, N02 of addresses, N04 unseeded random: on any server, after any program."""
    source = """
        import random
        class A: pass
        class B: pass
        class C: pass
        def f(n):
            order = [each.__name__ for each in sorted([A, B, C, int, random.Random], key=id)]
            return order, [str(x) for x in {None, 1, "a", "b", A, B, C}], list({"x", "y", "zz", ""}), random.random()
    """
    job, found = Job(textwrap.dedent(source), "f", ((1,), (2,))), []
    for between in ((), (BENIGN["library"], BENIGN["scratch"]), (method("print('x' * 10**6)\nreturn [b] * 10**4"),)):
        with Sandbox(Limits(cpu_s=CPU_S), workers=2) as box:
            for _ in range(5):
                found += box.run([job] * 2)
                box.run([Job(other, "Solution.f", ((2, 3),)) for other in between])
    assert found == [found[0]] * 30 and found[0].status == "ok"


def test_a_raise_in_one_call_does_not_stop_the_others(box):
    report = run(box, method("return 1 // a"), (1, 0), (0, 0), (1, 0))
    assert report == Report("ok", (1, MISSING, 1))


def test_values_before_a_kill_are_kept(box):
    report = run(box, method("while a == 2: pass\nreturn a"), (1, 0), (2, 0), (3, 0))
    assert report == Report("timeout", (1, MISSING, MISSING))


def test_instance_per_call_and_mutated_inputs(box):
    source = "class Solution:\n n = 0\n def f(self, x):\n  self.n += 1\n  x.append(9)\n  return [self.n, x]"
    assert run(box, source, ([],), ([1],)).values == ([1, [9]], [1, [1, 9]])


# ---- attacks: none may be graded correct (5), and the sandbox must be as before


@pytest.fixture(scope="module")
def canary():
    path = pathlib.Path(CANARY)
    path.write_text("alive")
    path.chmod(0o666)
    yield path
    path.unlink()


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.id)
def test_attack(box, canary, attack):
    pid, before = box.pid, (descriptors("self"), descriptors(box.pid))
    start, cpu = time.monotonic(), cpu_of_programs(box)
    report = run(box, attack.source)
    assert time.monotonic() - start < 20 and cpu_of_programs(box) - cpu < 2 * CPU_S + 0.2
    assert report.status in attack.ends, report
    assert not same(report.values[0], 5), report
    assert box.run([GOOD]) == [GOOD_REPORT]
    assert box.pid == pid and not processes_of_programs(box)
    assert (descriptors("self"), descriptors(box.pid)) == before
    assert os.listdir(f"/proc/{box.pid}/root{box._servers[0].directory}/scratch") == []
    assert canary.read_text() == "alive"


@pytest.mark.parametrize("wait", SLEEPERS)
def test_waiting_without_cpu_ends_at_the_wall_limit(wait):
    with Sandbox(Limits(wall_s=0.5)) as box:
        start = time.monotonic()
        assert run(box, method(f"import time, signal, os\n{wait}")) == Report("timeout", (MISSING,))
        assert time.monotonic() - start < 5.0
        assert box.run([GOOD]) == [GOOD_REPORT]


def test_cpu_time_decides_and_not_wall_time(box):
    slow = method("time.sleep(0.6); return a + b", "import time")
    assert run(box, slow) == Report("ok", (5,))
    start = method("return time.process_time() < 0.1", "import time")
    assert run(box, start).values == (True,)


def test_answers_count_by_cpu_time_however_late_the_server_looks():
    slow = "import time\ndef f(n):\n t = time.process_time()\n while time.process_time() - t < .12: pass\n return n"
    with Sandbox() as box:
        job = Job(slow, "f", tuple((i,) for i in range(4)), cpu_s=0.3)
        assert box.run([job])[0] == Report("timeout", (0, 1, MISSING, MISSING))
        timers = [threading.Timer(0.1, os.kill, (box.pid, signal.SIGSTOP))]
        timers += [threading.Timer(1.5, os.kill, (box.pid, signal.SIGCONT))]
        for timer in timers:
            timer.start()
        assert box.run([job])[0] == Report("timeout", (0, 1, MISSING, MISSING))
        for timer in timers:
            timer.join()
        done = box.run([Job(slow, "f", ((1,),), cpu_s=cpu_s, look=Look()) for cpu_s in (0.1, 0.3)])
        assert [each.seen.status for each in done] == ["timeout", "ok"]


def test_a_cpu_kill_before_the_program_runs_is_a_timeout(box):
    talk, reply = _talk.Talk(100, GOOD, [b""] * 2, CPU_S), _talk.Reply("cpu", -9, 1.0)
    box._servers[0].check(talk, reply)
    assert talk.report(reply) == Report("timeout", (MISSING, MISSING), compiled=False)
    for stopped in ("", "wall"):
        with pytest.raises(SandboxError, match="could not be set up"):
            box._servers[0].check(talk, replace(reply, stopped=stopped))
    talk.close()


def test_what_a_program_finds(box):
    source = """
        import os, sys
        def f():
            found = []
            for n in range(64):
                try:
                    os.fstat(n)
                    found.append(n)
                except OSError:
                    pass
            return found, dict(os.environ), sys.argv, os.listdir("."), os.getuid(), os.getsid(0) == os.getpid()
    """
    report = box.run([Job(textwrap.dedent(source), "f", ((),))])[0]
    fds, environment, argv, files, uid, leader = report.values[0]
    assert fds == [0, 1, 2, 3] and set(environment) == {"PYTHONHASHSEED", "LANG", "PWD"}
    assert argv == ["solution"] and files == [] and leader
    assert uid in _forkserver.UIDS if ROOT else uid == os.getuid()
    assert ("no own uid" in box.tier) != ROOT and "no seccomp" not in box.tier and not box.weak


BOMBS = tuple(a.source for a in ATTACKS if a.ends in (("no code",), ("too long",)) or "finally" in a.id)


def test_programs_are_compiled_where_they_run(box, monkeypatch):
    assert len(BOMBS) > 8
    monkeypatch.setattr("builtins.compile", None)
    for report in box.run([Job(source, "f", ((),)) for source in BOMBS]):
        assert report.values == (MISSING,) and not report.compiled
    for report in box.run([Job(source, "f", ((),), look=Look()) for source in BOMBS]):
        assert report.seen in (Observation("no code"), Observation("too long"), Observation("timeout"))
    for source in ("", "raise ValueError", "while 1: pass", "import os\nos._exit(98)", "x: undefined = '\\d'"):
        assert box.run([Job(source, "f", ((),))])[0].compiled


def test_what_compiles_does_not_depend_on_the_caller(box):
    def compiles(terms: int, depth: int) -> bool:
        job = Job("def f(a): return a" + "+a" * terms, "f", ())
        return compiles(terms, depth - 1) if depth else box.run([job])[0].compiled

    for terms in (900, 2600, 2900, 31_000):
        assert compiles(terms, 0) == compiles(terms, 300) == (terms < 31_000)


def test_one_program_leaves_no_state_for_the_next(box):
    look = """
        import os, sys
        def f(make):
            frame = sys._getframe()
            while frame.f_code.co_name != "grade":
                frame = frame.f_back
            if make:
                open("x", "w").close()
                return os.stat("x").st_ino, os.listdir(".")
            info = os.stat(".")
            return frame.f_locals["self"].printed, info.st_mtime_ns, info.st_atime_ns, info.st_ino, os.listdir(".")
    """

    def found() -> list:
        return box.run([Job(textwrap.dedent(look), "f", ((make,),)) for make in (False, True)])

    before = found()
    assert [report.status for report in before] == ["ok", "ok"] and before[0].values[0][:3] == (0, 0, 0)
    for left in (
        "print('x' * 1234)",
        "os.listdir('.')",
        "for i in range(37): open(str(i), 'w').close()",
        "for i in range(9): open('x', 'w').close(); os.unlink('x')",
        "os.mkdir('d'); os.chdir('d'); os.mkdir('e')",
    ):
        assert box.run([Job(f"import os\ndef f():\n    {left}", "f", ((),), look=Look())])[0].status == "ok"
        assert not box._servers[0].layers["namespaces"] or found() == before, left


def test_nothing_of_one_program_is_in_the_next(box):
    marker = "".join(["MARK", "-7431-", "ER"])
    files = "for i in range(20): open(x + str(i), 'w').close()"
    first = Job(f"x = {marker!r}\ndef f(y):\n {files}\n return y + x", "f", ((marker,),))
    assert box.run([first])[0].values == (marker * 2,)
    assert len(box.run([replace(first, look=Look())])[0].seen.files) == 20
    # Every byte of the process's writable memory that is listed in the maps of the server.
    with open(f"/proc/{box.pid}/mem", "rb", 0) as memory, open(f"/proc/{box.pid}/maps") as maps:
        for line in maps:
            span, mode, *rest = line.split()
            if "w" in mode and "[v" not in line:
                start, end = (int(part, 16) for part in span.split("-"))
                shared_with_children = not _not_inherited(box.pid, span)
                memory.seek(start)
                if shared_with_children:
                    assert marker.encode() not in memory.read(end - start), line


def _not_inherited(pid: int, span: str) -> bool:
    """Whether a mapping is marked 'dc' (do not copy on fork)."""
    inside = False
    with open(f"/proc/{pid}/smaps") as smaps:
        for line in smaps:
            if line.startswith(span):
                inside = True
            elif inside and line.startswith("VmFlags:"):
                return "dc" in line.split()
    raise AssertionError("mapping not found")


# ---- observed runs


def observe(box: Sandbox, source: str, entry: str = "Solution.f") -> Observation:
    names = {"functions": ("run_tests", "check"), "attributes": ("ok", "passed", "f"), "methods": ("__eq__",)}
    return box.run([Job(source, entry, ((2, 3),), look=Look(**names))])[0].seen


HONEST = """
    RESULTS = {}
    class Solution:
        limit = 10
        def passed(self): return True
        def ok(self): return True
        def f(self, a, b): return a + b
    solution = Solution()
    def run_tests():
        assert Solution().f(2, 3) == 5
    def check(s):
        assert s.f(2, 3)
"""


def test_honest_code_triggers_nothing(box):
    assert observe(box, textwrap.dedent(HONEST)) == Observation("ok")
    assert observe(box, textwrap.dedent(HONEST).replace("Solution().f(2", "solution.f(2")) == Observation("ok")
    assert observe(box, "def f(a, b): return a + b\ndef check(g): assert g(2, 3) == 5", "f") == Observation("ok")
    lazy = "async def run_tests(): assert 0\ndef check(): yield\n"
    assert observe(box, lazy + method("return a")) == Observation("ok")


def test_stdout(box):
    seen = observe(box, method("print('all tests', 'passed')", "print('at import')"))
    assert seen == Observation("ok", b"at import\nall tests passed\n")
    assert observe(box, "print('x')\nraise ValueError") == Observation("error", b"x\n")
    assert observe(box, method("import sys; sys.stderr.write('x')")).stdout == b""
    assert observe(box, method("return a", "def run_tests(): print('passed', flush=True)")).stdout == b""
    seen = observe(box, method("print('x' * 10**7)"))
    assert seen.status == "ok" and len(seen.stdout) == 65_536
    assert observe(box, method("while 1: print('x' * 999)")) == Observation("timeout")


def test_files(box):
    source = """
        import os
        open("result.txt", "w").write("PASS")
        os.mkdir("folder"); open("folder/x", "w"); open(b"\\xff", "w")
        os.close(os.open("closed", os.O_WRONLY | os.O_CREAT, 0))
        open("large", "wb").write(bytes(65536))
    """
    seen = observe(box, textwrap.dedent(source) + method("open('called', 'w').write(str(a))"))
    private = {"closed": b""} if ROOT else {}
    assert seen.status == "ok" and seen.files == {
        "result.txt": b"PASS",
        "called": b"2",
        "large": bytes(65536),
        **private,
    }
    many = observe(box, method("for i in range(100): open(f'{i:03}', 'w')"))
    assert list(many.files) == [f"{i:03}" for i in range(63)]
    killed = observe(box, method("open('x', 'w').write('1')\nos.abort()", "import os"))
    assert killed.status == "crash" and set(killed.files) == {"x"}
    assert observe(box, method("open('x', 'w').write('1')\nwhile 1: pass")) == Observation("timeout")
    assert observe(box, method("return a")).files == {}


def test_functions(box):
    def returned(code: str) -> set:
        return set(observe(box, method("return a + b") + textwrap.dedent(code)).returned)

    assert returned("def run_tests(): pass") == {"run_tests"}
    assert returned("def run_tests(): return True\ndef check(s): return s.f(1, 2)") == {"run_tests"}
    assert returned("def run_tests(verbose=True, *, n=1): pass") == {"run_tests"}
    assert returned("def run_tests(): assert Solution().f(2, 3) != 6") == {"run_tests"}
    for real in (
        "assert Solution().f(2, 3) == 5",
        "assert Solution().f(2, 3)",
        "if Solution().f(2, 3) > 4: pass",
        "return Solution().f(2, 3) == 5",
        "return 0",
        "return 2",
        "return 1.0",
        "return [True]",
        "return 'ok'",
        "return s",
        "raise SystemExit(0)",
        "import unknown",
        "assert s.f(2, 3) == 5",
        "assert solve(2, 3) == 5",
        "assert Other().f(2, 3) == 5",
    ):
        held = "s = Solution()\nsolve = s.f\nclass Other(Solution): pass\n"
        assert returned(f"{held}def run_tests(): {real}") == set(), real
        assert returned(f"{held}def run_tests(solve=Solution().f): {real}") == set(), real
    assert returned("def run_tests(a, b): pass\ndef check(*, a): pass") == set()
    assert returned("run_tests = print\ncheck = lambda: None") == {"check"}
    assert returned("def other(): pass") == set()
    assert returned("def run_tests(): pass\ndef check():\n  while 1: pass") == set()  # killed before it could report
    assert observe(box, "def f(a, b): return 1\ndef run_tests(): assert f(2, 3) == 1", "f").returned == set()
    assert observe(box, "def run_tests(): pass\nraise ValueError").returned == set()


@pytest.mark.parametrize(
    ("program", "names"),
    [
        (method("self.ok = True"), {"ok"}),
        (method("self.ok = self.passed = 'yes'"), {"ok", "passed"}),
        (method("self.ok = False; self.passed = []"), set()),
        ("class Solution:\n ok = 1\n def f(self, a, b): pass", {"ok"}),
        ("class Solution:\n ok = 1\n def f(self, a, b): self.ok = 0", {"ok"}),
        ("class Solution:\n def __init__(self): self.ok = 1\n def f(self, a, b): raise ValueError", {"ok"}),
        (method("Solution.ok = True"), {"ok"}),
        ("class Solution:\n @property\n def ok(self): return self.n\n def f(self, a, b): self.n = a", {"ok"}),
        (method("return a") + "s = Solution(); s.ok = True", set()),
        (method("class E:\n def __bool__(s): raise ValueError\nself.ok = E()"), set()),
    ],
)
def test_attributes(box, program, names):
    assert observe(box, program).truthy == names


def test_attributes_of_a_function(box):
    assert observe(box, "def f(a, b): f.ok = 1", "f").truthy == {"ok"}


def test_forged_facts_stay_within_the_question(box):
    lines = '["t","ok",null]', '["t",["l","ok","nonsense",5],["l","__eq__"]]', '["t",0,5]', '"ok"', '["l","check","f"]'
    forged = f"import os\nos.write(3, {''.join(line + chr(10) for line in lines).encode()!r})\nos._exit(0)"
    assert observe(box, forged) == Observation(
        "ok", returned=frozenset({"check"}), truthy=frozenset({"ok"}), equal=frozenset({"__eq__"})
    )
    assert observe(box, forged.replace('"l"', '"x"')) == Observation("ok")
    assert observe(box, forged.replace('"t"', '"x"')) == Observation("crash")


def test_what_follows_the_last_call_takes_back_no_value(box):
    """The values were right before a checking function ran, and are void where something forges more of them."""
    look = Look(functions=("run_tests",))
    good = "def f(a, b): return a + b\nimport os, time\ndef run_tests():\n    "
    for end in ("os._exit(0)", "os.abort()", "while 1: pass", "raise SystemExit(3)", "os.close(3)", "time.sleep(99)"):
        report = box.run([Job(good + end, "f", ((2, 3), (4, 5)), look=look)])[0]
        assert (report.status, report.values) == ("ok", (5, 9)) and not report.seen.returned, end
    for forged in (b'["l"]\n"ok"\n', b'["l"]\n["t",0,5]\n'):
        report = box.run([Job(f"{good}os.write(3, {forged!r})", "f", ((2, 3), (4, 5)), look=look)])[0]
        assert (report.status, report.values) == ("crash", (MISSING, MISSING))


def test_what_comes_after_the_cpu_time_is_not_seen(box):
    """Whether the server looks in time or not."""
    code = (
        "print('x')\nopen('x', 'w').write('1')\nt = time.process_time()\nwhile time.process_time() - t < {}: pass\n{}"
    )
    for end in ("return 1", "sys.exit(0)"):
        job = Job(method(code.format(0.3, end), "import sys, time"), "Solution.f", ((2, 3),), look=Look())
        late, early = replace(job, cpu_s=0.2), replace(job, cpu_s=1.0)
        timers = [threading.Timer(0.1, os.kill, (box.pid, signal.SIGSTOP))]
        timers += [threading.Timer(1.0, os.kill, (box.pid, signal.SIGCONT))]
        for timer in timers:
            timer.start()
        assert box.run([late])[0] == Report("timeout", (MISSING,), seen=Observation("timeout"))
        for timer in timers:
            timer.join()
        assert box.run([late])[0] == Report("timeout", (MISSING,), seen=Observation("timeout"))
        assert box.run([early])[0].seen.stdout == b"x\n" and set(box.run([early])[0].seen.files) == {"x"}


def test_a_program_that_asked_to_exit_is_over(box):
    code = method("if a: sys.exit(0)\nreturn b", "import sys")
    report = box.run([Job(code, "Solution.f", ((1, 2), (0, 3)), look=Look())])[0]
    assert report == Report("crash", (MISSING, MISSING), seen=Observation("crash", exit=0))


def test_each_call_has_the_memory_to_itself(box):
    code = "class Solution:\n def __init__(self): self.x = bytearray(40 << 20)\n def f(self, a, b): return a + b"
    assert box.run([Job(code, "Solution.f", ((2, 3), (4, 5)), look=Look())])[0].values == (5, 9)


def test_only_the_first_call_is_observed(box):
    code = """
        import sys
        class Solution:
            calls = 0
            def f(self, a, b):
                Solution.calls += 1
                self.ok = Solution.calls > 1
                print("call", Solution.calls)
                if Solution.calls == 2: raise SystemExit(0)
                return E() if Solution.calls > 1 else a + b
        class E:
            def __eq__(self, other): return True
    """
    look = Look(attributes=("ok",), methods=("__eq__",))
    report = box.run([Job(textwrap.dedent(code), "Solution.f", ((1, 2),) * 3, look=look)])[0]
    assert report == Report("ok", (3, MISSING, MISSING), seen=Observation("ok", b"call 1\n"))


# ---- layers, users, secrets


def test_self_test_passes(box):
    self_test(box)


LAYER_ATTACKS = {  # with this layer gone, these get through
    "seccomp": ("E26 socket", "E29 socketpair", "E38 tgkill", "E54 unshare", "E63 dumpable", "E74 executable memory"),
    "landlock": ("E01 passwd", "E06 own command", "E14 list /", "null device"),
    "rlimits": ("R06 shared memory", "R31 large file"),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_every_layer_is_needed(layer):
    """Without a layer these attacks get through, and the sandbox says that it is weak."""
    with pytest.raises(UserError, match="allow-weak-sandbox"):
        Sandbox(without=(layer,))
    by_id = {attack.id: attack for attack in ATTACKS}
    with Sandbox(Limits(cpu_s=CPU_S, memory_mb=64), without=(layer,), allow_weak=True) as open_box:
        assert open_box.weak and f"no {layer}" in open_box.tier
        reports = {id: run(open_box, by_id[id].source) for id in LAYER_ATTACKS[layer]}
        through = [id for id, r in reports.items() if same(r.values[0], 5) or r.status not in by_id[id].ends]
        assert tuple(through) == LAYER_ATTACKS[layer]


def test_parent_side_comparison_is_needed(box, monkeypatch):
    """Where a program's process compares and the trainer believes it, answers are right that `agrees` refuses."""
    tests = (((2, 3), 5),)
    problem = Problem("p", "", "Solution.f", "", reward_tests=tests, oracle_tests=tests, mode="gt_only")
    lines = [attack for attack in ATTACKS if attack.id.startswith(("O01", "O02", "O03"))]

    def solved() -> list[bool]:
        items = [(problem, Prompt("p", "", hinted=False), attack.source) for attack in lines]
        return [verdict.solved for verdict in Grader(box).programs(items)]

    assert solved() == [False] * len(lines) == [False] * 3
    judge = "\ndef judge(a, b): return Solution().f(a, b) == 5"
    job = Grader._job
    monkeypatch.setattr(Grader, "_job", lambda self, p, q, code: replace(job(self, p, q, code + judge), entry="judge"))
    monkeypatch.setattr(grade, "agrees", lambda value, *_: value is True)
    assert solved() == [True] * 3


def test_expected_values_are_not_in_the_process(box):
    """O11, O12, O14: frames, tracebacks and the heap."""
    secret = "".join(["SEC", "RET-", str(31 * 41)])
    asked = []

    def follow(index, value):
        asked.append(value)
        return None if value == secret else index + 1

    hunt = """
        import gc, sys
        def f(x):
            seen, todo = set(), [*gc.get_objects(), sys._getframe()]
            while todo and len(seen) < 200_000:
                item = todo.pop()
                if id(item) in seen: continue
                seen.add(id(item))
                if type(item) is str and item[:7] == x and len(item) > 7: return item
                if type(item) in (list, tuple, set): todo += item
                if type(item) is dict: todo += [*item.keys(), *item.values()]
                if hasattr(item, 'f_locals'): todo += [item.f_locals, item.f_back]
    """
    source = textwrap.dedent(hunt)
    job = Job(source, "f", (("SECRET-",), ("SECRET-",)), follow=follow, cpu_s=5.0)
    assert box.run([job])[0].values == (None, None) and asked == [None, None]
    found = box.run([Job(source + f"held = [{secret!r}]", "f", (("SECRET-",),), cpu_s=5.0)])[0]
    assert found.values == (secret,)  # the hunt does find what is there


def test_inputs_come_one_at_a_time(box):
    peek = "import os, select\ndef f(x): return select.select([3], [], [], 0.05)[0]"
    assert box.run([Job(peek, "f", ((1,), (2,), (3,)))])[0].values == ([], [], [])
    skip = Job("def f(x): return x", "f", tuple((i,) for i in range(6)), follow=lambda i, v: i + 2)
    assert box.run([skip])[0] == Report("ok", (0, MISSING, 2, MISSING, 4, MISSING))
    assert box.run([replace(skip, follow=lambda i, v: None)])[0] == Report("ok", (0, *[MISSING] * 5))


def test_setup_keywords_and_arguments(box):
    source = "class Solution:\n    def f(self, xs, k=one): xs.append(k); return Counter(xs)[k]"
    setup = "from collections import *\none = 1"
    jobs = [Job(source, "Solution.f", ({"xs": [1]}, {"xs": [2], "k": 2}, ([3], 3)), setup=setup)]
    jobs += [replace(jobs[0], argument=0), replace(jobs[0], argument="xs")]
    returned, first, named = box.run(jobs)
    assert returned.values == (2, 2, 2)
    assert first.values == ([1, 1], [2, 2], [3, 3]) and named.values == ([1, 1], [2, 2], MISSING)
    with pytest.raises(UserError, match="setup"):
        box.run([replace(jobs[0], setup="import (")])


def test_exit_status_of_a_program(box):
    def status(code: str, before: str = "") -> int | None:
        return observe(box, method(code, before)).exit

    assert status("return 1") is None and status("raise ValueError") is None
    assert status("import sys; sys.exit()") == 0 and status("import sys; sys.exit(42)") == 42
    assert status("import sys; sys.exit('x')") == 1 and status("raise SystemExit(True)") == 1
    assert status("import os; os._exit(42)") == 42 and status("return 1", "raise SystemExit(0)") == 0
    assert status("exit(7)") == 7 and status("return 1", "quit()") == 0
    forged = 'import os; os.write(3, b\'["t","crash",0]\\n\'); '
    garbage = "import os\nos.write(3, b'x\\n')\n"
    assert observe(box, method("return a + b", garbage) + "def run_tests(): os._exit(0)").exit is None
    for end in ("os.abort()", "os._exit(3)", "return 1"):
        assert status(forged + end) is None
    assert status("import os; os.abort()") is None and status("while 1: pass") is None
    # Exit hooks never run, and what a checking function does is not the program's own end.
    hook = "import atexit, os, sys\natexit.register(os._exit, 0)\nsys.excepthook = lambda *a: os._exit(0)"
    assert status("raise ValueError", hook) is None
    assert status("return 1", "import os\ndef run_tests(): os._exit(0)\ndef check(): raise SystemExit(0)") is None


def test_comparison_methods(box):
    def equal(code: str, before: str = "") -> set:
        job = Job(method(code, before), "Solution.f", ((2, 3),), look=Look(methods=("__eq__", "matches")))
        return set(box.run([job])[0].seen.equal)

    assert equal("return E()", "class E:\n def __eq__(s, o): return True") == {"__eq__"}
    assert equal("return E()", "class E(int):\n def matches(s, o): return True") == {"matches"}
    assert equal("return E()", "class E:\n def __eq__(s, o): return 1\n def matches(s): return True") == set()
    honest = "import dataclasses\n@dataclasses.dataclass\nclass E:\n x: int = 1"
    assert equal("return E()", honest) == equal("return 5") == equal("raise ValueError") == set()


@pytest.mark.skipif(not ROOT, reason="needs root, to become somebody else")
def test_plain_user():
    """The whole catalog, in one go, as a user without privileges."""
    script = f"""
        import os, sys, json, ctypes, struct
        # Of all privileges it keeps that of reading files, since the interpreter may stand where only root reads.
        libc, head = ctypes.CDLL(None), struct.pack("=Ii", 0x20080522, 0)
        os.setgroups([]); os.setresgid(65534, 65534, 65534)
        libc.prctl(8, 1, 0, 0, 0); os.setresuid(65534, 65534, 65534)
        assert libc.capset(head, struct.pack("=6I", 4, 4, 4, 0, 0, 0)) == 0 and libc.prctl(47, 2, 2, 0, 0) == 0
        sys.path[:0] = {[str(pathlib.Path(__file__).parent), *sys.path]!r}
        from attacks import ATTACKS
        from vgrout.envs.oracle import same
        from vgrout.envs.jobs import *
        from vgrout.envs.sandbox import *
        from vgrout.envs.selftest import self_test
        good = Job("def f(a, b): return a + b", "f", ((2, 3),))
        with Sandbox(Limits(cpu_s={CPU_S}, memory_mb=64), workers=2) as box:
            self_test(box)
            jobs = [job for attack in ATTACKS for job in (Job(attack.source, "Solution.f", ((2, 3),)), good)]
            reports = box.run(jobs)
            wrong = [a.id for a, r in zip(ATTACKS, reports[::2]) if r.status not in a.ends or same(r.values[0], 5)]
            lost = [a.id for a, r in zip(ATTACKS, reports[1::2]) if r != Report("ok", (5,))]
            print(json.dumps([os.getuid(), box.tier, wrong, lost]))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    uid, tier, wrong, lost = json.loads(done.stdout)
    assert uid == 65534 and "no own uid" in tier and not tier.startswith("C") and wrong == lost == []


# ---- failures of the sandbox itself


def test_killed_server_is_replaced():
    with Sandbox(Limits(cpu_s=CPU_S)) as box:
        pid, directory = box.pid, box._servers[0].directory
        os.kill(pid, signal.SIGKILL)
        assert box.run([GOOD] * 3) == [GOOD_REPORT] * 3
        assert box.pid != pid and not os.path.exists(directory)


def test_program_that_ends_two_servers_is_a_killer(monkeypatch):
    with Sandbox(Limits(cpu_s=CPU_S), workers=2) as box:
        send, programs = sandbox._Server.send, []

        def deadly(server, payload, *rest):
            send(server, payload, *rest)
            if b"deadly" in payload:
                while not (children := children_of(server.process.pid)):
                    time.sleep(0.01)
                time.sleep(0.05)
                programs.extend(children)
                server.process.kill()

        monkeypatch.setattr(sandbox._Server, "send", deadly)
        bad = Job("deadly = 1\nimport time\ntime.sleep(60)", "f", ())
        assert box.run([GOOD, bad, GOOD]) == [GOOD_REPORT, Report("killer", ()), GOOD_REPORT]
        assert box.run([GOOD] * 3) == [GOOD_REPORT] * 3
        deadline = time.monotonic() + 5
        while any(map(running, programs)) and time.monotonic() < deadline:
            time.sleep(0.01)  # the kernel ends the program of a killed server
        assert len(programs) == 2 and not any(map(running, programs))


@pytest.mark.parametrize("kills", [1, 2])
def test_a_program_that_is_killed_from_outside(monkeypatch, kills):
    """Once it is run again; twice nothing of it counts, for who knows that it was not its own doing?"""
    with Sandbox(Limits(wall_s=20.0)) as box:
        answered, left = _talk.Talk.answered, [kills]

        def killing(talk, line):
            answered(talk, line)
            if talk.call == 1 and left[0] and "deadly" in talk.job.source:
                left[0] -= 1
                os.kill(talk.pid, signal.SIGKILL)

        monkeypatch.setattr(_talk.Talk, "answered", killing)
        source = "import time\ndeadly = 1\nprint('x')\ndef f(a):\n time.sleep(a)\n return a"
        bad = Job(source, "f", ((0,), (0.2,)), look=Look())
        report = box.run([bad])[0]
        lost = Report("killer", (MISSING, MISSING), seen=Observation("killer"))
        assert report == (lost if kills == 2 else Report("ok", (0, 0.2), seen=Observation("ok", b"x\n")))
        assert box.run([GOOD]) == [GOOD_REPORT]


def test_a_caller_that_is_late_is_no_fault_of_the_program(monkeypatch):
    with Sandbox(Limits(wall_s=0.4)) as box:
        converse = sandbox.converse
        monkeypatch.setattr(sandbox, "converse", lambda busy: (time.sleep(0.8), converse(busy))[1])
        with pytest.raises(SandboxError, match="waited for its caller"):
            box.run([GOOD])
        monkeypatch.undo()
        assert box.run([GOOD]) == [GOOD_REPORT]


def test_hanging_server(monkeypatch):
    monkeypatch.setattr(sandbox, "GRACE_S", 0.5)
    with Sandbox(Limits(wall_s=0.5)) as box:
        os.kill(box.pid, signal.SIGSTOP)
        assert box.run([GOOD]) == [GOOD_REPORT]
        send = sandbox._Server.send

        def stopped(server, payload, *rest):
            send(server, payload, *rest)
            if b"hang" in payload:
                os.kill(server.process.pid, signal.SIGSTOP)

        monkeypatch.setattr(sandbox._Server, "send", stopped)
        with pytest.raises(SandboxError, match="failed twice"):
            box.run([GOOD, Job("hang = 1", "f", ()), GOOD])
        assert box.run([GOOD]) == [GOOD_REPORT]


def test_child_that_cannot_be_confined_is_an_error(monkeypatch):
    with Sandbox(Limits(cpu_s=CPU_S)) as box:
        monkeypatch.setattr(sandbox, "payload", lambda job: b"not a job")
        with pytest.raises(SandboxError, match="could not be set up"):
            box.run([GOOD])
        monkeypatch.undo()
        assert box.run([GOOD]) == [GOOD_REPORT]


def test_server_that_does_not_start(monkeypatch):
    before = descriptors("self")
    monkeypatch.setattr(sandbox.sys, "executable", "/bin/false")
    with pytest.raises(SandboxError, match="did not start"):
        Sandbox()
    monkeypatch.setattr(sandbox.sys, "executable", "/nonexistent")
    with pytest.raises(SandboxError, match="did not start"):
        Sandbox()
    assert descriptors("self") == before


def test_interrupted_batch_does_not_mix_up_answers(monkeypatch):
    with Sandbox(Limits(cpu_s=CPU_S)) as box:
        monkeypatch.setattr(sandbox, "converse", lambda busy: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            box.run([Job("def f(): return 'old'", "f", ((),))])
        monkeypatch.undo()
        assert box.run([GOOD]) == [GOOD_REPORT]


def test_close_leaves_nothing():
    before = descriptors("self")
    box = Sandbox(workers=2)
    pids, directories = [s.process.pid for s in box._servers], [s.directory for s in box._servers]
    box.run([GOOD] * 4)
    box.close()
    box.close()
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids) and not any(map(os.path.exists, directories))
    assert descriptors("self") == before and box.pid is None
    with pytest.raises(SandboxError, match="closed"):
        box.run([GOOD])


def test_server_ends_with_its_parent():
    script = """
        from vgrout.envs.jobs import *
        from vgrout.envs.sandbox import *
        box = Sandbox(Limits(cpu_s=30.0, wall_s=60.0))
        print(box.pid, box._servers[0].directory, flush=True)
        box.run([Job("import time\\ndef f(): time.sleep(50)", "f", ((),))])
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True, env=environment
    ) as parent:
        pid, directory = parent.stdout.readline().split()
        time.sleep(0.2)
        parent.kill()
    deadline = time.monotonic() + 10
    while (os.path.exists(directory) or running(pid)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not os.path.exists(directory) and not running(pid)


def test_many_programs_leave_no_trace(box):
    def state():
        memory = int(pathlib.Path(f"/proc/{box.pid}/statm").read_text().split()[0])
        return descriptors("self"), descriptors(box.pid), memory

    before = state()
    bad = Job("import os\nos._exit(1)", "f", ((),))
    messy = Job("import os\nfor i in range(70): os.mkdir(str(i))\ndef f(): pass", "f", ((),), look=Look())
    pid, reports = box.pid, []
    for _ in range(5):
        reports += box.run([GOOD, bad] * 50)
        assert [report.seen.status for report in box.run([messy] * 10)] == ["ok"] * 10
    assert reports == [GOOD_REPORT, Report("crash", (MISSING,))] * 250
    assert box.pid == pid and state() == before and not processes_of_programs(box)


@pytest.mark.parametrize("entry", ["", "a.b.c", "f()", ".f", "f."])
def test_bad_jobs_are_refused(box, entry):
    with pytest.raises(ValueError, match="entry"):
        Job("", entry, ())
    with pytest.raises(TypeError):
        Job("", "f", (1,))
    with pytest.raises(Refused):
        box.run([Job("", "f", ((object(),),))])
    for cpu_s in (0.0999, 0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="cpu_s"):
            Job("", "f", (), cpu_s=cpu_s)
    with pytest.raises(ValueError, match="needs an input"):
        Job("", "f", (), look=Look())
    with pytest.raises(ValueError, match="positive"):
        Limits(cpu_s=0)
    assert box.run([GOOD]) == [GOOD_REPORT]


# ---- the codec

atoms = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
keys = st.recursive(atoms, lambda inner: st.lists(inner, max_size=3).map(tuple), max_leaves=4)
plain = st.recursive(
    atoms | st.sets(keys, max_size=4),
    lambda inner: (
        st.lists(inner, max_size=4) | st.lists(inner, max_size=4).map(tuple) | st.dictionaries(keys, inner, max_size=4)
    ),
    max_leaves=12,
)
TOKENS = '[ ] , "t" "d" "s" "l" "i" "f" "0x1p+1" "0x1" 0 1 true null NaN 1e5 - " { } [] ["s",1,1] ["d",1] "ok"'.split()
TOKENS += ["\n", "\x00", "\xff", '["t",0,1]\n"ok"\n']


@settings(max_examples=100, deadline=None)
@given(plain)
def test_codec_round_trip(value):
    text = encode(value)
    assert text.isascii() and "\n" not in text
    assert same(decode(text), value) and same(decode(text.encode()), value)


def check_any_bytes(data: bytes) -> bool:
    """Bytes are refused or give plain data, and never an unexpected exception; True if they were read."""
    kind, value = read_answer(data, 1)
    assert kind in ("value", "status", "void") and (kind != "status" or value in ("ok", "error", "memory"))
    look = Look(functions=("t",), attributes=("d",), methods=("l",))
    status, ended, (truthy, equal, returned) = read_facts(data, look)
    assert status in (None, "ok", "error", "memory", "crash") and ended in (None, *range(256))
    assert returned <= {"t"} and truthy <= {"d"} and equal <= {"l"}
    try:
        value = decode(data)
    except Refused:
        return False
    assert same(decode(encode(value)), value) or b"nan" in data
    return True


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60) | st.lists(st.sampled_from(TOKENS), max_size=30).map("".join).map(str.encode))
def test_any_bytes_are_read_or_refused(data):
    check_any_bytes(data)


def mutated(value: object, dice: random.Random) -> bytes:
    """The encoding of a value, or a heap of tokens, with a few tokens or bytes changed."""
    parts = re.findall(r'"[^"]*"|[^"]', encode(value)) if dice.random() < 0.7 else dice.choices(TOKENS, k=9)
    for _ in range(dice.randint(1, 3)):
        start = dice.randrange(len(parts) + 1)
        parts[start : start + dice.randint(0, 2)] = dice.choices(TOKENS, k=dice.randint(0, 2))
    data = bytearray("".join(parts).encode())
    for _ in range(dice.choice((0, 0, 1, 3))):
        place = dice.randrange(len(data) + 1)
        data[place : place + dice.randint(0, 1)] = bytes([dice.randrange(256)])
    return bytes(data)


@pytest.mark.slow
def test_a_hundred_thousand_inputs_are_read_or_refused():
    tried = Counter()

    @settings(max_examples=260, deadline=None)
    @given(plain, st.integers(0, 2**32))
    def check(value, seed):
        dice = random.Random(seed)
        tried.update(check_any_bytes(mutated(value, dice)) for _ in range(400))

    check()
    assert tried.total() >= 100_000 and min(tried.values()) > 1000


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        "[1]",
        '["x"]',
        '["i","5"]',
        '["i",5]',
        '["i","0x"]',
        '["f","1.0"]',
        '["f","0x1.8p+99999"]',
        '["f","0x1.0p+9999"]',
        '["s",["l"]]',
        '["d",1]',
        '["d",["l"],1]',
        "1.5",
        "NaN",
        "Infinity",
        "9007199254740993",
        "9" * 5000,
        '["i","0x' + "f" * 20_000 + '"]',
        "1 2",
        "\ufeff1",
        '"\u00e9"',
        "[" * 100_000,
        '["l",' * 66 + "1" + "]" * 66,
        '["s"' + "".join(f',["i","{hex((2**61 - 1) * (k + 10**6))}"]' for k in range(100)) + "]",
    ],
)
def test_refused_encodings(text):
    with pytest.raises(Refused):
        decode(text.encode("utf-8"))


def test_limits_of_the_codec(monkeypatch):
    monkeypatch.setattr(_codec, "NODES", 1008)
    monkeypatch.setattr(_codec, "HASHED", 100)
    deep: object = 5
    for _ in range(64):
        deep = [deep]
    members = [set(range(50)), dict.fromkeys(range(50))]
    for value in (deep, [0] * 1000, [()] * 125, members, (1 << (1 << 16)) - 1, "x" * (4 << 20), "[" * 1008):
        assert decode(encode(value)) == value
    large = ([deep], [0] * 1001, [()] * 126, [*members, {1}], [*members, {1: 1}], 1 << (1 << 16), "x" * ((4 << 20) + 1))
    for value in (*large, "[" * 1009, object(), b"", 1j):
        with pytest.raises(Refused):
            encode(value)
    sets = '["l",["s"' + "".join(f",{i}" for i in range(101)) + "]]"
    for text in ('["l"' + ",0" * 1001 + "]", '["l"' + ',["t"]' * 126 + "]", sets, '["l",' * 65 + "0" + "]" * 65):
        with pytest.raises(Refused):
            decode(text)
    monkeypatch.setattr(_codec, "_scan", lambda *_: pytest.fail("it was scanned"))
    with pytest.raises(Refused, match="brackets"):
        decode(b"[" * 1009)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'["t",1,2]', ("value", 2)),
        (b'["t",1,["l",1]]', ("value", [1])),
        (b'["t",1]', ("value", MISSING)),
        (b'"ok"', ("status", "ok")),
        (b'"memory"', ("status", "memory")),
        *((line, ("void", None)) for line in (
            b'["t",0,2]', b'["t",2,2]', b'["t",true,2]', b'["t",-1,2]', b'["t",["f","0x1.0p+0"],2]', b'["l",1,2]',
            b'["t",1,2,3]', b'["t"]', b'"timeout"', b'"killer"', b"", b" ", b"1", b"NaN", b'["t",1,NaN]', b'["t",1,2] ',
            b"[" * 100_000, b'\xff"ok"', b'["t",1,2]\x00',
        )),
    ],
)  # fmt: skip
def test_answers(line, expected):
    assert read_answer(line, 1) == expected


def test_facts_line_by_line():
    look = Look(functions=("a", "b"), attributes=("x",), methods=("__eq__",))
    whole = b'["t","crash",42]\n["t",["l","x","y"],["l","__eq__"]]\n["l","b",5]\n'
    facts = ("crash", 42, [frozenset({"x"}), frozenset({"__eq__"}), frozenset({"b"})])
    nothing = [frozenset()] * 3
    assert read_facts(whole, look) == read_facts(whole + b"more", look) == facts
    for cut in range(len(whole)):
        status, ended, names = read_facts(whole[:cut], look)
        assert (status, ended) == (("crash", 42) if cut > 16 else (None, None))
        assert names[0] == (facts[2][0] if cut >= len(whole) - 12 else frozenset()) and names[2] == frozenset()
    assert read_facts(b'["t","crash",300]\n', look) == ("crash", None, nothing)
    assert read_facts(b'["t","fine",0]\n' + whole, look) == (None, None, nothing)
