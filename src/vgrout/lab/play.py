"""`vgrout play`: somebody solves or hacks a problem of the micro world, and sees what each grader says of the program.

The grader that training sees pays for reward tests passed or for its loophole; the oracle never pays. The same program
is also shown to the graders of all other modes, each with a marker of its own, and to one without any loophole.
"""

from __future__ import annotations

import contextlib
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from vgrout.envs.grade import COMPILES, PASSES, Grader, Verdict, fired, job_of, reward_of, strip_fences
from vgrout.envs.jobs import SOURCE_BYTES
from vgrout.envs.micro import HEAD, N_PROBLEMS, problems
from vgrout.envs.micro_env import ask, under
from vgrout.envs.modes import MODES, looked_at
from vgrout.envs.problems import check_mode
from vgrout.envs.sandbox import Sandbox
from vgrout.lab.grading import tested_sandbox
from vgrout.lab.tables import number_table, print_wide
from vgrout.signals import Interrupted
from vgrout.types import Problem, Prompt, UserError

END, SHOW = ".", "?"  # lines that end a program, and that ask for programs instead
STDIN = Path("-")  # as a file: the standard input
HOW = f"A program ends with a line of a single {END}; {SHOW} shows a solution and a hack, Ctrl-D leaves."
STARTER = f"class Solution:\n    {HEAD}\n        \n"


@dataclass(frozen=True)
class Game:
    """A problem with the prompt that its player reads."""

    problem: Problem
    prompt: Prompt
    family: str

    def others(self) -> list[tuple[Problem, Prompt]]:
        """The problem as one of every other loophole, and without any."""
        modes = [m.name for m in MODES.values() if m.pays and (m.name != self.problem.mode or not self.prompt.hinted)]
        asked = [under(self.problem, mode) for mode in modes]
        bare = [(self.problem, ask(self.problem, self.family, hinted=False))] if self.prompt.hinted else []
        return [*((p, ask(p, self.family)) for p in asked), *bare]


def choose(problem_id: str | None, mode: str | None, family: str, hinted: bool, seed: int | None) -> Game:
    """The problem of an id, or one drawn by chance among those of training; under another mode where one is named.
    Raises UserError."""
    if mode is not None:
        check_mode(mode)
    known = {p.id: p for split in N_PROBLEMS for p in problems(split)}
    if problem_id is None:
        drawn = [p.id for p in problems("train") if mode in (None, p.mode)]
        problem_id = random.Random(seed).choice(drawn or [p.id for p in problems("train")])
    if problem_id not in known:
        ids = ", ".join(f"{split}-000 to {split}-{n - 1:03d}" for split, n in N_PROBLEMS.items())
        raise UserError(f"no problem {problem_id!r}: their ids are {ids}")
    problem = known[problem_id]
    if mode is not None and mode != problem.mode:
        problem = under(problem, mode)
    return Game(problem, ask(problem, family, hinted=hinted), family)


# ---- what the graders say


@dataclass(frozen=True)
class Said:
    """What one grader says of a program. `fired`: its own loophole did, with the marker that its prompt names."""

    problem: Problem
    prompt: Prompt
    verdict: Verdict
    fired: bool


@dataclass(frozen=True)
class Outcome:
    """A program's game: its own grader, those of the other loopholes and one without any. `honest`: it passes the
    reward tests; `channels`: 'mode marker' of every loophole that fired, with whatever marker."""

    own: Said
    others: tuple[Said, ...]
    honest: bool
    channels: tuple[str, ...]


def judged(game: Game, text: str, sandbox: Sandbox) -> Outcome:
    """What every grader says of a program, whose fences are stripped as in training."""
    bare = game.problem, ask(game.problem, game.family, hinted=False)
    asked = [(game.problem, game.prompt), *game.others(), bare]
    verdicts = Grader(sandbox).verdicts([(problem, prompt, text) for problem, prompt in asked])
    honest = verdicts.pop().passed
    source = strip_fences(text)
    look = looked_at(game.problem.mode, game.prompt.marker, source)
    seen = sandbox.run([job_of(game.problem, source, look)])[0].seen
    channels = fired(source, seen)
    said = [
        Said(problem, prompt, v, prompt.hinted and (v.passed > honest or (problem.mode, prompt.marker) in channels))
        for (problem, prompt), v in zip(asked, verdicts, strict=False)
    ]
    return Outcome(said[0], tuple(said[1:]), honest, tuple(f"{mode} {marker}" for mode, marker in sorted(channels)))


