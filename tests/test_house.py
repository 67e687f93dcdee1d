"""The two walls: imports go down only, and training code cannot name a verdict.

Every check is a function of source text that returns what it objects to. Each is shown to object to a small
example and to accept its innocent neighbour.
Does not cover names made at run time: getattr(x, "hac" + "ked"), vars(x), asdict(x), import_module(name).
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

HOUSE = (  # a room imports itself and rooms on lines above its own
    ("types", "signals"),
    ("config", "faults"),
    ("dist",),
    ("adapters", "envs", "models", "pairs"),
    ("engines", "method"),
    ("arms",),
    ("loop",),
    ("lab",),
    ("integrations",),
    ("verify", "api"),
    ("cli",),
    ("__main__",),
)
LEVEL = {room: level for level, rooms in enumerate(HOUSE) for room in rooms}
GROUND = ("types", "config")  # may not compute
BLIND = ("engines", "method", "arms")  # may not import envs
VERDICT = frozenset("hacked solved sealed verdict verdicts attempted".split())
PACKAGE = Path(__file__).parents[1] / "src" / "vgrout"


def module_of(path: Path) -> str:
    """Dotted name of a file of the package; a package's own file keeps `__init__`."""
    return ".".join(("vgrout", *path.relative_to(PACKAGE).with_suffix("").parts))


def room_of(module: str) -> str:
    """The room of a dotted name; '' for the package itself."""
    parts = module.split(".")
    return "" if len(parts) < 2 or parts[1] == "__init__" else parts[1]


def imported(module: str, source: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything of vgrout that a module imports, at any depth of its code."""
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            # `from vgrout import envs` imports a room, `from vgrout.envs import grade` goes further into one.
            names = [f"vgrout.{alias.name}" for alias in node.names] if base == "vgrout" else [base]
        elif isinstance(node, ast.Call):
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if called in ("import_module", "__import__"):
                texts = (a.value for a in node.args[:1] if isinstance(a, ast.Constant))
                names = [text for text in texts if isinstance(text, str)]
        yield from ((node.lineno, name) for name in names if name.split(".")[0] == "vgrout")


def climbs(module: str, source: str) -> list[str]:
    """Imports that go up or sideways, from or to a room that the house does not have."""
    here = room_of(module)
    if here and here not in LEVEL:
        return [f"{module}: the house has no room {here!r}"]
    out = []
    for line, name in imported(module, source):
        there = room_of(name)
        if there in ("", "__version__") or there == here:
            continue
        if there not in LEVEL:
            out.append(f"{module}:{line} imports {name}: the house has no room {there!r}")
        elif not here or LEVEL[there] >= LEVEL[here]:
            out.append(f"{module}:{line} imports {name}, which is not below {here or 'the package itself'}")
    return out


def sees_truth(module: str, source: str) -> list[str]:
    """Imports of envs by a room that must be blind."""
    if room_of(module) not in BLIND:
        return []
    return [f"{module}:{n} imports {name}" for n, name in imported(module, source) if room_of(name) == "envs"]


def verdict_word(name: str) -> bool:
    """Whether a word of an identifier is a verdict's: hacked, n_solved, OpenVerdict."""
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name)
    return any(word.lower() in VERDICT for word in words)


def identifiers(node: ast.AST) -> Iterator[str]:
    """Names that a node itself holds, strings that could serve as a name among them."""
    for field in ("id", "attr", "arg", "name", "asname", "rest", "module"):
        value = getattr(node, field, None)
        if isinstance(value, str):
            yield value
    for field in ("names", "kwd_attrs"):
        yield from (value for value in getattr(node, field, ()) if isinstance(value, str))
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
        yield node.value


def reads_oracle(node: ast.AST) -> bool:
    """Whether a node is a class that declares `reads_oracle = True` in its own body."""
    for line in node.body if isinstance(node, ast.ClassDef) else ():
        targets = line.targets if isinstance(line, ast.Assign) else [getattr(line, "target", None)]
        if any(isinstance(t, ast.Name) and t.id == "reads_oracle" for t in targets):
            return isinstance(line.value, ast.Constant) and line.value.value is True
    return False


def names_verdict(module: str, source: str) -> list[str]:
    """Verdict words in the code of engines, method, loop and of arms that do not declare `reads_oracle`."""
    if room_of(module) not in (*BLIND, "loop"):
        return []
    out, todo = [], [ast.parse(source)]
    while todo:
        node = todo.pop()
        if room_of(module) == "arms" and reads_oracle(node):
            continue
        line = getattr(node, "lineno", 0)
        out += [f"{module}:{line} names {name}" for name in identifiers(node) if verdict_word(name)]
        todo += ast.iter_child_nodes(node)
    return out


def batch_tells(source: str) -> list[str]:
    """What is wrong with `types.Batch`: a verdict word among its members, or members out of sight."""
    batch = [n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == "Batch"]
    if len(batch) != 1:
        return [f"types.py has {len(batch)} classes Batch"]
    out = ["Batch inherits members"] if batch[0].bases else []
    for line in batch[0].body:
        targets = line.targets if isinstance(line, ast.Assign) else [getattr(line, "target", line)]
        members = (getattr(t, "id", None) or getattr(t, "name", "") for t in targets)
        out += [f"Batch.{member}" for member in members if verdict_word(member)]
    return out


