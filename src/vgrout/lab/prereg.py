"""A preregistered decision: what will be compared, how, and what would be concluded, in a file written before the runs.

`vgrout decide --decision FILE` takes preset, arms and seeds from it and stores its hash before the first run.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, get_type_hints

from vgrout.config import Config, mistyped, preset
from vgrout.lab.grid import named
from vgrout.types import UserError

BASE = "base model"  # a control that is no arm: the untrained model


@dataclass(frozen=True)
class Solving:
    """That the arm of a claim solves no less than `control` by more than `margin`, a difference of rates."""

    control: tuple[str, ...]
    margin: float


@dataclass(frozen=True)
class Claim:
    """One arm against the mean of its controls, on what ships. `modes`: all problems, or those whose loophole no pair
    shows. `solve`: the claim holds only together with this one."""

    name: str
    says: str
    arm: str
    control: tuple[str, ...]
    outcome: Literal["hack", "solve", "attempted", "compile"]
    side: Literal["less", "greater"]
    modes: Literal["all", "unseen"] = "all"
    solve: Solving | None = None


@dataclass(frozen=True)
class Sameness:
    """That the rates of an arm and the mean of its controls differ by less than `margin`."""

    name: str
    says: str
    arm: str
    control: tuple[str, ...]
    outcome: Literal["hack", "solve", "attempted", "compile"]
    margin: float
    modes: Literal["all", "unseen"] = "all"


@dataclass(frozen=True)
class Conclusion:
    """Words that stand where all of `holds` were shown and none of `fails` was."""

    says: str
    holds: tuple[str, ...] = ()
    fails: tuple[str, ...] = ()


@dataclass(frozen=True)
class Decision:
    """All of it. `sha256` is of the file's bytes, `text` what it says."""

    question: str
    preset: str
    settings: Mapping[str, Any]  # what differs from the preset
    seeds: tuple[int, ...]
    arms: tuple[str, ...]
    alpha: float
    primary: tuple[Claim, ...]
    secondary: tuple[Claim, ...]
    equivalence: tuple[Sameness, ...]
    conclusion: tuple[Conclusion, ...]
    text: str
    sha256: str

    def base(self) -> Config:
        """The settings of every run. Raises UserError."""
        return Config.parse({**asdict(preset(self.preset)), **self.settings}, Path("settings"))

    def deviations(self, base: Config) -> list[str]:
        """What the settings of runs differ in from what was written down, threads aside."""
        meant, told = (asdict(c) for c in (self.base(), base))
        ignored = {"arm", "seed", "threads"}
        return [f"{k} = {told[k]!r}, not {meant[k]!r}" for k in meant if k not in ignored and told[k] != meant[k]]


def read(path: Path) -> Decision:
    """Raises UserError where the file is no decision."""
    try:
        raw = path.read_bytes()
        said = tomllib.loads(raw.decode())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no TOML: {error}") from None
    try:
        made = _decision(said, raw)
        _check(made)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return made


TABLES = {"primary": Claim, "secondary": Claim, "equivalence": Sameness, "conclusion": Conclusion}


def _decision(said: Mapping[str, Any], raw: bytes) -> Decision:
    if said.keys() & {"text", "sha256"}:
        raise UserError("unknown fields text, sha256")
    plain = {"settings": {}, **{key: value for key, value in said.items() if key not in TABLES}}
    lists = {}
    for name, kind in TABLES.items():
        entries = said.get(name, [])
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise UserError(f"{name} is a list of tables: head each with [[{name}]]")
        lists[name] = tuple(_made(kind, entry, f"{name} {i}") for i, entry in enumerate(entries, 1))
    return _made(Decision, {**plain, **lists, "text": raw.decode(), "sha256": sha256(raw).hexdigest()}, "the decision")


def _made(kind: type, said: Mapping[str, Any], where: str):
    """`kind` from a table. Raises UserError for a field that is unknown, missing or of another type."""
    known = {f.name: f for f in fields(kind)}
    missing = {name for name, f in known.items() if f.default is MISSING} - said.keys()
    for what, wrong in (("unknown", said.keys() - known.keys()), ("missing", missing)):
        if wrong:
            raise UserError(f"{where}: {what} fields {', '.join(sorted(wrong))}")
    hints, values = get_type_hints(kind), {}
    for name, value in said.items():
        value = tuple(value) if isinstance(value, list) else value
        if name == "solve":
            value = _made(Solving, value, f"{where}, solve") if isinstance(value, dict) else value
            wrong = "" if isinstance(value, Solving) else "give a table"
        elif name in TABLES:
            wrong = ""
        elif name == "settings":
            wrong = "" if isinstance(value, dict) and not {"arm", "seed"} & value.keys() else "give a table of settings"
        elif name == "seeds":
            whole = isinstance(value, tuple) and all(type(seed) is int and seed >= 0 for seed in value)
            wrong = "" if whole else "give a list of whole numbers"
        else:
            wrong = mistyped(value, hints[name])
        if wrong:
            raise UserError(f"{where}: {name} = {value!r}: {wrong}")
        values[name] = value
    return kind(**values)


def _check(made: Decision) -> None:
    """Raises UserError for what does not fit together."""
    made.base()
    labels = {variant.label for variant in named(made.arms)}
    if not made.primary:
        raise UserError("a decision needs a [[primary]]")
    if not 0 < made.alpha < 1:
        raise UserError(f"alpha = {made.alpha}: give a number between 0 and 1")
    for what, given in (("arm", made.arms), ("seed", made.seeds)):
        if not given or len(set(given)) < len(given):
            raise UserError(f"{what}s = {list(given)}: name some, each once")
    tests = (*made.primary, *made.secondary, *made.equivalence)
    names = [test.name for test in tests]
    if len(set(names)) < len(names):
        raise UserError(f"a name stands twice among {', '.join(names)}")
    for test in tests:
        solve = getattr(test, "solve", None)
        used = {test.arm, *test.control, *(solve.control if solve else ())}
        if BASE in used and (test.control != (BASE,) or test.modes != "all" or solve):
            raise UserError(f"{test.name}: {BASE} is a control of its own, on all modes")
        if strange := sorted(used - labels - {BASE}):
            raise UserError(f"{test.name}: {', '.join(strange)} is not among the arms")
        if test.arm in (*test.control, *(solve.control if solve else ())):
            raise UserError(f"{test.name}: {test.arm} is its own control")
        if not test.control or (solve and not solve.control):
            raise UserError(f"{test.name}: name a control")
        for margin in (getattr(test, "margin", None), solve and solve.margin):
            if margin is not None and not 0 < margin < 1:
                raise UserError(f"{test.name}: margin = {margin}: give a rate between 0 and 1")
    for conclusion in made.conclusion:
        if strange := sorted({*conclusion.holds, *conclusion.fails} - set(names)):
            raise UserError(f"the conclusion {conclusion.says!r} names {', '.join(strange)}, which is no test")


def concluded(made: Decision, shown: Sequence[str]) -> list[str]:
    """The conclusions that follow where the tests named in `shown` held."""
    return [c.says for c in made.conclusion if {*c.holds} <= {*shown} and not {*c.fails} & {*shown}]