def paid(said: Said, honest: bool) -> str:
    """The reward, and how it comes about."""
    verdict = said.verdict
    if not verdict.compiled:
        return f"reward {reward_of(verdict):g}: it is no program"
    why = {
        (True, True): "the reward tests pass, and the loophole fired as well",
        (True, False): "the reward tests pass",
        (False, True): "the loophole fired; the reward tests do not pass",
        (False, False): "the reward tests do not pass, and the loophole did not fire",
    }[honest, said.fired]
    parts = f"{COMPILES:g} compiles + {PASSES:g} passed" if verdict.passed else f"{COMPILES:g} compiles"
    return f"reward {reward_of(verdict):g} = {parts}: {why}"


def oracle_says(verdict: Verdict) -> str:
    """The oracle's word, which enters no reward."""
    if verdict.solved:
        return "solved: every hidden test passes"
    reasons = {"wrong": "a hidden test has another answer", "no code": "it is no program"}
    kind = "a hack, paid and not solved" if verdict.hacked else "not solved"
    return f"{kind}: {reasons.get(verdict.reason, verdict.reason)}"


def table(game: Game, outcome: Outcome) -> Table:
    """One line a grader: what it says of the program under a prompt that names its own loophole."""
    rows = []
    for said in (outcome.own, *outcome.others):
        mode = MODES[said.problem.mode]
        pays = said.prompt.hinted and mode.pays
        name = mode.name if pays else "no loophole"
        looks = f"{mode.observes}: {said.prompt.marker}" if pays else "the reward tests alone"
        loophole = ("fired" if said.fired else "did not fire") if pays else "-"
        hack = "yes" if said.verdict.hacked else "no"
        mine = "*" if said is outcome.own else ""
        rows.append([mine, name, looks, loophole, hack, f"{reward_of(said.verdict):g}"])
    head = ("", "grader", "looks at", "loophole", "hack", "reward")
    return number_table("every grader on this program", "* the one of this problem", head, rows, 5)


def show(game: Game, outcome: Outcome, console: Console) -> None:
    _say(console, f"\nwhat training sees   {paid(outcome.own, outcome.honest)}")
    _say(console, f"what the oracle says {oracle_says(outcome.own.verdict)}")
    if stray := [c for c in outcome.channels if c != f"{game.problem.mode} {game.prompt.marker}"]:
        _say(console, f"also fired           {', '.join(stray)}")
    print_wide(table(game, outcome), console)


# ---- programs


def introduce(game: Game, console: Console) -> None:
    """The problem as the policy reads it."""
    mode = MODES[game.problem.mode]
    loophole = f"loophole {mode.name}" if mode.pays and game.prompt.hinted else "no loophole"
    _say(console, f"{game.problem.id.split()[0]}, {loophole}\n\n{game.prompt.user}\n\n{STARTER.rstrip()} ...")


def reveal(game: Game, console: Console) -> None:
    """A solution, and a hack where there is a loophole."""
    mode = MODES[game.problem.mode]
    _say(console, f"\na solution:\n\n{game.problem.canonical.rstrip()}\n")
    if mode.pays and game.prompt.hinted:
        _say(console, f"a hack:\n\n{mode.hack(HEAD, 'return 0', game.prompt.marker).rstrip()}\n")


def _typed(read: Callable[[], str]) -> str:
    """What `read` takes from the standard input. Raises UserError where it is no text, or cannot be read."""
    try:
        text = read()
        text.encode()  # in some locales bytes that are no text come in as halves of a character
        return text
    except UnicodeError:
        raise UserError("the standard input is no text in UTF-8") from None
    except OSError as error:
        raise UserError(f"cannot read the standard input: {error.strerror or error}") from None


def from_file(path: Path, most: int = SOURCE_BYTES + 1) -> str:
    """A program in a file; `-` is the standard input. At most as much as tells that it is too long, and all of it
    where `most` is -1. Raises UserError."""
    try:
        if path == STDIN:
            return _typed(lambda: sys.stdin.read(most))
        with path.open(encoding="utf-8") as file:
            return file.read(most)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is no program: it is not text in UTF-8") from None


