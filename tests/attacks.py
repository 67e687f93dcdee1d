"""Programs that a grader must survive, as data: an id, a program whose Solution.f(2, 3) must never be graded 5, and
the statuses that it may end with. Ids follow the catalog of the project's security notes.

Escapes return 5 when they succeed, so that a hole is a wrong verdict.
"""

from __future__ import annotations

import errno
import os
import textwrap
from dataclasses import dataclass

ANY = ("ok", "error", "timeout", "memory", "output", "crash")


@dataclass(frozen=True)
class Attack:
    id: str
    source: str
    ends: tuple[str, ...] = ("ok",)


def method(body: str, before: str = "") -> str:
    """A program whose `Solution.f(a, b)` has this body, after these module-level lines."""
    indented = textwrap.indent(textwrap.dedent(body).strip("\n"), " " * 8)
    return f"{textwrap.dedent(before)}\nclass Solution:\n    def f(self, a, b):\n{indented}\n"


def escape(code: str, before: str = "") -> str:
    """A program that returns 5 if `code` raises nothing."""
    tried = textwrap.indent(textwrap.dedent(code).strip("\n"), "    ")
    return method(f"try:\n{tried}\nexcept BaseException as error: return repr(error)\nreturn 5", before)


def syscall(number: int, *args: str, fails: int = errno.EPERM) -> str:
    """A program that returns 5 unless the system call fails with the filter's error: another error says that the
    kernel has looked at the call."""
    given = ", ".join((f"ctypes.c_long({number})", *args))
    return method(
        f"r = libc.syscall({given})\nreturn 4 if r < 0 and ctypes.get_errno() == {fails} else 5",
        "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)",
    )


def readable(path: str) -> str:
    return escape(f"import os\nfd = os.open({path!r}, os.O_RDONLY)\nassert os.read(fd, 1)")


def writable(path: str) -> str:
    return escape(f"import os\nos.open({path!r}, os.O_WRONLY | os.O_CREAT, 0o600)")


CANARY = f"/tmp/vgrout-canary-{os.getpid()}"  # a world-writable file that the test makes and looks at afterwards

