"""The source that a run executes: `vgrout.lab.run` and whatever it imports, directly or not.

A run that goes on, and runs of one experiment, must share it. Commands that plan runs or read them have no part in it,
so a better figure is no reason to train again.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator
from functools import cache
from hashlib import sha256
from importlib.resources import files
from pathlib import Path

ENTRY = "vgrout.lab.run"
TESTS = ("claims", "prereg", "stats")  # modules of the lab
# Pairs, demonstrations, prompts, the tokenizer. Weights have a hash of their own.
DATA = (".md", ".jsonl", ".json", ".jinja")


def _package() -> Path:
    return Path(str(files("vgrout")))


def _file(module: str, root: Path) -> Path | None:
    """The file of a module of the package; None for any other name."""
    path = root.parent.joinpath(*module.split("."))
    candidates = (path / "__init__.py", path.with_suffix(".py"))
    return next((file for file in candidates if module.split(".")[0] == root.name and file.is_file()), None)


def _imported(file: Path) -> Iterator[str]:
    """Modules, and names that may be modules, that any line of a file imports."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level or not node.module:
                raise ValueError(f"{file}:{node.lineno}: a relative import, which is not followed")
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def executed(entry: str = ENTRY, root: Path | None = None) -> list[Path]:
    """Files of the package that `entry` can come to execute, sorted."""
    root = root or _package()
    seen: set[Path] = set()
    todo = [entry]
    while todo:
        parts = todo.pop().split(".")
        for end in range(1, len(parts) + 1):  # an import runs the packages that a module lies in, too
            file = _file(".".join(parts[:end]), root)
            if file is not None and file not in seen:
                seen.add(file)
                todo += _imported(file)
    return sorted(seen)


@cache
def code_digest() -> str:
    """SHA-256 of names and content of the source and data that a run depends on, but for weights."""
    return _digest({*executed(), *(path for path in _package().rglob("*") if path.suffix in DATA)})


@cache
def tests_digest() -> str:
    """SHA-256 of the code that tests and concludes."""
    return _digest({_package() / "lab" / f"{name}.py" for name in TESTS})


def _digest(files: Collection[Path]) -> str:
    digest = sha256()
    for path in sorted(files):
        digest.update(f"{path.relative_to(_package())} {sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()
