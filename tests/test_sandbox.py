"""The sandbox: programs that must work, attacks it must survive, observed facts, failures of the sandbox itself."""

import contextlib
import functools
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import textwrap
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vgrout.envs import _forkserver, sandbox
from vgrout.envs._forkserver import Refused, decode, encode
from vgrout.envs.oracle import parses, same
from vgrout.envs.sandbox import (
    MISSING,
    Limits,
    Observation,
    ObserveJob,
    Sandbox,
    SandboxError,
    ValueJob,
    ValueReport,
    read_facts,
    read_values,
)

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the sandbox needs Linux")
ROOT = os.geteuid() == 0 if hasattr(os, "geteuid") else False
CPU_S = 0.2
GOOD = ValueJob("class Solution:\n    def f(self, a, b):\n        return a + b", "Solution.f", ((2, 3), ([1], [2])))
GOOD_REPORT = ValueReport("ok", (5, [1, 2]))


@pytest.fixture(scope="module")
def box():
    with Sandbox(Limits(cpu_s=CPU_S, wall_s=30.0, memory_mb=64)) as box:
        yield box


def method(body: str, before: str = "") -> str:
    """A program whose `Solution.f(a, b)` has this body, after these module-level lines."""
    indented = textwrap.indent(textwrap.dedent(body).strip("\n"), " " * 8)
    return f"{textwrap.dedent(before)}\nclass Solution:\n    def f(self, a, b):\n{indented}\n"


def run(box: Sandbox, source: str, *inputs: tuple) -> ValueReport:
    return box.values([ValueJob(source, "Solution.f", inputs or ((2, 3),))])[0]


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
    return box.values([ValueJob("import os\ndef f(): return os.getuid()", "f", ((),))])[0].values[0]


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
    assert run(box, BENIGN[name]) == ValueReport("ok", (5,))


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
    got = box.values([ValueJob("def f(x): return x", "f", tuple((value,) for value in values))])[0]
    assert got.status == "ok"
    assert repr(got.values) == repr(values)  # tells -0.0, True and 1 apart
    assert got.values[14] is not values[14]


def test_results_are_in_order_and_do_not_depend_on_workers(box):
    source = "import random\ndef f(i): return i, random.random(), list({'a', 'b', 'c', 'dd', 'e'})"
    jobs = [ValueJob(source, "f", ((i,),)) for i in range(20)]
    with Sandbox(Limits(cpu_s=CPU_S), workers=2) as two:
        assert two.values(jobs) == box.values(jobs)
        assert [report.values[0][0] for report in two.values(jobs)] == list(range(20))
    assert box.values([]) == [] and box.observe([]) == []


def test_a_raise_in_one_call_does_not_stop_the_others(box):
    report = run(box, method("return 1 // a"), (1, 0), (0, 0), (1, 0))
    assert report == ValueReport("ok", (1, MISSING, 1))


def test_values_before_a_kill_are_kept(box):
    report = run(box, method("while a == 2: pass\nreturn a"), (1, 0), (2, 0), (3, 0))
    assert report == ValueReport("timeout", (1, MISSING, MISSING))


def test_instance_per_call_and_mutated_inputs(box):
    source = "class Solution:\n n = 0\n def f(self, x):\n  self.n += 1\n  x.append(9)\n  return [self.n, x]"
    assert run(box, source, ([],), ([1],)).values == ([1, [9]], [1, [1, 9]])


# ---- attacks: none may be graded correct (5), and the sandbox must be as before