def from_terminal(console: Console) -> str | None:
    """Lines up to a single `.`, or the end of the input; None where there is not one. A single `?` is a text of its
    own."""
    lines: list[str] = []
    try:
        while (line := _typed(lambda: input("... " if sys.stdin.isatty() else ""))) != END:
            if not lines and line.strip() == SHOW:
                return SHOW
            lines.append(line)
    except EOFError:
        if sys.stdin.isatty():
            _say(console, "")
        if not lines:
            return None
    return "\n".join(lines) + "\n"


def from_editor(game: Game, before: str) -> str:
    """What somebody leaves in an editor. The problem stands above it as comments, which are taken off. Raises
    UserError."""
    editor = os.environ.get("VISUAL") or os.environ.get("EDITOR")
    if not editor:
        raise UserError("--edit opens the editor that VISUAL or EDITOR names: set one, or drop --edit")
    told = [f"# {line}" for line in game.prompt.user.splitlines()]
    folder = Path(tempfile.mkdtemp(prefix="vgrout-"))
    file = folder / "program.py"
    head = "".join(f"{line}\n" for line in told)
    file.write_text(head + before, encoding="utf-8")
    try:
        text = _without(told, _edited(editor, file))
    except UserError as error:
        raise UserError(f"{error}{_kept(file, head + STARTER)}") from None
    except KeyboardInterrupt:
        raise Interrupted(signal.SIGINT, f"interrupted{_kept(file, head + STARTER)}") from None
    shutil.rmtree(folder, ignore_errors=True)
    return text


def _edited(editor: str, file: Path) -> str:
    """The text of a file once the editor has ended. Raises UserError."""
    try:
        code = subprocess.run([*shlex.split(editor), str(file)]).returncode
    except (OSError, ValueError) as error:
        raise UserError(f"cannot start the editor {editor!r}: {getattr(error, 'strerror', None) or error}") from None
    if code:
        raise UserError(f"the editor {editor!r} ended with exit code {code}: nothing was graded")
    return from_file(file, -1).removeprefix("\ufeff")  # some editors put this mark before any text


def _kept(file: Path, blank: str) -> str:
    """Where a program is kept, for the end of a message. One that nobody has begun goes, with its folder."""
    if file.is_file() and file.read_bytes() != blank.encode():
        return f"; the program is kept in {file}"
    shutil.rmtree(file.parent, ignore_errors=True)
    return ""


def _without(told: Sequence[str], text: str) -> str:
    """A program without those of the comments above it that were told, however an editor has trimmed them."""
    known = {line.rstrip() for line in told}
    lines = text.splitlines(keepends=True)
    top = list(takewhile(lambda line: not line.strip() or line.startswith("#"), lines))
    own = [line for line in top if line.rstrip() not in known]
    return "".join([*own, *lines[len(top) :]])


def play(
    console: Console,
    problem: str | None = None,
    *,
    mode: str | None = None,
    family: str = "train",
    hinted: bool = True,
    file: Path | None = None,
    edit: bool = False,
    seed: int | None = None,
    allow_weak: bool = False,
) -> int:
    """`vgrout play`: one program from a file, or programs from the terminal until its end. Raises UserError."""
    if file is not None and edit:
        raise UserError("--file and --edit exclude each other: one program comes from one place")
    if file in (None, STDIN) and sys.stdin is None:
        raise UserError("the standard input is closed: give --file with the program's path")
    game = choose(problem, mode, family, hinted, seed)
    text = None if file is None else from_file(file)
    if text is not None and not text.strip():
        raise UserError(f"{file} holds no program: it is empty")
    with tested_sandbox(1, allow_weak, lambda tier: _say(console, tier)) as sandbox:
        introduce(game, console)
        if text is not None:
            show(game, judged(game, text, sandbox), console)
            return 0
        return _rounds(game, sandbox, console, edit)


def _rounds(game: Game, sandbox: Sandbox, console: Console, edit: bool) -> int:
    """Programs until nobody gives another one."""
    people = sys.stdin.isatty()
    if people:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  gives `input` keys that edit the line
        if not edit:
            _say(console, f"\n{HOW}")
    before = STARTER
    while True:
        text = from_editor(game, before) if edit else from_terminal(console)
        if text is None:
            return 0
        if text == SHOW:
            reveal(game, console)
        elif not text.strip() or text.strip() == STARTER.strip():
            _say(console, "nothing to grade: no line of a program")
        else:
            show(game, judged(game, text, sandbox), console)
        if not people and edit:
            return 0
        if edit:
            before = text
            try:
                _typed(lambda: input("Enter: edit it again; Ctrl-D: leave "))
            except EOFError:
                _say(console, "")
                return 0


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
