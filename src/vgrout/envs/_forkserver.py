"""Fork-server of the sandbox: one fresh forked process per untrusted program. Standard library only.

Started by `sandbox.py` with the control socket as fd 0; importing this file does no work.

A request says whether what the program prints and leaves behind is wanted, and what CPU and wall time it may take. With
it come two descriptors: a file with the job, and the socket over which the program's process talks to whoever asked.
The server reads neither. It reads what a program prints only into memory that forks do not inherit (MADV_DONTFORK), and
looks at the files that a program left in another process, so a later program finds nothing of an earlier one in its
memory. The process's CPU clock decides; wall time is a backstop.

What a program's process gives up is in `_confine.py`.
"""

from __future__ import annotations

import builtins
import contextlib
import gc
import json
import marshal
import mmap
import os
import resource
import select
import signal
import stat
import struct
import sys
import time
import warnings

if __name__ == "__main__":  # started as a file, outside any environment: the package is two folders up
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from vgrout.envs._codec import encode
from vgrout.envs._confine import FILE_BYTES, MAX_FILES, Confinement, has_fixed_addresses, mount, private, unmount

# Functions defined below look builtins up in this copy, out of reach of a program that replaces builtins.
__builtins__ = dict(vars(builtins))

RECURSION = 10_000
MAX_FD = 256
SINK_BYTES = 1 << 16  # read at once of what is printed and not kept
TALK_FD = 3
KEEP_FD = MAX_FD - 1  # what a program's process still needs while it confines itself
SETUP_FAILED = 97  # exit code of a child that could not confine itself (and then never says READY)
NO_CODE = 98  # exit code of a child whose program does not compile (and then never says COMPILED)
UNASKED = 1  # exit code of a program that did not end itself: what a raise at the end would give
READY = struct.Struct("!BI")  # 0, which begins no text, and the child's process id: it is confined
COMPILED = b"C"  # the next byte: the program is about to run
REQUEST = struct.Struct("!?dd")  # whether output is wanted, CPU seconds, wall seconds
SIZE = struct.Struct("!I")  # before each input, and before the files in a reply
REPLY = struct.Struct("!cidI")  # how it was stopped, exit status, CPU seconds, bytes printed
STOPPED = {b"-": "", b"c": "cpu", b"w": "wall"}
UIDS = range(60_578, 61_184)  # not assigned by login.defs, systemd or distributions
UID_LOCK = "\0vgrout-sandbox-uid-{}"  # abstract name of the socket of whoever uses that uid

# The modules a program may import: loaded before the fork, so that it does not depend on which files the dropped uid
# can read, and costs a program nothing.
_PRELOAD = """
    __future__ abc array base64 bisect calendar cmath collections collections.abc contextlib copy ctypes dataclasses
    datetime decimal enum fractions functools graphlib heapq inspect io itertools json logging math numbers operator
    os pprint queue random re secrets statistics string struct sys textwrap threading time timeit traceback types
    typing unittest warnings zlib _strptime encodings.ascii encodings.latin_1 encodings.utf_8 encodings.utf_16
"""
PRELOAD = tuple(_PRELOAD.split())


# ---- inside the child, with the program


def _attempt(function, *args) -> tuple[bool, object]:
    """Whether the call returned, and what."""
    try:
        return True, function(*args)
    except BaseException:  # a program may raise anything
        return False, None


def _talk(read, write):
    """`put` bytes, `take` the next input (None when there is none left) over TALK_FD."""

    def put(data: bytes) -> None:
        while data:
            data = data[write(TALK_FD, data) :]

    def exactly(size: int) -> bytes:
        data = b""
        while len(data) < size and (part := read(TALK_FD, size - len(data))):
            data += part
        return data

    def take(unpack=SIZE.unpack, width=SIZE.size, loads=marshal.loads):
        head = exactly(width)
        return loads(exactly(unpack(head)[0])) if len(head) == width else None

    return put, take