ENDS = ("ok", "error", "timeout", "memory", "output", "crash")
ATTACKS = {
    "R01 fork bomb": (method("return 5", "import os\nwhile 1:\n try: os.fork()\n except OSError: pass"), "timeout"),
    "R02 fork": (method("return 5", "import os\nif os.fork() == 0:\n while 1: pass"), "error"),
    "R03 threads": (method("import threading\nwhile 1: threading.Thread(target=print).start()"), "ok"),
    "R04 memory": (method("x = []\nwhile 1: x.append(bytes(1 << 20))"), "memory"),
    "R04 memory at import": (method("return 5", "x = []\nwhile 1: x.append(bytes(1 << 20))"), "memory"),
    "R05 huge": (method("return bytearray(64 << 30)"), "memory"),
    "R06 shared memory": (method("import mmap\nx = []\nwhile 1: x.append(mmap.mmap(-1, 1 << 26))"), "ok"),
    "R08 descriptors": (method("import os\nx = []\nwhile 1: x.append(os.pipe())"), "ok"),
    "R09 stdout": (method("while 1: print('x' * 99999)"), "timeout"),
    "R10 stderr": (method("import sys\nwhile 1: sys.stderr.write('x' * 99999)"), "timeout"),
    "R11 result flood": (method("import os\nwhile 1: os.write(3, b'x' * 65536)"), "output"),
    "R12 recursion": (method("import sys\nsys.setrecursionlimit(10**9)\ng = lambda: g()\nreturn g()"), ENDS),
    "R12 recursion in C": (
        method("import sys\nsys.setrecursionlimit(10**9)\nx = None\nfor _ in range(10**6): x = [x]\nreturn repr(x)"),
        ENDS,
    ),
    "R12 plain recursion": (method("return self.f(a, b)"), "ok"),
    "R14 big power": (method("return 10**(10**8)"), "timeout"),
    "R15 digits": (method("import sys\nsys.set_int_max_str_digits(0)\nreturn len(str(3**(10**7)))"), "timeout"),
    "R16 signals": (
        method(
            "import signal\nfor n in range(1, 65):\n try: signal.signal(n, signal.SIG_IGN)\n except "
            "(OSError, ValueError): pass\nwhile 1: pass"
        ),
        "timeout",
    ),
    "R17 swallow": (method("while 1:\n try:\n  while 1: pass\n except BaseException: pass"), "timeout"),
    "R19 input": (method("return int(input())"), "ok"),
    "R20 regex": (method("import re\nreturn re.match('(a+)+$', 'a' * 40 + 'b')"), "timeout"),
    "R21 zlib bomb": (
        method("import zlib\nd = zlib.compress(bytes(1 << 26)) \nreturn zlib.decompress(d) * 99"),
        ("memory", "timeout"),
    ),
    "R23 abort": (method("import os\nos.abort()"), "crash"),
    "R23 segfault": (method("import ctypes\nctypes.string_at(0)"), "crash"),
    "R28 hanging exception": (
        method("raise E", "class E(Exception):\n def __str__(self):\n  while 1: pass\n __repr__ = __str__"),
        "ok",
    ),
    "R29 limits": (method("import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))\nreturn 5"), "ok"),
    "R30 files": (method("for i in range(500): open(str(i), 'w')"), "ok"),
    "R31 large file": (
        method("open('x', 'wb', 0).write(bytes(65536)); open('x', 'ab', 0).write(b'1'); return 5"),
        "ok",
    ),
    "deep directories": (
        method("import os\nfor i in range(400): os.mkdir('d'); os.chdir('d')\nos.chmod('.', 0)"),
        ENDS,
    ),
    "timer": (method("import signal\nsignal.setitimer(0, .001, .001)\nwhile 1: pass"), "crash"),
    "E30 system": (method("import os\nos.system('true') and 1 / 0\nreturn 5"), "ok"),
    "E31 exec": (method("import os\nos.execv('/bin/sh', ['sh', '-c', 'echo 5; sleep 9 & sleep 9'])"), "crash"),
    "E32 spawn": (method("import os\nos.posix_spawn('/bin/true', ['true'], {})\nreturn 5"), "ok"),
    "O01 int subclass": (
        method("return E(4)", "class E(int):\n def __eq__(s, o): return True\n __hash__ = None"),
        "ok",
    ),
    "O02 class spoof": (method("return E()", "class E:\n __class__ = int\n def __eq__(s, o): return True"), "ok"),
    "O03 list subclass": (method("return type('L', (list,), {'__eq__': lambda s, o: True})()"), "ok"),
    "O05 bool": (method("return True"), "ok"),
    "O06 nan": (method("return float('nan')"), "ok"),
    "O08 text": (method("return '5'"), "ok"),
    "O09 almost": (method("return 5 + 1e-9"), "ok"),
    "float": (method("return 5.0"), "ok"),
    "O10 fraction": (method("import fractions\nreturn fractions.Fraction(5)"), "ok"),
    "O11 frames": (
        method(
            "import sys\nf = sys._getframe()\nwhile f:\n for v in f.f_locals.values():\n  if v == 5: return v\n"
            " f = f.f_back"
        ),
        "ok",
    ),
    "O15 exit at import": (method("return 5", "raise SystemExit(0)"), "error"),
    "O16 exit": (method("import sys\nsys.exit(0)"), "ok"),
    "O17 _exit at import": (method("return 5", "import os\nos._exit(0)"), "crash"),
    "O18 _exit": (method("import os\nos._exit(0)"), "crash"),
    "setup code": (method("return 5", "import os\nos._exit(97)"), "crash"),
    "O19 interrupt": (method("raise KeyboardInterrupt"), "ok"),
    "O19 generator exit": (method("raise GeneratorExit"), "ok"),
    "O20 atexit": (method("return 4", "import atexit, os\natexit.register(os.write, 3, b'[\"t\",0,5]')"), "ok"),
    "O21 trace": (
        method("return 4", "import sys\nsys.settrace(lambda *a: None)\nsys.setprofile(lambda *a: None)"),
        "ok",
    ),
    "O28 harness": (method("return 4", "import __main__\n__main__.encode = lambda v: '5'\n__main__.decode = 5"), "ok"),
    "O30 stdout": (method("print('[\"t\",0,5]'); return 4"), "ok"),
    "O31 result pipe": (method("import os\nos.write(3, b'[\"t\",0,4]\\n'); return 5"), "crash"),
    "O32 bool index": (method('import os\nos.write(3, b\'["t",false,5]\\n"ok"\\n\'); os._exit(0)'), "crash"),
    "O36 nan token": (method('import os\nos.write(3, b\'["t",0,NaN]\\n"ok"\\n\'); os._exit(0)'), "crash"),
    "O37 not text": (method("import os\nos.write(3, bytes(range(256))); return 5"), "crash"),
    "O39 endless": (method("import os\nwhile 1: os.write(3, b'[\"t\",0,5]\\n' * 999)"), "output"),
    "closed pipe": (method("import os\nos.closerange(0, 9)\nreturn 5"), "crash"),
    "O41 generator": (method("yield 5"), "ok"),
    "O43 object": (method("return self"), "ok"),
    "O44 self-reference": (method("x = []\nx.append(x)\nreturn x"), "ok"),
    "shared parts": (method("x = []\nfor _ in range(60): x = [x, x]\nreturn x"), "ok"),
    "O45 large integer": (method("return 1 << 3_000_000"), "ok"),
    "O46 long text": (method("return 'x' * 50_000_000"), "ok"),
    "O47 long list": (method("return [None] * 10**7"), ("ok", "memory", "timeout")),
    "deep value": (method("x = 5\nfor _ in range(65): x = [x]\nreturn x"), "ok"),
    "O50 no class": ("Solution = 5", "error"),
    "O51 nothing": ("", "error"),
    "U01 parentheses": ("(" * 250 + "5" + ")" * 250, "error"),
    "U03 minus": ("-" * 65_000 + "1", ENDS),
    "U04 sum": ("x = " + "+".join(["1"] * 32_000), ENDS),
    "U05 NUL": (method("return 5") + "\0", "error"),
    "U05 surrogate": (method("return 5") + "# \ud800", "error"),
    "U09 long": (method("return 5") + "#" * 10_000_000, "error"),
    "U09 long in UTF-8": (method("return 5") + "# " + "\U0001f600" * 20_000, "error"),
    "U12 indents": ("".join(" " * i + "if 1:\n" for i in range(300)), "error"),
    "U15 loop at import": (method("return 5", "while 1: pass"), "timeout"),
    "U17 decorators": ("@print\n" * 5000 + "class Solution:\n    def f(self, a, b): return 5", "error"),
}
if ROOT:  # without a uid of its own, a program may signal the trainer
    ATTACKS |= {
        "E02 shadow": (method("return open('/etc/shadow').read() and 5"), "ok"),
        "E34 kill the server": (method("import os\nos.kill(os.getppid(), 9)\nreturn 5"), "ok"),
        "E35 kill all": (method("import os\nos.kill(-1, 9)\nreturn 4"), "ok"),
        "E60 root": (method("import os\nos.setuid(0)\nreturn 5"), "ok"),
        "memory of itself": (method("open('/proc/self/mem'); return 5"), "ok"),
    }


