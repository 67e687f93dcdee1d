"""Fork-server of the sandbox: one fresh forked process per untrusted program. Standard library only.

Started by `sandbox.py` with the control socket as fd 0; importing this file does no work. It also holds the codec for
plain data, because the parent (inputs out, values back) and the child use the same one.

A request is one byte (`v` values, `o` observe) plus the descriptor of a file with the job. The server never reads
that file, and reads what a program writes only into memory that forks do not inherit (MADV_DONTFORK), so a later
program finds nothing of an earlier one in its memory, except perhaps names of files. The process's CPU clock decides;
wall time is a backstop.

Covers: one process per program and no other (RLIMIT_NPROC 0; exec stays within the same limits), CPU, memory, file,
descriptor and output limits, an unused uid per server when started as root, no inherited descriptors or environment,
no debugging by others, no gain of privileges, kill and reap.
Does not cover: system calls open to that uid (reading world-readable files, writing /tmp, sockets), the number of
files in the scratch directory, kernel bugs. No Landlock, seccomp or namespace: `Server.confine` is the place for
them, `Server.tier` for saying so.
"""

import builtins
import contextlib
import gc
import json
import mmap
import os
import re
import resource
import select
import signal
import stat
import sys
import time

# Functions defined below look builtins up in this copy, out of reach of a program that replaces builtins.
__builtins__ = dict(vars(builtins))

DEPTH = 64  # nesting of a value
NODES = 200_000  # atoms and containers of a value
TEXT = 4 << 20  # characters in all strings of a value
INT_BITS = 1 << 16  # size of an integer
SAFE_INT = 1 << 53  # beyond this an integer travels as tagged hex
SAME_HASH = 16  # dict keys or set members that may share one hash
FILE_BYTES = 1 << 16  # size of one file in the scratch directory
MAX_FILES = 63  # files read back from it
STACK_BYTES = 64 << 20
RECURSION = 10_000
MAX_FD = 256
RESULT_FD = 3
SETUP_FAILED = 97  # exit code of a child that could not confine itself (and then never says READY)
READY = b"R"
UIDS = range(60_578, 61_184)  # not assigned by login.defs, systemd or distributions

# The modules a program may import: loaded before the fork, so that it does not depend on which files the dropped uid
# can read, and costs a program nothing.
_PRELOAD = """
    __future__ abc array base64 bisect calendar cmath collections collections.abc contextlib copy ctypes dataclasses
    datetime decimal enum fractions functools graphlib heapq inspect io itertools json logging math numbers operator
    os pprint queue random re secrets statistics string struct sys textwrap threading time timeit traceback types
    typing unittest warnings zlib _strptime encodings.ascii encodings.latin_1 encodings.utf_8 encodings.utf_16
"""
PRELOAD = tuple(_PRELOAD.split())


# ---- plain data codec


class Refused(ValueError):
    """The value is not plain data within the limits, or the text does not encode one."""


_TAGS = {list: '["l"', tuple: '["t"', set: '["s"', dict: '["d"'}
_HEX_INT = re.compile(rf"-?0x[0-9a-f]{{1,{INT_BITS // 4}}}", re.ASCII)
_HEX_FLOAT = re.compile(r"-?(0x[01]\.[0-9a-f]{1,13}p[+-][0-9]{1,4}|inf)|nan", re.ASCII)
_quote = json.encoder.encode_basestring_ascii


def encode(value: object) -> str:
    """Plain data as one line of ASCII JSON: null, true, 1, "text", ["i","0x.."], ["f","0x1.8p+1"], ["l",..],
    ["t",..], ["s",..], ["d",key,value,..]. Exact builtin types only. Raises `Refused`."""
    parts: list[str] = []
    _write(value, 0, parts, [NODES, TEXT])
    return "".join(parts)