def _compile(source: str):
    """The code of the program; None where it does not compile within what a program may use."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return compile(source, "<solution>", "exec", dont_inherit=True)
        except Exception:
            return None


def _load(job: dict, code):
    """Run the program as a module `solution`; return its namespace, the class or function, the method's name."""
    module = sys.modules["solution"] = type(sys)("solution")
    namespace = module.__dict__
    namespace["__builtins__"] = builtins
    if job["setup"]:
        exec(marshal.loads(job["setup"]), namespace)
    exec(code, namespace)
    owner, _, method = job["entry"].rpartition(".")
    target = namespace[owner or method]
    if owner:
        getattr(target, method)
    return namespace, target, method if owner else None


def _call(instance, method: str | None, args: tuple | dict):
    function = getattr(instance, method) if method else instance
    return function(**args) if type(args) is dict else function(*args)


def _answer(value, args: tuple | dict, argument: int | str | None) -> str:
    """The encoded value, or what the call left in an argument, by position or by name."""
    if argument is not None:
        named = type(args) is dict and type(argument) is int
        value = list(args.values())[argument] if named else args[argument]
    return encode(value)


def _outcome(function, *args) -> tuple[str, int | None, object]:
    """How a call ended, the exit status that it asked for, and what it returned."""
    try:
        return "ok", None, function(*args)
    except SystemExit as stop:
        return "crash", _exit_status(stop), None
    except MemoryError:
        return "memory", None, None
    except BaseException:  # a program may raise anything
        return "error", None, None


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


def _answer_nothing(*args, **kwargs):
    return 0


# The same with a constant that equals nothing: it needs no name from where it runs.
_NOTHING = Opaque()
STUB = _answer_nothing.__code__.replace(
    co_consts=tuple(_NOTHING if const == 0 else const for const in _answer_nothing.__code__.co_consts)
)


def _stub(namespace: dict, target, method: str | None):
    """Put a stub in place of the entry, under every name it has and wherever it is held; return what to hand to a
    checking function."""
    answer = FUNCTION(STUB, {})
    own = target.__dict__.get(method) if method else target
    if type(own) is FUNCTION and not own.__code__.co_freevars:
        own.__code__ = STUB
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


def _exit_status(stop: SystemExit) -> int:
    """The status with which an interpreter would end."""
    known, code = _attempt(getattr, stop, "code")
    return 0 if known and code is None else code & 0xFF if type(code) is int else 1


def _returned(names: list, namespace: dict, target, method: str | None) -> list:
    """The checking functions that returned None, True or 1 while a stub replaced the entry."""
    functions = [(name, namespace.get(name)) for name in names]
    stubbed, handed = _attempt(_stub, namespace, target, method)
    returned = []
    for name, function in functions:
        if stubbed and type(function) is FUNCTION and function is not target:
            arguments = _arguments(function, handed)
            came_back, said = (False, None) if arguments is None else _attempt(function, *arguments)
            if came_back and (said is None or (type(said) in (bool, int) and said == 1)):
                returned.append(name)
    return returned