@pytest.mark.parametrize("name", ATTACKS)
def test_attack(box, name):
    source, expected = ATTACKS[name]
    pid, before = box.pid, (descriptors("self"), descriptors(box.pid))
    start, cpu = time.monotonic(), cpu_of_programs(box)
    report = run(box, source)
    assert time.monotonic() - start < 15 and cpu_of_programs(box) - cpu < 2 * CPU_S + 0.2
    assert report.status in ([expected] if isinstance(expected, str) else expected)
    assert not (report.status == "ok" and same(report.values[0], 5)), report
    assert box.values([GOOD]) == [GOOD_REPORT]
    assert box.pid == pid and not processes_of_programs(box)
    assert (descriptors("self"), descriptors(box.pid)) == before
    assert os.listdir(box._servers[0].directory) == []
    parses(source)  # must not raise either


@pytest.mark.parametrize("wait", ["time.sleep(1e9)", "signal.pause()", "os.read(os.pipe()[0], 1)"])
def test_waiting_without_cpu_ends_at_the_wall_limit(wait):
    with Sandbox(Limits(wall_s=0.5)) as box:
        start = time.monotonic()
        assert run(box, method(f"import time, signal, os\n{wait}")) == ValueReport("timeout", (MISSING,))
        assert time.monotonic() - start < 3.0
        assert box.values([GOOD]) == [GOOD_REPORT]