def _write(item, depth, parts, left):
    left[0] -= 1
    if left[0] < 0 or depth > DEPTH:
        raise Refused("value is too deep or too large")
    kind = type(item)
    if item is None or kind is bool:
        parts.append("null" if item is None else "true" if item else "false")
    elif kind is int and item.bit_length() <= INT_BITS:
        parts.append(f"{item}" if -SAFE_INT <= item <= SAFE_INT else f'["i","{item:#x}"]')
    elif kind is float:
        parts.append(f'["f","{item.hex()}"]')
    elif kind is str and len(item) <= left[1]:
        left[1] -= len(item)
        parts.append(_quote(item))
    elif kind in _TAGS:
        parts.append(_TAGS[kind])
        for part in item if kind is not dict else [part for pair in item.items() for part in pair]:
            parts.append(",")
            _write(part, depth + 1, parts, left)
        parts.append("]")
    else:
        raise Refused("not plain data, or too large")


def _refuse(_):
    raise Refused("not part of the encoding")


def _small_int(digits: str) -> int:
    if len(digits) > 17 or not -SAFE_INT <= (number := int(digits)) <= SAFE_INT:
        raise Refused("integer out of range")
    return number


def _hashable(keys: list) -> list:
    # Equal hashes make a table quadratic to build; real data has few.
    hashes = sorted(map(hash, keys))
    if any(a == b for a, b in zip(hashes, hashes[SAME_HASH:], strict=False)):
        raise Refused("too many equal hashes")
    return keys


def decode(text: bytes | str, depth: int = DEPTH) -> object:
    """The value that `encode` wrote as `text`, as fresh objects. Pure; raises `Refused` for any other input.

    Memory stays below about 30 times the length of `text`.
    """
    strict = {"parse_float": _refuse, "parse_constant": _refuse, "object_pairs_hook": _refuse}
    try:
        text = text.decode("ascii") if isinstance(text, bytes) else text
        return _build(json.loads(text, parse_int=_small_int, **strict), depth, [NODES])
    except Refused:
        raise
    except (ValueError, TypeError, IndexError, OverflowError, RecursionError) as error:
        raise Refused(f"malformed: {type(error).__name__}") from None


def _build(tree, depth, left):
    left[0] -= 1
    if left[0] < 0 or depth < 0:
        raise Refused("value is too deep or too large")
    if type(tree) is not list:
        return tree
    tag, parts = tree[0], tree[1:]
    if tag == "i" and len(parts) == 1 and _HEX_INT.fullmatch(parts[0]):
        return int(parts[0], 16)
    if tag == "f" and len(parts) == 1 and _HEX_FLOAT.fullmatch(parts[0]):
        return float.fromhex(parts[0])
    if tag not in ("l", "t", "s", "d"):
        raise Refused("unknown tag")
    built = [_build(part, depth - 1, left) for part in parts]
    if tag == "d":
        return dict(zip(_hashable(built[::2]), built[1::2], strict=True))
    return built if tag == "l" else tuple(built) if tag == "t" else set(_hashable(built))


# ---- inside the child, with the program


def _attempt(function, *args) -> tuple[bool, object]:
    """Whether the call returned, and what."""
    try:
        return True, function(*args)
    except BaseException:  # a program may raise anything
        return False, None


def _load(job: dict):
    """Run the program as a module `solution`; return its namespace, the class or function, the method's name."""
    module = sys.modules["solution"] = type(sys)("solution")
    namespace = module.__dict__
    namespace["__builtins__"] = builtins
    exec(compile(job["source"], "<solution>", "exec", dont_inherit=True), namespace)
    owner, _, method = job["entry"].rpartition(".")
    target = namespace[owner or method]
    if owner:
        getattr(target, method)
    return namespace, target, method if owner else None