def _run(job: dict, code, put, take) -> int:
    """Load the program and call its entry once per input that comes; answer each call with (call, value), or (call,) if
    there is no value, and the end with a status.

    Where the job looks, two more lines come before the first answer: (how loading and the first call ended, exit status
    or None), (truthy attributes, comparisons that held); and one after the status: [checking functions that returned].
    Each is sent before more of the program's code runs. Returns the exit code: the program's own where loading or the
    first call asked for one."""
    look, argument = job["look"], job["argument"]
    flush, dup2 = sys.stdout.flush, os.dup2

    def show(ended: tuple, owners: tuple, result: object) -> None:
        if look is None:
            return
        _attempt(flush)
        _attempt(dup2, 2, 1)  # to /dev/null: what the program prints from here on is not its output
        put(encode(ended).encode() + b"\n")
        truthy = [n for n in look["attributes"] if (True, True) in [_attempt(_truthy, owner, n) for owner in owners]]
        equal = [n for n in look["methods"] if _attempt(lambda n=n: getattr(result, n)(Opaque()))[1] is True]
        put(encode((truthy, equal)).encode() + b"\n")

    *ended, loaded = _outcome(_load, job, code)
    status, call = "error" if ended[0] == "crash" else ended[0], 0
    if loaded is None:
        show(tuple(ended), (), None)
    else:
        namespace, target, method = loaded
        while ended[1] is None and (args := take()) is not None:  # a program that asked to exit is over
            instance = owners = value = line = None  # what the call before has left is gone
            *how, instance = _outcome(target) if method else ("ok", None, target)
            owners = (target, instance) if how[0] == "ok" else (target,)
            if how[0] == "ok":
                *how, value = _outcome(_call, instance, method, args)
            said = how[0]
            if said == "ok":
                said, _, line = _outcome(_answer, value, args, argument)
            if said == "memory":
                status = said
            if call == 0:
                ended = how
                show(tuple(how), owners, value)
            put(f'["t",{call}{"," + line if line else ""}]\n'.encode())
            call += 1
    put(f'"{status}"\n'.encode())
    if look is not None:
        put(encode(_returned(look["functions"], *loaded) if loaded else []).encode() + b"\n")
    return UNASKED if ended[1] is None else ended[1]


# ---- the server


def clear_tree(path: str) -> None:
    """Empty a directory of any depth and any modes without following links. Nothing may write to it any more."""

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


def remove_tree(path: str) -> None:
    """Empty a directory and remove it."""
    clear_tree(path)
    os.rmdir(path)


def in_a_fork(work, *args) -> None:
    """Do what must leave nothing in the server's memory. Raises OSError where it fails."""
    pid = os.fork()
    if pid == 0:
        try:
            work(*args)
            os._exit(0)
        finally:
            os._exit(1)
    if os.waitpid(pid, 0)[1]:
        raise OSError(f"{work.__name__} failed")


def find_uid(pipe: int) -> None:
    """Write the first unused uid to a pipe. Raises OSError where there is none."""
    import pwd
    import socket

    used = {entry.pw_uid for entry in pwd.getpwall()}
    for entry in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            used.add(os.stat(f"/proc/{entry}").st_uid)
    for uid in UIDS:
        if uid not in used:
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as lock:
                lock.bind(UID_LOCK.format(uid))
                os.write(pipe, SIZE.pack(uid))
                return
    raise OSError(f"no unused uid in {UIDS}")


