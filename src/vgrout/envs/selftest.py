"""Is this sandbox, on this machine, today, what it says it is? Asked before anything is trained or graded.

Ten correct programs must be right, twenty attacks must fail, and a server that is killed must show as a fault of the
infrastructure that is made good, not as a verdict. The full catalog is in tests/attacks.py; this is the part that
notices a missing layer.
"""

from __future__ import annotations

from vgrout.envs.jobs import Job, Limits
from vgrout.envs.micro import problems
from vgrout.envs.oracle import agrees
from vgrout.envs.sandbox import Sandbox, SandboxError

RIGHT = 10  # correct programs


def _try(code: str) -> str:
    """A program that returns 'out' if `code` raises nothing."""
    return (
        f"import os, ctypes, sys\ndef f():\n    try: {code}\n    except BaseException: return 'in'\n    return 'out'\n"
    )


_SYSCALL = "assert ctypes.CDLL(None).syscall({}) >= 0"
STRICT = {  # needs Landlock and seccomp
    "read a file": "open('/etc/passwd').read()",
    "list the root directory": "os.listdir('/')",
    "write a temporary file": "open('/tmp/vgrout-self-test', 'w')",
    "write to a device": "open('/dev/null', 'w')",
    "read the server's state": "open(f'/proc/{os.getppid()}/environ').read()",
    "list its sibling directories": "os.listdir('..')",
    "open a socket": _SYSCALL.format("41, 2, 1, 0"),
    "signal the server": "os.kill(os.getppid(), 0)",
    "trace": _SYSCALL.format("101, 0, 0, 0, 0"),
    "use io_uring": _SYSCALL.format("425, 1, bytes(120)"),
    "map executable memory": "__import__('mmap').mmap(-1, 4096, prot=7)",
    "make a namespace": _SYSCALL.format("272, 0"),
    "make a link": "open('x', 'w').close() or os.link('x', 'y')",
    "share memory": _SYSCALL.format("29, 0, 4096, 0o1600"),
    "become dumpable": _SYSCALL.format("157, 4, 1, 0, 0, 0"),
}
ALWAYS = {
    "fork": "os.fork() or os._exit(0)",
    "start a program": "os.posix_spawn('/bin/true', ['true'], {})",
    "lift a limit": "__import__('resource').setrlimit(7, (64, 64))",
    "take memory": "x = bytearray(8 << 30)",
    "find the verdict": "assert [v for v in sys._getframe(1).f_locals.values() if v == 'out']",
}


def self_test(sandbox: Sandbox) -> None:
    """Raises SandboxError, naming what went wrong, where the sandbox does not do what it claims. About half a second
    on an idle machine. A weak sandbox is not asked for what it says that it lacks."""
    chosen = problems("test")[:RIGHT]
    tests = [p.reward_tests + p.oracle_tests for p in chosen]
    jobs = [Job(p.canonical, p.entry, tuple(a for a, _ in t)) for p, t in zip(chosen, tests, strict=True)]
    for problem, asked, report in zip(chosen, tests, sandbox.run(jobs), strict=True):
        if report.status != "ok" or not all(agrees(v, e) for v, (_, e) in zip(report.values, asked, strict=True)):
            raise SandboxError(f"self-test: the canonical program of {problem.id} came back as {report.status}")
    attacks = ALWAYS if sandbox.weak else ALWAYS | STRICT
    reports = sandbox.run([Job(_try(code), "f", ((),)) for code in attacks.values()])
    open_ = [what for what, report in zip(attacks, reports, strict=True) if report.values == ("out",)]
    if open_:
        raise SandboxError(f"self-test: a program can {', '.join(open_)}")
    with Sandbox(Limits(), allow_weak=sandbox.weak) as victim:
        before = victim.pid
        victim.kill()
        if victim.run(jobs[:1])[0].status != "ok" or victim.pid == before:
            raise SandboxError("self-test: a killed server was not noticed")