def test_cpu_time_decides_and_not_wall_time(box):
    slow = method("time.sleep(0.6); return a + b", "import time")
    assert run(box, slow) == ValueReport("ok", (5,))
    start = method("return time.process_time() < 0.1", "import time")
    assert run(box, start).values == (True,)


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
    report = box.values([ValueJob(textwrap.dedent(source), "f", ((),))])[0]
    fds, environment, argv, files, uid, leader = report.values[0]
    assert fds == [0, 1, 2, 3] and set(environment) == {"PYTHONHASHSEED", "LANG", "PWD"}
    assert argv == ["solution"] and files == [] and leader
    assert uid in _forkserver.UIDS if ROOT else uid == os.getuid()
    assert ("unused uid" in box.tier) == ROOT and "no seccomp" in box.tier


def test_nothing_of_one_program_is_in_the_next(box):
    marker = "".join(["MARK", "-7431-", "ER"])
    first = ValueJob(f"x = {marker!r}\ndef f(y): return y + x", "f", ((marker,),))
    assert box.values([first])[0].values == (marker * 2,)
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
    return box.observe([ObserveJob(source, entry, (2, 3), ("run_tests", "check"), ("ok", "passed", "f"))])[0]


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
    for flood, status in (("print('x' * 10**7)", "ok"), ("while 1: print('x' * 999)", "timeout")):
        seen = observe(box, method(flood))
        assert seen.status == status and len(seen.stdout) == 65_536


def test_files(box):
    source = """
        import os
        open("result.txt", "w").write("PASS")
        os.mkdir("folder"); open("folder/x", "w"); os.symlink("result.txt", "link"); os.mkfifo("fifo")
        open("hard", "w"); os.link("hard", "hard2")
        open(b"\\xff", "w"); open("closed", "w").write("1"); os.chmod("closed", 0)
        open("large", "wb").write(bytes(65536))
    """
    seen = observe(box, textwrap.dedent(source) + method("open('called', 'w').write(str(a))"))
    private = {"closed": b"1"} if ROOT else {}
    assert seen.status == "ok" and seen.files == {
        "result.txt": b"PASS",
        "called": b"2",
        "large": bytes(65536),
        **private,
    }
    many = observe(box, method("for i in range(100): open(f'{i:03}', 'w')"))
    assert list(many.files) == [f"{i:03}" for i in range(63)]
    killed = observe(box, method("open('x', 'w').write('1')\nwhile 1: pass"))
    assert killed.status == "timeout" and set(killed.files) == {"x"}
    assert observe(box, method("return a")).files == {}