class Server:
    def __init__(self, config: dict):
        import socket

        self.config, self.scratch = config, f"{config['directory']}/scratch"
        self.control = socket.socket(fileno=os.dup(0))
        self.receive = socket.recv_fds
        os.dup2(os.open(os.devnull, os.O_RDWR), 0)
        os.dup2(0, 1)  # a pipe until here: `sys.stdout` of a program knows that it cannot seek
        resource.setrlimit(resource.RLIMIT_NOFILE, (MAX_FD, MAX_FD))
        self.stdout = config["stdout_bytes"]
        arena = mmap.mmap(-1, SIZE.size + REPLY.size + self.stdout + SINK_BYTES)
        arena.madvise(mmap.MADV_DONTFORK)
        self.reply = memoryview(arena)  # no files, how the program ended, what it printed
        self.stdout_view = self.reply[SIZE.size + REPLY.size : -SINK_BYTES]
        self.sink = self.reply[-SINK_BYTES:]
        self.uid = self._claim_uid() if os.geteuid() == 0 else 0
        self.private = private(config["directory"])
        with open("/proc/self/statm") as statm:
            baseline = int(statm.read().split()[0]) * mmap.PAGESIZE
        memory = baseline + (config["memory_mb"] << 20)
        self.confinement = Confinement(self.uid, memory, KEEP_FD, tuple(config["without"]))
        self.make_scratch()
        self.renew_scratch()  # what the first call keeps in memory is kept before any program

    def _claim_uid(self) -> int:
        """A uid that nobody has. The search leaves nothing behind, so that the memory of every server is alike."""
        import socket

        while True:
            read, write = os.pipe()
            in_a_fork(find_uid, write)
            (uid,) = SIZE.unpack(os.read(read, SIZE.size))
            os.close(read)
            os.close(write)
            # The abstract name is held until this server ends: no two servers share a uid.
            self.uid_lock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            with contextlib.suppress(OSError):  # another server may have been faster
                self.uid_lock.bind(UID_LOCK.format(uid))
                return uid
            self.uid_lock.close()

    def layers(self) -> dict:
        """What is in force, for the parent to judge and announce."""
        return {
            "landlock": self.confinement.abi,
            "seccomp": bool(self.confinement.program),
            "rlimits": "rlimits" not in self.config["without"],
            "namespaces": self.private,
            "own uid": bool(self.uid),
            "fixed addresses": has_fixed_addresses(),
        }

    def send(self, header: object) -> None:
        data = json.dumps(header).encode()
        self.control.sendall(SIZE.pack(len(data)) + data)

    def make_scratch(self) -> None:
        """Make the scratch directory, whose times are 0 until a program makes something in it."""
        os.mkdir(self.scratch, 0o700)
        if self.uid:
            os.chown(self.scratch, self.uid, self.uid)
        os.utime(self.scratch, (0, 0))
        self.confinement.enter(self.scratch)

    def renew_scratch(self) -> None:
        """Empty the scratch directory. A new file system also forgets what an emptied one remembers: numbers of inodes,
        times, the order of names."""
        os.chdir("/")
        if self.private:
            unmount(self.config["directory"])
            mount(self.config["directory"])
        else:
            in_a_fork(remove_tree, self.scratch)
        self.make_scratch()

    def serve(self) -> None:
        self.send(self.layers())
        while True:
            request, descriptors, _, _ = self.receive(self.control, REQUEST.size, 2)
            if not request:
                return
            wanted, cpu_s, wall_s = REQUEST.unpack(request)
            self.grade(wanted, *descriptors, cpu_s, wall_s)

    def grade(self, wanted: bool, payload: int, talk: int, cpu_s: float, wall_s: float) -> None:
        """Run one program and send how it ended and what it left behind."""
        stdout_r, stdout_w = os.pipe() if wanted else (-1, -1)
        self.printed, server = 0, os.getpid()
        pid = os.fork()
        if pid == 0:
            self.child(payload, talk, stdout_w, server, cpu_s)
        for fd in (payload, talk, stdout_w):
            if fd >= 0:
                os.close(fd)
        stopped = b"-"
        try:
            stopped = self.watch(pid, stdout_r, cpu_s, wall_s)
        finally:
            # The zombie keeps its number until it is reaped, so neither signal can reach another process.
            for kill in (os.kill, os.killpg):
                with contextlib.suppress(ProcessLookupError):
                    kill(pid, signal.SIGKILL)
            _, status, usage = os.wait4(pid, 0)
        while self.drain(stdout_r):
            pass
        if stdout_r >= 0:
            os.close(stdout_r)
        start = 0
        if os.stat(self.scratch).st_mtime_ns:
            if wanted:
                in_a_fork(self.send_files)
                start = SIZE.size
            self.renew_scratch()
        ended = os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime
        REPLY.pack_into(self.reply, SIZE.size, stopped, *ended, self.printed)
        self.control.sendall(self.reply[start : SIZE.size + REPLY.size + self.printed])

    def child(self, payload: int, talk: int, stdout: int, server: int, cpu_s: float) -> None:
        """Confine this forked process, run one job, leave by `os._exit`."""
        leave = os._exit
        put, take = _talk(os.read, os.write)
        try:
            gc.collect()  # of the server's lists of free objects nothing is left
            job = os.pread(payload, os.fstat(payload).st_size, 0)
            null = os.open(os.devnull, os.O_RDWR)
            for source, target in ((null, 0), (null if stdout < 0 else stdout, 1), (null, 2), (talk, TALK_FD)):
                os.dup2(source, target)
            os.closerange(TALK_FD + 1, KEEP_FD)
            self.confinement.apply(server, cpu_s)
            job = marshal.loads(job)
            sys.modules["random"].seed(0)
            put(READY.pack(0, os.getpid()))
        except BaseException as error:  # must not return into the server's loop
            _attempt(put, f"{type(error).__name__}: {error}"[:500].encode("ascii", "replace"))
            leave(SETUP_FAILED)
        code = _compile(job["source"])
        if code is None:
            leave(NO_CODE)
        gc.enable()
        try:
            put(COMPILED)
            leave(_run(job, code, put, take))
        finally:
            leave(UNASKED)

    def watch(self, pid: int, stdout: int, cpu_s: float, wall_s: float) -> bytes:
        """Collect what the program prints until it ends; return which limit it broke, a key of `STOPPED`."""
        clock = (~pid << 3) | 2  # the CPU clock of another process, see clock_getcpuclockid(3)
        deadline = time.monotonic() + wall_s
        ended = os.pidfd_open(pid)
        poller = select.poll()
        for fd in (stdout, ended):
            if fd >= 0:
                os.set_blocking(fd, False)
                poller.register(fd, select.POLLIN)
        poller.register(self.control, 0)  # reports a hang-up all the same
        try:
            while True:
                # One thread cannot use CPU faster than wall time passes: nothing is missed by sleeping this long.
                left = cpu_s - time.clock_gettime(clock)
                if left <= 0:
                    return b"c"
                wall = deadline - time.monotonic()
                if wall <= 0:
                    return b"w"
                for fd, event in poller.poll(1 + 1000 * min(left, wall)):
                    if fd == ended:
                        return b"-"
                    if fd == self.control.fileno():
                        raise BrokenPipeError("the parent is gone")
                    if not event & select.POLLIN:  # closed by the program
                        poller.unregister(fd)
                self.drain(stdout)
        finally:
            os.close(ended)

    def drain(self, stdout: int) -> bool:
        """Take what is in the pipe now; True if there was anything."""
        with contextlib.suppress(BlockingIOError):
            if stdout >= 0 and (count := os.readv(stdout, [self.stdout_view[self.printed :], self.sink])):
                self.printed = min(self.stdout, self.printed + count)
                return True
        return False

    def send_files(self) -> None:
        """Send the regular files that the program owns, in order of name: [[name, size], ..], then their contents."""
        files, contents = [], []
        for name in sorted(os.listdir(self.scratch)):
            if len(files) == MAX_FILES:
                break
            with contextlib.suppress(OSError, UnicodeEncodeError):
                name.encode("utf-8")
                fd = os.open(f"{self.scratch}/{name}", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
                try:
                    info = os.fstat(fd)
                    own = info.st_nlink == 1 and info.st_uid == (self.uid or os.getuid())
                    if own and stat.S_ISREG(info.st_mode):
                        contents.append(os.read(fd, FILE_BYTES))
                        files.append([name, len(contents[-1])])
                finally:
                    os.close(fd)
        self.send(files)
        self.control.sendall(b"".join(contents))


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
    os.environ.update(PYTHONHASHSEED="0", LANG="C.UTF-8", PWD=server.scratch)
    sys.setrecursionlimit(RECURSION)
    builtins.exit = builtins.quit = sys.exit  # as `site` would have it
    gc.collect()
    # Small objects of every size fill the gaps in memory that starting up has left, so that what a program finds free
    # does not depend on what the server did before.
    server.filling = [bytes(size) for size in range(0, 480, 16) for _ in range(40)]
    gc.disable()
    gc.freeze()
    try:
        server.serve()
    except (BrokenPipeError, ConnectionResetError):
        pass  # the parent ended
    finally:
        if server.private:
            unmount(config["directory"])
        if os.path.isdir(config["directory"]):
            remove_tree(config["directory"])


if __name__ == "__main__":
    main()