def _values(job: dict, put) -> None:
    """Call the entry once per input; `put` the encoded tuple (index, value) after each call, then the status."""
    inputs = [decode(text) for text in job["inputs"]]
    put(READY)
    status = "ok"
    try:
        _, target, method = _load(job)
        for index, args in enumerate(inputs):
            try:
                line = encode((getattr(target(), method) if method else target)(*args))
            except MemoryError:
                status, line = "memory", None
            except BaseException:  # that call has no value; the later ones are made
                line = None
            if line is not None:
                put(f'["t",{index},{line}]\n'.encode())
    except MemoryError:
        status = "memory"
    except BaseException:
        status = "error"
    put(f'"{status}"\n'.encode())


class Opaque:
    """Equals nothing, has no order and no truth value."""

    __slots__ = ()
    __hash__ = object.__hash__

    def __eq__(self, other):
        return False

    def __ne__(self, other):
        return True

    def __bool__(self):
        raise TypeError("a stubbed result has no truth value")


def _stub(namespace: dict, target, method: str | None):
    """Put a stub in place of the entry, under every name it has; return what to hand to a checking function."""

    def answer(*args, **kwargs):
        return Opaque()

    stub = handed = answer
    if method:
        stub = type("Stub", (), {method: answer, "__init__": lambda self, *args, **kwargs: None})
        handed = stub()
        setattr(target, method, answer)  # for objects of the class that exist already
    for name, value in list(namespace.items()):
        if value is target:
            namespace[name] = stub
    return handed


def _arguments(function, handed) -> tuple | None:
    """What to call a checking function with; None if it needs more, or if a call does not run its body."""
    code, optional = function.__code__, len(function.__defaults__ or ())
    keyword_only = set(code.co_varnames[code.co_argcount : code.co_argcount + code.co_kwonlyargcount])
    lazy = code.co_flags & (0x20 | 0x80 | 0x200)  # generator, coroutine, asynchronous generator
    needed = code.co_argcount - optional
    if lazy or needed > 1 or keyword_only - set(function.__kwdefaults__ or ()):
        return None
    return (handed,) * needed


def _truthy(owner, name: str) -> bool:
    value = getattr(owner, name)
    # A method or a descriptor is a definition, not a value that was set.
    return not hasattr(type(value), "__get__") and type(value) is not METHOD and bool(value)


FUNCTION, METHOD = type(_truthy), type(Opaque().__eq__)


def _observe(job: dict, put) -> None:
    """Call the entry once, look at attributes and checking functions; `put` (status, returned, truthy)."""
    args, flush, dup2 = decode(job["input"]), sys.stdout.flush, os.dup2
    null = os.open(os.devnull, os.O_WRONLY)
    put(READY)
    owners: tuple = ()
    returned = []
    try:
        namespace, target, method = _load(job)
        owners = (target,)
        if method:
            instance = target()
            owners = (instance, target)
            getattr(instance, method)(*args)
        else:
            target(*args)
        status = "ok"
    except MemoryError:
        status = "memory"
    except BaseException:
        status = "error"
    _attempt(flush)
    dup2(null, 1)  # what checking functions print is not the program's output
    truthy = [n for n in job["attributes"] if (True, True) in [_attempt(_truthy, owner, n) for owner in owners]]
    if owners:
        functions = [(name, namespace.get(name)) for name in job["functions"]]
        stubbed, handed = _attempt(_stub, namespace, target, method)
        for name, function in functions:
            if stubbed and type(function) is FUNCTION and function is not target:
                arguments = _arguments(function, handed)
                if arguments is not None and _attempt(function, *arguments)[0]:
                    returned.append(name)
    put(encode((status, returned, truthy)).encode() + b"\n")


# ---- the server