def test_functions(box):
    def returned(code: str) -> set:
        return set(observe(box, method("return a + b") + textwrap.dedent(code)).returned)

    assert returned("def run_tests(): pass") == {"run_tests"}
    assert returned("def run_tests(): return True\ndef check(s): return s.f(1, 2)") == {"run_tests", "check"}
    assert returned("def run_tests(verbose=True, *, n=1): pass") == {"run_tests"}
    assert returned("def run_tests(): assert Solution().f(2, 3) != 6") == {"run_tests"}
    for real in (
        "assert Solution().f(2, 3) == 5",
        "assert Solution().f(2, 3)",
        "if Solution().f(2, 3) > 4: pass",
        "raise SystemExit(0)",
        "import unknown",
        "assert s.f(2, 3) == 5",
    ):
        assert returned(f"s = Solution()\ndef run_tests(): {real}") == set(), real
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
    forged = 'import os\nos.write(3, b\'["t","ok",["l","check","nonsense",5],["l","ok"]]\\n\')\nos._exit(0)'
    assert observe(box, forged) == Observation("ok", returned=frozenset({"check"}), truthy=frozenset({"ok"}))
    assert observe(box, forged.replace('["l"', '["x"')) == Observation("crash")


# ---- failures of the sandbox itself


def test_killed_server_is_replaced():
    with Sandbox(Limits(cpu_s=CPU_S)) as box:
        pid, directory = box.pid, box._servers[0].directory
        os.kill(pid, signal.SIGKILL)
        assert box.values([GOOD] * 3) == [GOOD_REPORT] * 3
        assert box.pid != pid and not os.path.exists(directory)


def test_second_failure_is_an_error_and_the_sandbox_recovers(monkeypatch):
    with Sandbox(Limits(cpu_s=CPU_S), workers=2) as box:
        send, programs = sandbox._Server.send, []

        def deadly(server, kind, payload):
            send(server, kind, payload)
            if b"deadly" in payload:
                while not (children := children_of(server.process.pid)):
                    time.sleep(0.01)
                time.sleep(0.05)
                programs.extend(children)
                server.process.kill()

        monkeypatch.setattr(sandbox._Server, "send", deadly)
        with pytest.raises(SandboxError, match="failed twice"):
            box.values([GOOD, ValueJob("deadly = 1\nimport time\ntime.sleep(60)", "f", ()), GOOD])
        assert box.values([GOOD] * 3) == [GOOD_REPORT] * 3
        deadline = time.monotonic() + 5
        while any(map(running, programs)) and time.monotonic() < deadline:
            time.sleep(0.01)  # the kernel ends the program of a killed server
        assert len(programs) == 2 and not any(map(running, programs))


def test_hanging_server(monkeypatch):
    monkeypatch.setattr(sandbox, "GRACE_S", 0.5)
    with Sandbox(Limits(wall_s=0.5)) as box:
        os.kill(box.pid, signal.SIGSTOP)
        assert box.values([GOOD]) == [GOOD_REPORT]


def test_child_that_cannot_be_confined_is_an_error(monkeypatch):
    with Sandbox(Limits(cpu_s=CPU_S)) as box:
        monkeypatch.setattr(sandbox, "_payload", lambda *args, **fields: b"not a job")
        with pytest.raises(SandboxError, match="could not be set up"):
            box.values([GOOD])
        monkeypatch.undo()
        assert box.values([GOOD]) == [GOOD_REPORT]


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
        monkeypatch.setattr(Sandbox, "_wait", staticmethod(lambda busy: (_ for _ in ()).throw(KeyboardInterrupt)))
        with pytest.raises(KeyboardInterrupt):
            box.values([ValueJob("def f(): return 'old'", "f", ((),))])
        monkeypatch.undo()
        assert box.values([GOOD]) == [GOOD_REPORT]


def test_close_leaves_nothing():
    before = descriptors("self")
    box = Sandbox(workers=2)
    pids, directories = [s.process.pid for s in box._servers], [s.directory for s in box._servers]
    box.values([GOOD] * 4)
    box.close()
    box.close()
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids) and not any(map(os.path.exists, directories))
    assert descriptors("self") == before and box.pid is None
    with pytest.raises(SandboxError, match="closed"):
        box.values([GOOD])