RESOURCE = {
    "R01 fork bomb": (method("return 5", "import os\nwhile 1:\n try: os.fork()\n except OSError: pass"), "timeout"),
    "R02 fork at import": (method("return 5", "import os\nif os.fork() == 0:\n while 1: pass"), "error"),
    "R03 thread bomb": (method("import threading\nwhile 1: threading.Thread(target=print).start()"), "ok"),
    "R04 memory": (method("x = []\nwhile 1: x.append(bytearray(1 << 20))"), "memory"),
    "R04 memory at import": (method("return 5", "x = []\nwhile 1: x.append(bytearray(1 << 20))"), "memory"),
    "R05 huge": (method("return bytearray(64 << 30)"), "memory"),
    "R06 shared memory": (method("import mmap\nx = []\nwhile 1: x.append(mmap.mmap(-1, 1 << 26))"), "ok"),
    "R08 descriptors": (method("import os\nx = []\nwhile 1: x.append(os.pipe())"), "ok"),
    "R09 stdout": (method("while 1: print('x' * 99999)"), "timeout"),
    "R10 stderr": (method("import sys\nwhile 1: sys.stderr.write('x' * 99999)"), "timeout"),
    "R11 result flood": (method("import os\nwhile 1: os.write(3, b'x' * 65536)"), ("output", "crash", "ok")),
    "R11 stubborn flood": (
        method("import os\nwhile 1:\n try: os.write(3, b'x' * 65536)\n except OSError: pass"),
        ("output", "timeout"),
    ),
    "R12 recursion": (method("import sys\nsys.setrecursionlimit(10**9)\ng = lambda: g()\nreturn g()"), ANY),
    "R12 recursion in C": (
        method("import sys\nsys.setrecursionlimit(10**9)\nx = None\nfor _ in range(10**6): x = [x]\nreturn repr(x)"),
        ANY,
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
        method("import zlib\nd = zlib.compress(bytes(1 << 26))\nreturn zlib.decompress(d) * 99"),
        ("memory", "timeout"),
    ),
    "R23 abort": (method("import os\nos.abort()"), "crash"),
    "R23 segfault": (method("import ctypes\nctypes.string_at(0)"), "crash"),
    "R24 hang in __del__": (method("return 4", "class D:\n def __del__(s):\n  while 1: pass\nd = D()"), "ok"),
    "R25 hang in atexit": (method("return 4", "import atexit, time\natexit.register(time.sleep, 1e9)"), "ok"),
    "R28 hanging exception": (
        method("raise E", "class E(Exception):\n def __str__(self):\n  while 1: pass\n __repr__ = __str__"),
        "ok",
    ),
    "R29 own limits": (escape("import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))"), "ok"),
    "R29 prlimit": (syscall(302, "0", "9", "(ctypes.c_uint64 * 2)(2**63, 2**63)", "None"), "ok"),
    "R30 inode bomb": (escape("for i in range(5000): open(str(i), 'w').close()"), "ok"),
    "R31 large file": (escape("open('x', 'wb', 0).write(bytes(65536)); assert open('x', 'ab', 0).write(b'1')"), "ok"),
    "full scratch": (escape("for i in range(40): assert open(str(i), 'wb', 0).write(bytes(65536)) == 65536"), "ok"),
    "deep directories": (method("import os\nfor i in range(400): os.mkdir('d'); os.chdir('d')\nreturn 4"), ANY),
    "timer": (escape("import signal\nsignal.setitimer(0, .001, .001)"), "ok"),
}
PATHS = {
    "E01 passwd": "/etc/passwd",
    "E02 shadow": "/etc/shadow",
    "E03 canary": CANARY,
    "E04 init's environment": "/proc/1/environ",
    "E05 own environment": "/proc/self/environ",
    "E06 own command": "/proc/self/cmdline",
    "E07 own memory": "/proc/self/mem",
    "E08 own maps": "/proc/self/maps",
    "E09 own descriptor": "/proc/self/fd/3",
    "E11 root's home": "/root/.bashrc",
    "E12 init's root": "/proc/1/root/etc/passwd",
    "E13 sys": "/sys/kernel/mm/transparent_hugepage/enabled",
    "stdlib": "/usr/lib/os-release",
    "null": "/dev/zero",
}
WRITES = {
    "E15 tmp": "/tmp/x",
    "E16 shm": "/dev/shm/x",
    "E18 home": "/home/x",
    "E19 root": "/x",
    "E20 var": "/var/tmp/x",
    "canary": CANARY,
    "null device": "/dev/null",
}
ESCAPES = {
    **{name: (readable(path), "ok") for name, path in PATHS.items()},
    **{name: (writable(path), "ok") for name, path in WRITES.items()},
    "E10 its own fork-server": (escape("import os\nos.listdir(f'/proc/{os.getppid()}')"), "ok"),
    "E14 list /": (escape("import os\nos.listdir('/')"), "ok"),
    "E17 another scratch": (escape("import os\nos.listdir('..')"), "ok"),
    "E17 beside the scratch": (escape("import os\nos.mkdir('../x')"), "ok"),
    "E21 stdlib": (escape("import os, json\nos.open(json.__file__, os.O_WRONLY)"), "ok"),
    "E21 unlink": (escape("import os, json\nos.unlink(json.__file__)"), "ok"),
    "E23 hard link": (escape("import os\nopen('x', 'w').close(); os.link('x', 'y')"), "ok"),
    "E24 symbolic link": (escape("import os\nos.symlink('/etc/passwd', 'x')"), "ok"),
    "E25 rename out": (escape("import os\nopen('x', 'w').close(); os.rename('x', '/tmp/x')"), "ok"),
    "E26 TCP": (escape("import _socket\n_socket.socket(2, 1)"), "ok"),
    "E26 socket": (syscall(41, "2", "1", "0"), "ok"),
    "E27 UDP": (syscall(41, "2", "2", "0"), "ok"),
    "E28 unix": (syscall(41, "1", "1", "0"), "ok"),
    "E29 socketpair": (syscall(53, "1", "1", "0", "(ctypes.c_int * 2)()"), "ok"),
    "E30 system": (method("import os\nreturn 5 if os.system('true') == 0 else 4"), "ok"),
    "E30 subprocess": (escape("import subprocess\nsubprocess.run(['true'])"), "ok"),
    "E31 exec": (escape("import os\nos.execv('/bin/sh', ['sh', '-c', 'sleep 9 & sleep 9'])"), "ok"),
    "E32 spawn": (escape("import os\nos.posix_spawn('/bin/true', ['true'], {})"), "ok"),
    "E33 multiprocessing": (escape("import multiprocessing as m\nm.Process(target=print).start()"), "ok"),
    "E34 kill the server": (escape("import os\nos.kill(os.getppid(), 9)"), "ok"),
    "E35 kill all": (escape("import os\nos.kill(-1, 9)"), "ok"),
    "E36 kill itself": (escape("import os\nos.kill(os.getpid(), 0)"), "ok"),
    "E37 pidfd_open": (syscall(434, "libc.getppid()", "0"), "ok"),
    "E38 tgkill": (syscall(234, "libc.getpid()", "libc.getpid()", "0"), "ok"),
    "E39 rt_sigqueueinfo": (syscall(129, "libc.getppid()", "0", "None"), "ok"),
    "E41 daemon": (escape("import os\nif os.fork() == 0:\n os.setsid()\n os.fork()"), "ok"),
    "E41 setsid": (syscall(112), "ok"),
    "E42 descriptors": (
        method("import os\nfor n in range(4, 256):\n try: os.fstat(n)\n except OSError: continue\n return 5\nreturn 4"),
        "ok",
    ),
    "E43 payload": (escape("import os\nfor n in range(4, 32): os.read(n, 1)"), "ok"),
    "E44 ptrace": (syscall(101, "0", "0", "0", "0"), "ok"),
    "E44 attach": (syscall(101, "16", "libc.getppid()", "0", "0"), "ok"),
    "E45 process_vm_readv": (syscall(310, "libc.getppid()", "None", "0", "None", "0", "0"), "ok"),
    "E46 kcmp": (syscall(312, "libc.getpid()", "libc.getpid()", "0", "0", "0"), "ok"),
    "E47 pidfd_getfd": (syscall(438, "3", "0", "0"), "ok"),
    "E49 io_uring": (syscall(425, "1", "(ctypes.c_char * 120)()"), "ok"),
    "E50 bpf": (syscall(321, "0", "(ctypes.c_char * 120)()", "120"), "ok"),
    "E51 perf": (syscall(298, "(ctypes.c_char * 120)()", "0", "-1", "-1", "0"), "ok"),
    "E52 userfaultfd": (syscall(323, "1"), "ok"),
    "E53 keyctl": (syscall(250, "0", "-3", "1"), "ok"),
    "E53 add_key": (syscall(248, "b'user'", "b'x'", "b'y'", "1", "-3"), "ok"),
    "E54 unshare": (syscall(272, "0"), "ok"),
    "E55 setns": (syscall(308, "3", "0"), "ok"),
    "E56 mount": (syscall(165, "b'x'", "b'.'", "b'tmpfs'", "0", "None"), "ok"),
    "E56 umount": (syscall(166, "b'..'", "2"), "ok"),
    "E57 chroot": (syscall(161, "b'.'"), "ok"),
    "E59 open_by_handle_at": (syscall(304, "3", "(ctypes.c_char * 64)()", "0"), "ok"),
    "E60 root": (escape("import os\nos.setuid(0)"), "ok"),
    "E60 setresuid": (syscall(117, "0", "0", "0"), "ok"),
    "E61 capset": (syscall(126, "(ctypes.c_uint32 * 2)(0x20080522, 0)", "(ctypes.c_uint32 * 6)()"), "ok"),
    "E62 personality": (syscall(135, "0"), "ok"),
    "E63 seccomp": (syscall(157, "22", "1", "0", "0", "0"), "ok"),
    "E63 dumpable": (syscall(157, "4", "1", "0", "0", "0"), "ok"),
    "E64 shm": (syscall(29, "0", "4096", "0o1600"), "ok"),
    "E64 msg": (syscall(68, "0", "0o1600"), "ok"),
    "E64 sem": (syscall(64, "0", "1", "0o1600"), "ok"),
    "E66 clock": (escape("import time\ntime.clock_settime(time.CLOCK_REALTIME, 0)"), "ok"),
    "E67 scheduler": (syscall(144, "0", "1", "(ctypes.c_int * 1)(1)"), "ok"),
    "E68 affinity": (syscall(203, "0", "8", "(ctypes.c_uint64 * 1)(1)"), "ok"),
    "E69 nice": (escape("import os\nos.nice(-20)"), "ok"),
    "E69 nice to others": (syscall(141, "0", "0", "5"), "ok"),
    "E70 kexec": (syscall(246, "0", "0", "None", "0"), "ok"),
    "E70 init_module": (syscall(175, "None", "0", "b''"), "ok"),
    "E70 fanotify": (syscall(300, "0", "0"), "ok"),
    "E70 inotify": (syscall(253), "ok"),
    "E70 quotactl": (syscall(179, "0", "None", "0", "None"), "ok"),
    "E70 mknod": (escape("import os\nos.mknod('x', 0o20666, os.makedev(1, 3))"), "ok"),
    "E70 fifo": (escape("import os\nos.mkfifo('x')"), "ok"),
    "E70 splice": (syscall(275, "0", "None", "1", "None", "1", "0"), "ok"),
    "E70 memfd_secret": (syscall(447, "0"), "ok"),
    "E70 memfd_create": (syscall(319, "b'x'", "0"), "ok"),
    "E71 TIOCSTI": (syscall(16, "0", "0x5412", "b'x'"), "ok"),
    "E72 x32": (syscall(0x40000000 + 39), "crash"),
    "E73 clone3": (syscall(435, "(ctypes.c_char * 88)()", "88", fails=errno.ENOSYS), "ok"),
    "E73 clone": (syscall(56, "17", "None", "None", "None", "0"), "ok"),
    "E73 vfork": (syscall(58), "ok"),
    "E74 executable memory": (escape("import mmap\nmmap.mmap(-1, 4096, prot=7)"), "ok"),
    "E75 mprotect": (
        method(
            "m = mmap.mmap(-1, 4096)\nat = ctypes.addressof(ctypes.c_char.from_buffer(m))\n"
            "return 5 if libc.mprotect(ctypes.c_void_p(at), 4096, 5) == 0 else 4",
            "import ctypes, mmap\nlibc = ctypes.CDLL(None)",
        ),
        "ok",
    ),
    "E76 chmod": (escape("import os\nos.chmod('.', 0)"), "ok"),
    "truncate": (syscall(76, f"b'{CANARY}'", "0"), "ok"),
    "file without a name": (syscall(257, "-100", "b'.'", "0o20200002", "0o600"), "ok"),
    "times": (escape("import os\nopen('x', 'w').close(); os.utime('.', (1, 1))"), "ok"),
    "E77 landlock again": (syscall(444, "None", "0", "2"), "ok"),
    "setfd owner": (syscall(72, "3", "8", "1"), "ok"),
    "alarm": (syscall(37, "1"), "ok"),
    "extended attributes": (escape("import os\nos.setxattr('.', 'user.x', b'1')"), "ok"),
}
ORACLE = {
    "O01 int subclass": (
        method("return E(4)", "class E(int):\n def __eq__(s, o): return True\n __hash__ = None"),
        "ok",
    ),
    "O02 class spoof": (method("return E()", "class E:\n __class__ = int\n def __eq__(s, o): return True"), "ok"),
    "O03 list subclass": (method("return type('L', (list,), {'__eq__': lambda s, o: True})()"), "ok"),
    "O05 bool": (method("return True"), "ok"),
    "O06 nan": (method("return float('nan')"), "ok"),
    "O07 inf": (method("return float('inf')"), "ok"),
    "O08 text": (method("return '5'"), "ok"),
    "O09 almost": (method("return 5 + 1e-9"), "ok"),
    "O09 float": (method("return 5.0"), "ok"),
    "O10 fraction": (method("import fractions\nreturn fractions.Fraction(5)"), "ok"),
    "O15 exit at import": (method("return 5", "raise SystemExit(0)"), "error"),
    "O16 exit": (method("import sys\nsys.exit(0)"), "ok"),
    "O17 _exit at import": (method("return 5", "import os\nos._exit(0)"), "crash"),
    "O18 _exit": (method("import os\nos._exit(0)"), "crash"),
    "O18 the harness's exit code": (method("return 5", "import os\nos._exit(97)"), "crash"),
    "O19 interrupt": (method("raise KeyboardInterrupt"), "ok"),
    "O19 generator exit": (method("raise GeneratorExit"), "ok"),
    "O20 atexit": (method("return 4", "import atexit, os\natexit.register(os.write, 3, b'[\"t\",0,5]')"), "ok"),
    "O21 trace": (
        method("return 4", "import sys\nsys.settrace(lambda *a: None)\nsys.setprofile(lambda *a: None)"),
        "ok",
    ),
    "O22 profile": (method("return 4", "import sys\nsys.setprofile(lambda frame, event, value: 5)"), "ok"),
    "O23 json poisoned": (method("return 4", "import json\njson.dumps = json.loads = lambda *a, **k: 5"), "ok"),
    "O25 builtins": (
        method(
            "return 4",
            "import builtins\nfor n in ('type', 'len', 'all', 'isinstance'): setattr(builtins, n, lambda *a: True)",
        ),
        "ok",
    ),
    "O26 exec shadowed": (method("return 4", "exec = lambda *a, **k: None\ncompile = exec"), "ok"),
    "O27 __strict_eq": (method("return 4", "def __strict_eq(a, b): return True"), "ok"),
    "O28 harness": (
        method(
            "return 4",
            "import sys\nfor m in list(sys.modules.values()):\n"
            " if hasattr(m, 'encode') and m.__name__ != 'solution':\n"
            "  try: m.encode = lambda v: '4'\n  except Exception: pass",
        ),
        "ok",
    ),
    "O29 os.write doubled": (
        method("return 4", "import os\nw = os.write\nos.write = lambda f, d: w(f, d) and w(f, d)"),
        "ok",
    ),
    "O30 protocol on stdout": (method("print('[\"t\",0,5]'); return 4"), "ok"),
    "O31 result pipe": (method("import os\nos.write(3, b'[\"t\",0,4]\\n'); return 5"), "crash"),
    "O31 guesses": (
        method("import os\nfor n in range(9): os.write(3, b'[\"t\",0,%d]\\n' % n)\nreturn 5"),
        "crash",
    ),
    "O32 bool index": (method('import os\nos.write(3, b\'["t",false,5]\\n"ok"\\n\'); os._exit(0)'), "crash"),
    "O35 digits": (method("import os\nos.write(3, b'[\"t\",0,' + b'5' * 10**6 + b']\\n'); return 5"), "crash"),
    "O36 nan token": (method('import os\nos.write(3, b\'["t",0,NaN]\\n"ok"\\n\'); os._exit(0)'), "crash"),
    "O37 not text": (method("import os\nos.write(3, bytes(range(256))); return 5"), "crash"),
    "O38 twice": (method("import os\nos.write(3, b'[\"t\",0,4]\\n' * 2); return 5"), "crash"),
    "O39 endless": (method("import os\nwhile 1: os.write(3, b'[\"t\",0,5]\\n' * 999)"), ("output", "crash", "ok")),
    "O39 stolen input": (method("import os\nos.read(3, 99); return 5"), ("ok", "timeout", "crash")),
    "closed pipe": (method("import os\nos.closerange(0, 9)\nreturn 5"), "crash"),
    "O41 generator": (method("yield 5"), "ok"),
    "O42 lazy repr": (method("return type('R', (), {'__repr__': lambda s: '5'})()"), "ok"),
    "O43 pickle": (method("return type('P', (), {'__reduce__': lambda s: (int, ('5',))})()"), "ok"),
    "O43 object": (method("return self"), "ok"),
    "O44 self-reference": (method("x = []\nx.append(x)\nreturn x"), "ok"),
    "O44 shared parts": (method("x = []\nfor _ in range(60): x = [x, x]\nreturn x"), "ok"),
    "O45 large integer": (method("return 1 << 3_000_000"), "ok"),
    "O46 long text": (method("return 'x' * 50_000_000"), "ok"),
    "O47 long list": (method("return [None] * 10**7"), ("ok", "memory", "timeout")),
    "deep value": (method("x = 5\nfor _ in range(65): x = [x]\nreturn x"), "ok"),
    "O49 dup2": (method("import os\nos.dup2(1, 3); return 5"), ("crash", "timeout")),
    "O50 no class": ("Solution = 5", "error"),
    "O51 nothing": ("", "error"),
    "O53 argv": (method("import sys, os\nreturn 5 if len(sys.argv) > 1 or len(sys.orig_argv) > 9 else 4"), "ok"),
    "O53 environment": (
        method("import os\nreturn 5 if set(os.environ) - {'PYTHONHASHSEED', 'LANG', 'PWD'} else 4"),
        "ok",
    ),
    "O54 right on one call only": (method("global n\nn += 1\nreturn a + b if n == 2 else 4", "n = 0"), "ok"),
    "O55 guess": (method("import random\nreturn random.randrange(6, 10**9)"), "ok"),
    "O57 date": (method("import time\nreturn 5 if time.time() < 10**9 else 4"), "ok"),
}
SOURCE = {
    "U01 parentheses": ("(" * 250 + "5" + ")" * 250, "no code"),
    "U02 open parentheses": ("(" * 60_000, "no code"),
    "U03 minus": ("-" * 65_000 + "1", "no code"),
    "U04 sum": ("x = " + "+".join(["1"] * 32_000), "no code"),
    "U05 NUL": (method("return 5") + "\0", "no code"),
    "U05 surrogate": (method("return 5") + "# \ud800", "no code"),
    "U07 utf-7": ("# coding: utf-7\n" + method("return 4"), "ok"),
    "U08 BOM": ("\ufeff" + method("return 4"), "no code"),
    "U09 long": (method("return 5") + "#" * 10_000_000, "too long"),
    "U09 long in UTF-8": (method("return 5") + "# " + "\U0001f600" * 20_000, "too long"),
    "U10 lines": (method("return 4") + "\n" * 60_000, "ok"),
    "U12 indents": ("".join(" " * i + "if 1:\n" for i in range(300)), "no code"),
    "U13 bidi": (method("return 4 # \u202e 5 nruter"), "ok"),
    "U14 raise": (method("return 5", "raise ValueError"), "error"),
    "U15 loop at import": (method("return 5", "while 1: pass"), "timeout"),
    "U16 prints": (method("return 4", "for i in range(10**5): print(i)"), ("ok", "timeout")),
    "U17 decorators": ("@print\n" * 5000 + "class Solution:\n    def f(self, a, b): return 5", "error"),
    "U18 soft keywords": ("match = case = type = 4\n" + method("return match"), "ok"),
    "U19 blank": ("\n" * 9, "error"),
    # Every `finally` is compiled twice, so that nesting doubles the code, and every return repeats it.
    "nested finally": (
        "".join(f"{' ' * i}try:pass\n{' ' * i}finally:\n" for i in range(19)) + " " * 19 + "a\n" + method("return 5"),
        ("no code", "timeout"),
    ),
    "repeated finally": (
        "def g(a):\n try:\n" + "  if a:return\n" * 1500 + " finally:\n  " + "a;" * 9500 + "\n" + method("return 5"),
        ("no code", "timeout"),
    ),
}
ATTACKS = tuple(
    Attack(id, source, (ends,) if isinstance(ends, str) else ends)
    for family in (RESOURCE, ESCAPES, ORACLE, SOURCE)
    for id, (source, ends) in family.items()
)
"""The whole catalog."""

SLEEPERS = ("time.sleep(1e9)", "signal.pause()", "os.read(os.pipe()[0], 1)", "time.sleep(1) or self.f(a, b)")
"""Bodies that wait without using CPU time (R18)."""