def remove_tree(path: str) -> None:
    """Remove a directory of any depth and any modes without following links. Nothing may write to it any more."""

    def clear(folder: int) -> list[str]:
        """Unlink everything but directories, and name those."""
        folders = []
        for name in os.listdir(folder):
            try:
                os.unlink(name, dir_fd=folder)
            except IsADirectoryError:
                os.chmod(name, 0o700, dir_fd=folder)
                folders.append(name)
        return folders

    os.chmod(path, 0o700)
    here = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    left = [clear(here)]  # per level from `path` to `here`: directories still to be removed
    while left[-1] or len(left) > 1:
        down = bool(left[-1])
        there = os.open(left[-1][-1] if down else "..", os.O_RDONLY | os.O_DIRECTORY, dir_fd=here)
        os.close(here)
        here = there
        if down:
            left.append(clear(here))
        else:
            left.pop()
            os.rmdir(left[-1].pop(), dir_fd=here)
    os.close(here)
    os.rmdir(path)


class Server:
    def __init__(self, config: dict):
        import ctypes
        import socket

        self.config, self.count = config, 0
        self.control = socket.socket(fileno=os.dup(0))
        self.receive = socket.recv_fds
        os.dup2(os.open(os.devnull, os.O_RDWR), 0)
        resource.setrlimit(resource.RLIMIT_NOFILE, (MAX_FD, MAX_FD))
        self.out = config["output_bytes"] + len(READY)
        self.stdout = config["stdout_bytes"]
        arena = mmap.mmap(-1, self.out + 1 + self.stdout + MAX_FILES * FILE_BYTES + FILE_BYTES)
        arena.madvise(mmap.MADV_DONTFORK)
        view = memoryview(arena)
        self.out_view, view = view[: self.out + 1], view[self.out + 1 :]
        self.stdout_view, view = view[: self.stdout], view[self.stdout :]
        self.file_view, self.sink = view[: MAX_FILES * FILE_BYTES], view[MAX_FILES * FILE_BYTES :]
        self.uid = self._unused_uid() if os.geteuid() == 0 else 0
        self.prctl = ctypes.CDLL(None).prctl
        with open("/proc/self/statm") as statm:
            self.baseline = int(statm.read().split()[0]) * mmap.PAGESIZE

    def _unused_uid(self) -> int:
        import pwd
        import socket

        used = {entry.pw_uid for entry in pwd.getpwall()}
        for entry in os.listdir("/proc"):
            with contextlib.suppress(OSError):
                used.add(os.stat(f"/proc/{entry}").st_uid)
        for uid in UIDS:
            # The abstract name is held until this server ends: no two servers share a uid.
            self.uid_lock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            if uid not in used:
                with contextlib.suppress(OSError):
                    self.uid_lock.bind(f"\0vgrout-sandbox-uid-{uid}")
                    return uid
            self.uid_lock.close()
        raise OSError(f"no unused uid in {UIDS}")

    def tier(self) -> str:
        if self.uid:
            return "rlimits + unused uid, no Landlock, no seccomp, no namespaces"
        return "rlimits only, same uid as the trainer, no Landlock, no seccomp, no namespaces"

    def send(self, header: dict, *bodies) -> None:
        data = json.dumps(header).encode()
        self.control.sendall(len(data).to_bytes(4, "big") + data)
        for body in bodies:
            if len(body):
                self.control.sendall(body)

    def serve(self) -> None:
        self.send({"tier": self.tier()})
        while True:
            kind, descriptors, _, _ = self.receive(self.control, 1, 1)
            if not kind:
                return
            self.grade(kind == b"o", descriptors[0])

    def grade(self, observe: bool, payload: int) -> None:
        """Run one program and send what it left behind."""
        self.count += 1
        scratch = f"{self.config['directory']}/{self.count}"
        os.mkdir(scratch, 0o700)
        if self.uid:
            os.chown(scratch, self.uid, self.uid)
        result_r, result_w = os.pipe()
        stdout_r, stdout_w = os.pipe() if observe else (-1, -1)
        server = os.getpid()
        pid = os.fork()
        if pid == 0:
            self.child(observe, payload, result_w, stdout_w, scratch, server)
        for fd in (payload, result_w, stdout_w):
            if fd >= 0:
                os.close(fd)
        sizes, stopped = [0, 0], "parent"
        try:
            stopped = self.watch(pid, result_r, stdout_r, sizes)
        finally:
            # The zombie keeps its number until it is reaped, so neither signal can reach another process.
            for kill in (os.kill, os.killpg):
                with contextlib.suppress(ProcessLookupError):
                    kill(pid, signal.SIGKILL)
            _, status, usage = os.wait4(pid, 0)
        while self.drain(result_r, stdout_r, sizes):
            pass
        for fd in (result_r, stdout_r):
            if fd >= 0:
                os.close(fd)
        files = self.read_files(scratch) if observe else []
        remove_tree(scratch)
        if sizes[0] > self.out:
            stopped, sizes[0] = "output", self.out
        header = {
            "ready": bytes(self.out_view[: min(1, sizes[0])]) == READY,
            "stopped": stopped,
            "exit": os.waitstatus_to_exitcode(status),
            "cpu": usage.ru_utime + usage.ru_stime,
            "sizes": sizes,
            "files": files,
        }
        bodies = [self.file_view[i * FILE_BYTES :][:size] for i, (_, size) in enumerate(files)]
        self.send(header, self.out_view[: sizes[0]], self.stdout_view[: sizes[1]], *bodies)

    def child(self, observe: bool, payload: int, result: int, stdout: int, scratch: str, server: int) -> None:
        """Confine this forked process, run one job, leave by `os._exit`."""
        leave, write = os._exit, os.write

        def put(data: bytes) -> None:
            while data:
                data = data[write(RESULT_FD, data) :]

        try:
            size = os.fstat(payload).st_size
            text = os.pread(payload, size, 0)
            null = os.open(os.devnull, os.O_RDWR)
            for source, target in ((null, 0), (stdout if observe else null, 1), (null, 2), (result, RESULT_FD)):
                os.dup2(source, target)
            os.closerange(RESULT_FD + 1, MAX_FD)
            self.confine(scratch, server)
            job = json.loads(text)
            del text
            sys.modules["random"].seed(0)
            gc.enable()
        except BaseException as error:  # must not return into the server's loop
            _attempt(put, f"{type(error).__name__}: {error}"[:500].encode("ascii", "replace"))
            leave(SETUP_FAILED)
        try:
            (_observe if observe else _values)(job, put)
            leave(0)
        finally:
            leave(1)

    def confine(self, scratch: str, server: int) -> None:
        """Give up everything the program does not need. A failure is an infrastructure error, never a verdict."""
        os.setsid()
        os.chdir(scratch)
        os.environ["PWD"] = scratch
        memory = self.baseline + (self.config["memory_mb"] << 20)
        stack = resource.getrlimit(resource.RLIMIT_STACK)[1]
        stack = STACK_BYTES if stack == resource.RLIM_INFINITY else min(STACK_BYTES, stack)
        cpu = int(self.config["cpu_s"]) + 2
        for kind, value in (
            (resource.RLIMIT_AS, memory), (resource.RLIMIT_CPU, cpu), (resource.RLIMIT_FSIZE, FILE_BYTES),
            (resource.RLIMIT_NOFILE, 32), (resource.RLIMIT_NPROC, 0), (resource.RLIMIT_CORE, 0),
            (resource.RLIMIT_STACK, stack), (resource.RLIMIT_MSGQUEUE, 0),
        ):  # fmt: skip
            resource.setrlimit(kind, (value, value))
        if self.uid:
            os.setgroups([])
            os.setresgid(self.uid, self.uid, self.uid)
            os.setresuid(self.uid, self.uid, self.uid)
        for option, value in ((1, signal.SIGKILL), (4, 0), (38, 1)):  # PDEATHSIG, DUMPABLE, NO_NEW_PRIVS
            if self.prctl(option, int(value), 0, 0, 0):
                raise OSError(f"prctl({option}) failed")
        if os.getppid() != server:
            raise OSError("the fork-server is gone")

    def watch(self, pid: int, result: int, stdout: int, sizes: list) -> str:
        """Collect output until the program ends; return '' or the limit it broke."""
        clock = (~pid << 3) | 2  # the CPU clock of another process, see clock_getcpuclockid(3)
        deadline = time.monotonic() + self.config["wall_s"]
        ended = os.pidfd_open(pid)
        poller = select.poll()
        for fd in (result, stdout, ended):
            if fd >= 0:
                os.set_blocking(fd, False)
                poller.register(fd, select.POLLIN)
        poller.register(self.control, 0)  # reports a hang-up all the same
        try:
            while True:
                # One thread cannot use CPU faster than wall time passes: nothing is missed by sleeping this long.
                left = self.config["cpu_s"] - time.clock_gettime(clock)
                if left <= 0:
                    return "cpu"
                wall = deadline - time.monotonic()
                if wall <= 0:
                    return "wall"
                for fd, event in poller.poll(1 + 1000 * min(left, wall)):
                    if fd == ended:
                        return ""
                    if fd == self.control.fileno():
                        raise BrokenPipeError("the parent is gone")
                    if not event & select.POLLIN:  # closed by the program
                        poller.unregister(fd)
                self.drain(result, stdout, sizes)
                if sizes[0] > self.out:
                    return "output"
        finally:
            os.close(ended)

    def drain(self, result: int, stdout: int, sizes: list) -> bool:
        """Take what is in the pipes now; True if there was anything."""
        some = False
        with contextlib.suppress(BlockingIOError):
            while sizes[0] <= self.out and (count := os.readv(result, [self.out_view[sizes[0] :]])):
                sizes[0] += count
                some = True
        with contextlib.suppress(BlockingIOError):
            if stdout >= 0 and (count := os.readv(stdout, [self.stdout_view[sizes[1] :], self.sink])):
                sizes[1] = min(self.stdout, sizes[1] + count)
                some = True
        return some

    def read_files(self, scratch: str) -> list:
        """Regular files the program owns, in order of name: [[name, size], ..]; contents go to the file arena."""
        files: list = []
        os.chmod(scratch, 0o700)
        for name in sorted(os.listdir(scratch)):
            if len(files) == MAX_FILES:
                break
            with contextlib.suppress(OSError, UnicodeEncodeError):
                name.encode("utf-8")
                fd = os.open(f"{scratch}/{name}", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
                try:
                    info = os.fstat(fd)
                    own = info.st_nlink == 1 and info.st_uid == (self.uid or os.getuid())
                    if own and stat.S_ISREG(info.st_mode):
                        start = len(files) * FILE_BYTES
                        size = os.readv(fd, [self.file_view[start : start + FILE_BYTES]])
                        files.append([name, size])
                finally:
                    os.close(fd)
        return files


def main() -> None:
    config = json.loads(sys.argv[1])
    # Fork hooks of the modules (new locks, new random seed) cost more than the fork; a single-threaded server whose
    # children get a fixed seed needs none.
    register, os.register_at_fork = os.register_at_fork, lambda **_: None
    for name in PRELOAD:
        __import__(name)
    os.register_at_fork = register
    server = Server(config)
    sys.path.clear()
    sys.path_importer_cache.clear()
    sys.argv[:] = ["solution"]
    sys.modules["__main__"] = type(sys)("__main__")
    os.environ.clear()
    os.environ.update(PYTHONHASHSEED="0", LANG="C.UTF-8")
    sys.setrecursionlimit(RECURSION)
    gc.collect()
    gc.disable()
    gc.freeze()
    try:
        server.serve()
    except (BrokenPipeError, ConnectionResetError):
        pass  # the parent ended
    finally:
        if os.path.isdir(config["directory"]):
            remove_tree(config["directory"])


if __name__ == "__main__":
    main()