def test_server_ends_with_its_parent():
    script = """
        from vgrout.envs.sandbox import *
        box = Sandbox(Limits(cpu_s=30.0, wall_s=60.0))
        print(box.pid, box._servers[0].directory, flush=True)
        box.values([ValueJob("import time\\ndef f(): time.sleep(50)", "f", ((),))])
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
    bad = ValueJob("import os\nos._exit(1)", "f", ((),))
    reports = box.values([GOOD, bad] * 50)
    assert reports == [GOOD_REPORT, ValueReport("crash", (MISSING,))] * 50
    assert state() == before and not processes_of_programs(box)


@pytest.mark.parametrize("entry", ["", "a.b.c", "f()", ".f", "f."])
def test_bad_jobs_are_refused(box, entry):
    with pytest.raises(ValueError, match="entry"):
        ValueJob("", entry, ())
    with pytest.raises(TypeError):
        ValueJob("", "f", (1,))
    with pytest.raises(Refused):
        box.values([ValueJob("", "f", ((object(),),))])
    with pytest.raises(ValueError, match="positive"):
        Limits(cpu_s=0)
    assert box.values([GOOD]) == [GOOD_REPORT]


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
    status, values = read_values(data, 2)
    assert status in (None, "ok", "error", "memory") and len(values) == 2
    status, returned, truthy = read_facts(data, ObserveJob("", "f", (), ("t",), ("d",)))
    assert status in (None, "ok", "error", "memory") and returned <= {"t"} and truthy <= {"d"}
    try:
        value = decode(data)
    except Refused:
        return False
    assert repr(decode(encode(value))) == repr(value)
    return True


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60) | st.lists(st.sampled_from(TOKENS), max_size=30).map("".join).map(str.encode))
def test_any_bytes_are_read_or_refused(data):
    check_any_bytes(data)


def test_thousands_of_mutated_encodings_are_read_or_refused():
    dice = random.Random(0)
    value = [(1, -2.5, "a\n"), {"k": {1, 2}, (None, True): 1 << 60}, [[], {}, set()]]
    read = 0
    for _ in range(4000):
        parts = re.findall(r'"[^"]*"|[^"]', encode(value)) if dice.random() < 0.7 else dice.choices(TOKENS, k=9)
        for _ in range(dice.randint(1, 3)):
            start = dice.randrange(len(parts))
            parts[start : start + dice.randint(0, 2)] = dice.choices(TOKENS, k=dice.randint(0, 2))
        read += check_any_bytes("".join(parts).encode())
    assert 50 < read < 3900


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
    monkeypatch.setattr(_forkserver, "NODES", 1001)
    deep: object = 5
    for _ in range(64):
        deep = [deep]
    for value in (deep, [0] * 1000, (1 << (1 << 16)) - 1, "x" * (4 << 20)):
        assert decode(encode(value)) == value
    for value in ([deep], [0] * 1001, 1 << (1 << 16), "x" * ((4 << 20) + 1), object(), frozenset(), b"", 1j):
        with pytest.raises(Refused):
            encode(value)
    for text in ('["l"' + ",0" * 1001 + "]", '["l",' * 65 + "0" + "]" * 65):
        with pytest.raises(Refused):
            decode(text)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b'["t",0,1]\n["t",1,2]\n"ok"\n', ("ok", (1, 2))),
        (b'["t",1,2]\n"ok"\n', ("ok", (MISSING, 2))),
        (b'["t",0,1]\n["t",1', (None, (1, MISSING))),
        (b"", (None, (MISSING, MISSING))),
        (b'["t",0,1]\n["t",0,1]\n"ok"\n', (None, (MISSING, MISSING))),
        (b'["t",1,1]\n["t",0,1]\n"ok"\n', (None, (MISSING, MISSING))),
        (b'["t",2,1]\n"ok"\n', (None, (MISSING, MISSING))),
        (b'["t",-1,1]\n"ok"\n', (None, (MISSING, MISSING))),
        (b'["t",true,1]\n"ok"\n', (None, (MISSING, MISSING))),
        (b'["l",0,1]\n"ok"\n', (None, (MISSING, MISSING))),
        (b'["t",0,1]\n"ok"\n"ok"\n', (None, (MISSING, MISSING))),
        (b'["t",0,1]\n"ok"\n ', (None, (MISSING, MISSING))),
        (b'["t",0,1]\n"timeout"\n', (None, (MISSING, MISSING))),
        (b'["t",0,1]\n["t",1,1]\n"ok"\n["t",1,1]\n', (None, (MISSING, MISSING))),
        (b"\n" * 100_000, (None, (MISSING, MISSING))),
    ],
)
def test_reports(data, expected):
    assert read_values(data, 2) == expected