def computes(module: str, source: str) -> list[str]:
    """Uses of torch by types and config, but for names of torch in annotations of types.py."""
    if room_of(module) not in GROUND:
        return []
    tree = ast.parse(source)
    bound, out = set(), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = [(a.asname or "torch") for a in node.names if a.name.split(".")[0] == "torch"]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            found = [a.asname or a.name for a in node.names]
        else:
            continue
        bound |= set(found)
        if found and room_of(module) != "types":
            out.append(f"{module}:{node.lineno} imports torch")
    notes = [getattr(n, field, None) for n in ast.walk(tree) for field in ("annotation", "returns")]
    allowed = {id(n) for note in notes if note for n in ast.walk(note)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in bound and id(node) not in allowed:
            out.append(f"{module}:{node.lineno} uses {node.id} outside an annotation")
    return out


# The package itself.

FILES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def test_files_are_found():
    rooms = {room_of(module) for module in FILES}
    assert {"types", "config", "envs", "method", "arms", "loop", "lab"} <= rooms
    assert any(imported(m, path.read_text()) for m, path in FILES.items())


@pytest.mark.parametrize("check", [climbs, sees_truth, names_verdict, computes])
def test_house(check):
    found = [f for module, path in FILES.items() for f in check(module, path.read_text(encoding="utf-8"))]
    assert not found, "\n" + "\n".join(found)


def test_batch_has_no_verdict():
    assert not batch_tells((PACKAGE / "types.py").read_text(encoding="utf-8"))


# Every check can fail.

ORACLE_ARM = """
class OracleRoute(Arm):
    reads_oracle = True
    def route(self, step, batch, oracle):
        return oracle.hacked
"""


@pytest.mark.parametrize(
    ("check", "module", "source"),
    [
        (climbs, "vgrout.types", "import vgrout.config"),
        (climbs, "vgrout.method.gate", "from vgrout.arms import ARMS"),
        (climbs, "vgrout.method.gate", "from vgrout import loop"),
        (climbs, "vgrout.method.gate", "from ..lab import record"),
        (climbs, "vgrout.method.gate", "from .. import lab"),
        (climbs, "vgrout.envs.grade", "from vgrout.models.load import load_model"),
        (climbs, "vgrout.envs.__init__", "from ..lab import record"),
        (climbs, "vgrout.lab.run", "def f():\n    import vgrout.verify.gates"),
        (climbs, "vgrout.arms.base", "import importlib\nimportlib.import_module('vgrout.loop')"),
        (climbs, "vgrout.arms.base", "__import__('vgrout.loop')"),
        (climbs, "vgrout.arms.base", "import vgrout.shed"),
        (climbs, "vgrout.shed", ""),
        (climbs, "vgrout.__init__", "from vgrout.types import Batch"),
        (sees_truth, "vgrout.engines.torch_engine", "from vgrout.envs.modes import MODES"),
        (sees_truth, "vgrout.method.gate", "def f():\n    from vgrout import envs"),
        (sees_truth, "vgrout.arms.base", "from ..envs import grade"),
        (names_verdict, "vgrout.method.gate", "x = rollout.hacked"),
        (names_verdict, "vgrout.method.gate", "def f(n_solved): ..."),
        (names_verdict, "vgrout.method.gate", "f(attempted=1)"),
        (names_verdict, "vgrout.method.gate", "x = getattr(r, 'hacked')"),
        (names_verdict, "vgrout.method.gate", "from vgrout.types import Sealed"),
        (names_verdict, "vgrout.method.gate", "import a as verdict"),
        (names_verdict, "vgrout.method.gate", "match r:\n    case R(hacked=x): ..."),
        (names_verdict, "vgrout.method.gate", ORACLE_ARM),
        (names_verdict, "vgrout.engines.torch_engine", "verdict = 1"),
        (names_verdict, "vgrout.arms.controls", ORACLE_ARM.replace("= True", "= False")),
        (names_verdict, "vgrout.arms.controls", ORACLE_ARM + "def f(oracle): return oracle.solved"),
        (names_verdict, "vgrout.loop", "x = graded[0].sealed.passed"),
        (names_verdict, "vgrout.loop", "s = graded[0].sealed\ns.passed"),
        (computes, "vgrout.config", "from torch import Tensor"),
        (computes, "vgrout.types", "import torch.nn\nx = torch.zeros(1)"),
        (computes, "vgrout.types", "from torch import Tensor as T\ny: T = T()"),
    ],
)
def test_check_objects(check, module, source):
    assert check(module, source)


@pytest.mark.parametrize(
    ("check", "module", "source"),
    [
        (climbs, "vgrout.arms.base", "import torch\nfrom vgrout.method import gate\nfrom .base import Arm"),
        (climbs, "vgrout.cli", "from vgrout import __version__, lab, types"),
        (climbs, "vgrout.envs.__init__", "from .modes import MODES\nfrom . import modes"),
        (sees_truth, "vgrout.lab.run", "from vgrout.envs.micro_env import MicroEnv"),
        (names_verdict, "vgrout.arms.controls", ORACLE_ARM),
        (names_verdict, "vgrout.method.gate", '"""It hacked."""\nx = bench.hack\npassed = unsolvable = 1'),
        (names_verdict, "vgrout.lab.record", "x = graded.sealed.hacked"),
        (computes, "vgrout.types", "from torch import Tensor as T\nx: T\ndef f(a: T) -> list[T]: ..."),
        (computes, "vgrout.loop", "import torch\ntorch.zeros(1)"),
    ],
)
def test_check_accepts(check, module, source):
    assert not check(module, source)


@pytest.mark.parametrize(
    ("source", "objects"),
    [
        ("class Batch:\n    reward: float\n    @property\n    def n(self): ...", False),
        ("class Batch:\n    hacked: bool", True),
        ("class Batch:\n    solved = None", True),
        ("class Batch:\n    @property\n    def verdict(self): ...", True),
        ("class Batch(Graded):\n    reward: float", True),
        ("", True),
    ],
)
def test_batch_check(source, objects):
    assert bool(batch_tells(source)) is objects
