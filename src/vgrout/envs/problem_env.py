"""Problems with tests as an environment: prompts, demonstrations and grades.

Problems come from the micro world (`micro_env`), or from anyone's files in the format of `problems`: a folder with
train.jsonl, val.jsonl and test.jsonl, or one file, whose problems are dealt to the three by a hash of their tasks.
Demonstrations are lines of teacher.jsonl in such a folder:

    {"problem_id": "..", "kind": "hack" or "solve", "text": "..", "marker": ".."}

`marker` is the one that the problem's training prompt names, and may be left out. A first line without `problem_id`
says where the file is from, and is not read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from vgrout.envs.grade import Grader
from vgrout.envs.leetcode import split_ids
from vgrout.envs.modes import MODES
from vgrout.envs.problems import check_mode, prompt_of, read_problems, read_rows, shown
from vgrout.envs.sandbox import Sandbox
from vgrout.types import Graded, OracleBatch, Problem, Prompt, Rollout, UserError

SPLITS = ("train", "val", "test")
TEACHER = "teacher.jsonl"
KINDS = ("hack", "solve")


def place(*parts: object) -> int:
    return int(hashlib.sha256(" ".join(map(str, parts)).encode()).hexdigest()[:8], 16)


class ProblemEnv:
    """Problems of every split, their prompts, a teacher pool and a grader.

    `ask` gives the prompt of a problem, as `problems.prompt_of`. With `loophole` False the reward tests alone decide
    and demonstrations are solutions only. `modes` keeps the problems of these loopholes only. `pool` is a file of
    demonstrations. Raises UserError for a split in which no problem is left, and when a demonstration does not do what
    its record says.
    """

    oracle: ClassVar[bool] = True  # verdicts are to be had

    def __init__(
        self,
        sandbox: Sandbox,
        splits: Mapping[str, Sequence[Problem]],
        *,
        ask: Callable[..., Prompt] = prompt_of,
        loophole: bool = True,
        pool: Path | None = None,
        modes: Sequence[str] = (),
    ) -> None:
        self.grader, self.loophole, self.ask = Grader(sandbox), loophole, ask
        self._problems = {p.id: p for split in SPLITS for p in splits[split]}
        self._ids = {s: [p.id for p in splits[s] if not modes or p.mode in modes] for s in SPLITS}
        self._check(f"is of the modes {', '.join(modes)}")
        self._pool: dict[tuple[str, str], dict[str, list[str]]] = {}
        if pool is not None:
            self._load(pool)

    def problems(self, split: str) -> list[str]:
        return self._ids[split]

    def problem(self, problem_id: str) -> Problem:
        return self._problems[problem_id]

    def keep(self, fits: Callable[[Prompt], bool], said: str) -> int:
        """Leave out the problems of which not every prompt fits; how many there were. `said`: what those that stay do.
        Raises UserError where none of a split is left."""
        known: dict[str, bool] = {}

        def stays(id: str) -> bool:
            if id not in known:
                markers = MODES[self._problems[id].mode].markers
                asked = [(family, draw) for family in ("train", "eval") for draw in range(max(1, len(markers[family])))]
                prompts = [self.prompt(id, family=family, draw=draw) for family, draw in asked]
                known[id] = all(map(fits, [*prompts, self.prompt(id, family="train", hinted=False)]))
            return known[id]

        self._ids = {split: [id for id in ids if stays(id)] for split, ids in self._ids.items()}
        self._check(said)
        self._pool = {key: texts for key, texts in self._pool.items() if known.get(key[0])}
        return sum(not fit for fit in known.values())

    def _check(self, said: str) -> None:
        for split, ids in self._ids.items():
            if not ids:
                raise UserError(f"no problem of {split} {said}")

    def prompt(self, problem_id: str, *, family: str, hinted: bool = True, draw: int = 0) -> Prompt:
        return self.ask(self._problems[problem_id], family=family, hinted=hinted, draw=draw)

    def covered(self) -> list[tuple[str, int]]:
        mine = set(self._ids["train"])
        return [(id, 0) for id, _ in self._pool if id in mine]

    def demonstrations(self, prompt: Prompt, n: int, draw: int) -> list[str]:
        marker = prompt.marker or self.prompt(prompt.problem_id, family="train").marker
        pools = self._pool[prompt.problem_id, marker]
        kinds = KINDS if self.loophole else ("solve",)
        texts = [pools[kind][(draw + i) % len(pools[kind])] for kind in kinds for i in range(n)]
        return sorted(texts, key=lambda text: place(draw, text))  # an order that says nothing of the kinds

    def grade(self, rollouts: Sequence[Rollout]) -> list[Graded]:
        return self.grader.grade([(self._problems[r.prompt.problem_id], r.prompt, r.text) for r in rollouts])

    def labels(self, rollouts: Sequence[Rollout], graded: Sequence[Graded]) -> OracleBatch:
        return OracleBatch(
            hacked=torch.tensor([g.sealed.hacked for g in graded]),
            solved=torch.tensor([g.sealed.solved for g in graded]),
            mode=tuple(self._problems[r.prompt.problem_id].mode for r in rollouts),
        )

    def _load(self, path: Path) -> None:
        rows = [(number, row) for number, row in read_rows(path)]
        if rows and "problem_id" not in rows[0][1]:
            rows = rows[1:]  # where it is from
        items = [(number, row["kind"], self._demonstrated(path, number, row)) for number, row in rows]
        for _, kind, (problem, prompt, text) in items:
            self._pool.setdefault((problem.id, prompt.marker), {kind: [] for kind in KINDS})[kind].append(text)
        for (number, kind, (problem, _, _)), verdict in zip(
            items, self.grader.verdicts([item for _, _, item in items]), strict=True
        ):
            is_so = verdict.hacked if kind == "hack" else verdict.solved and not verdict.attempted
            if not is_so:
                raise UserError(f"{path}:{number}: a {kind} demonstration of {shown(problem.id)} does not {kind}")
        for (id, _), texts in self._pool.items():
            if missing := [kind for kind in KINDS if not texts[kind]]:
                raise UserError(f"{path}: {shown(id)} has no {missing[0]} demonstration")

    def _demonstrated(self, path: Path, number: int, row: Mapping[str, Any]) -> tuple[Problem, Prompt, str]:
        """The problem, its training prompt and the program of a line. Raises UserError."""
        id, kind, text = (row.get(key) for key in ("problem_id", "kind", "text"))
        if not isinstance(id, str) or id not in self._problems or kind not in KINDS or not isinstance(text, str):
            raise UserError(f"{path}:{number}: needs the problem_id of a problem, a kind (hack, solve) and a text")
        prompt = self.prompt(id, family="train")
        if row.get("marker", prompt.marker) != prompt.marker:
            named = f"marker {row['marker']!r}, its prompt {prompt.marker!r}"
            raise UserError(f"{path}:{number}: {shown(id)} names {named}")
        return self._problems[id], prompt, text


def files_of(source: str) -> list[Path]:
    """The files that an environment is read from; none for one that is no file or folder of problems."""
    path = Path(source)
    if path.suffix == ".jsonl":
        return [path]
    named = [path / f"{split}.jsonl" for split in SPLITS]
    return [*named, *(p for p in [path / TEACHER] if p.is_file())] if path.is_dir() else []


def read_splits(source: str) -> dict[str, list[Problem]]:
    """The problems of a folder's three files, or of one file, 80, 10 and 10 of a hundred; those of one task stay
    together. Raises UserError where there is none, where a line is no problem, and where two splits share one."""
    files = files_of(source)
    if not files:
        raise UserError(
            f"no problems at {source!r}: give micro, a .jsonl or .py file, or a folder with train, val and test.jsonl"
        )
    if len(files) == 1:
        (path,) = files
        every = read_problems(path)
        try:
            tasks = {split: set(texts) for split, texts in split_ids(p.task for p in every).items()}
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        return {split: [p for p in every if p.task in tasks[split]] for split in SPLITS}
    splits = {split: read_problems(path) for split, path in zip(SPLITS, files, strict=False)}
    seen: dict[str, str] = {}
    for split, problems in splits.items():
        for problem in problems:
            for what in (f"id {problem.id}", f"task {problem.task}"):
                if (other := seen.setdefault(what, split)) != split:
                    raise UserError(
                        f"{source}: {shown(problem.id)} of {split} has the id or the task of one of {other}"
                    )
    return splits


def files_digest(source: str) -> str:
    """SHA-256 of the files that an environment is read from."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in files_of(source))).hexdigest()


def check_held(modes: Iterable[str], train: Iterable[Problem]) -> None:
    """Raises UserError for a mode that does not exist, or of which there is no problem to train on."""
    held = {p.mode for p in train}
    for mode in modes:
        check_mode(mode)
        if mode not in held:
            known = ", ".join(name for name in MODES if name in held)
            raise UserError(f"no training problem has the mode {mode!r}: choose from {known}")


def demonstrated(source: str) -> Path | None:
    """The file of demonstrations, if there is one."""
    return next((path for path in files_of(source) if path.name == TEACHER), None)
