"""What every measure is: a question about runs, its answer as a table. All of them are exploratory.

Most read records. One `OnWeights` samples or trains from what a run ships; its result is kept beside the run, in
measures/NAME.json, and goes into the run's record.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any, ClassVar

from vgrout.config import Config
from vgrout.lab.archive import MEASURES
from vgrout.lab.checkpoint import replace_file
from vgrout.lab.evaluate import HEADLINE
from vgrout.lab.run import Workshop
from vgrout.lab.runs import Run
from vgrout.types import UserError

Cells = Mapping[str, Any]


@dataclass(frozen=True)
class Shown:
    """A table: the first `texts` columns are text. `data` are the same numbers for programs; `notes` what a reader has
    to know of these runs."""

    head: tuple[str, ...]
    rows: list[list[str]]
    data: list[dict[str, Any]]
    texts: int = 1
    notes: list[str] = field(default_factory=list)


class Measure(ABC):
    """`name` is that of its command, `title` of its table; `what` explains the columns, `needs` says what runs must
    have."""

    name: ClassVar[str]
    title: ClassVar[str]
    what: ClassVar[str]
    needs: ClassVar[str]

    @abstractmethod
    def of(self, runs: Sequence[Run], base: Cells | None) -> Shown | None:
        """The answer for these runs and the untrained model's cells; None where they have nothing for it."""


class OnWeights(Measure):
    """A measure that needs the weights of a finished run. `settings` are its constants: results with others are not put
    beside each other."""

    settings: ClassVar[Mapping[str, Any]] = {}

    @abstractmethod
    def make(self, run: Path, cfg: Config, shop: Workshop) -> dict[str, Any]:
        """Measure a finished run, JSON-ready. `shop` has the run's model with an adapter that nothing was loaded into,
        and the environment with open loopholes. Raises UserError where the run is none to measure."""

    def made(self, runs: Sequence[Run]) -> list[tuple[Run, dict[str, Any]]]:
        """Runs that were measured with the settings of today, with what came out."""
        return [(run, run.measures[self.name]["result"]) for run in runs if self.is_made(run)]

    def is_made(self, run: Run) -> bool:
        return run.measures.get(self.name, {}).get("settings") == json.loads(json.dumps(self.settings))

    def store(self, run: Path, result: Mapping[str, Any], provenance: Mapping[str, Any]) -> None:
        """Keep what was measured beside the run, with how and on what. Raises UserError where it cannot be written."""
        told = {"settings": self.settings, "provenance": provenance, "result": result}
        try:
            (run / MEASURES).mkdir(exist_ok=True)
            replace_file(run / MEASURES / f"{self.name}.json", json.dumps(told, indent=1) + "\n")
        except OSError as error:
            raise UserError(f"cannot write the measure of {run}: {error.strerror}") from None


# Settings that runs share where one is held against another: what is learned from, and how it is evaluated.
SHARED = (
    *("model", "env", "modes", "steps", "prompts", "group", "max_new", "temperature", "unhackable_frac"),
    *("teacher_n", "teacher_off_step", "eval_rollouts", "eval_temperature"),
)


def comparable(a: Run, b: Run) -> bool:
    return all(getattr(a.cfg, key) == getattr(b.cfg, key) for key in SHARED)


def by_label(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs of each label, in the order of labels."""
    out: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        out[run.label].append(run)
    return dict(out)


def marked(run: Run) -> str:
    """The run's label, with the mark of arms that read the oracle."""
    return run.label + (" *" if run.reads_oracle else "")


def place(run: Run) -> tuple[float, float]:
    """(solve, hack) of what a finished run ships."""
    return run.cells[HEADLINE]["solve"]["mean"], run.cells[HEADLINE]["hack"]["mean"]


def percent(values: Sequence[float | None]) -> str:
    """The mean in percent, '-' of nothing."""
    known = [v for v in values if v is not None]
    return f"{100 * mean(known):.0f}" if known else "-"


def listed(values: Sequence[float | None], scale: float = 100.0, digits: int = 0) -> str:
    """Values by seed; none is -0."""
    return " ".join("-" if v is None else f"{round(scale * v, digits) + 0.0:.{digits}f}" for v in values) or "-"


def average(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return mean(known) if known else None
