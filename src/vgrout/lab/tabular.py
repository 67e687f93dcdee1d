"""`vgrout sql` and `vgrout publish`: many runs as tables, through duckdb."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console

from vgrout.lab import fields
from vgrout.lab.archive import ROLLOUTS, STEPS, database, is_record, quoted, with_verdicts, write_table
from vgrout.lab.checkpoint import replace_file
from vgrout.lab.record import claim_folder
from vgrout.lab.run import pairs_note, sandbox_note
from vgrout.lab.runs import Run, find
from vgrout.lab.tables import can_write, number_table, print_wide
from vgrout.types import RunFailed, UserError

SHOWN = 200  # rows of an answer that are printed
WIDEST = 80  # characters of a printed cell
VIEWS = ("runs", "steps", "rollouts")


def _flat(run: Run) -> dict[str, Any]:
    """A run as one row: configuration, rates of the final evaluation as CELL_RATE, CPU seconds."""
    cells = run.cells or {}
    rates = {
        f"{cell}_{what}": found["mean"]
        for cell, of in cells.items()
        for what, found in of.items()
        if isinstance(found, dict) and "mean" in found
    }
    settings = {key: " ".join(value) if isinstance(value, tuple) else value for key, value in asdict(run.cfg).items()}
    facts = {"run": run.name, "label": run.label, "access": run.access, "reads_oracle": run.reads_oracle}
    done = {"steps_done": len(run.steps), "finished": run.cells is not None, "cpu_s": run.seconds.get("cpu")}
    return {**facts, **done, **settings, **rates, "weights_sha256": run.weights_sha256}


@contextmanager
def tables(runs: Sequence[Run], views: Sequence[str] = VIEWS) -> Iterator[Any]:
    """A connection with the views `runs`, `steps` and `rollouts`, or some of them; the last two say in `run` whose row
    it is."""
    with TemporaryDirectory() as folder, database() as db:
        write_table([_flat(run) for run in runs], Path(folder) / "runs.parquet")
        db.execute(f"CREATE VIEW runs AS SELECT * FROM read_parquet({quoted(Path(folder) / 'runs.parquet')})")
        for view, name in (("steps", STEPS), ("rollouts", ROLLOUTS)):
            if view not in views:
                continue
            parts = []
            for i, run in enumerate(runs):
                path = run.folder / name
                if not is_record(run.folder):
                    path = Path(folder) / f"{i}-{name}"
                    write_table(run.steps if view == "steps" else with_verdicts(run.folder), path, level=1)
                parts.append(f"SELECT {quoted(run.name)} AS run, * FROM read_parquet({quoted(path)})")
            db.execute(f"CREATE VIEW {view} AS {' UNION ALL BY NAME '.join(parts)}")
        yield db


def ask(paths: Sequence[Path], query: str, out: Path | None, console: Console) -> int:
    """Print the answer to a query, or write it to `out`: .csv, .json or .parquet. Returns 1 where a run could not be
    read. Raises UserError."""
    import duckdb

    kinds = {".csv": "FORMAT csv, HEADER", ".json": "FORMAT json, ARRAY true", ".parquet": "FORMAT parquet"}
    if out is not None and out.suffix not in kinds:
        raise UserError(f"{out}: give a file that ends in {', '.join(kinds)}")
    can_write(out)
    runs, unread = find(paths)
    with tables(runs, [view for view in VIEWS if view in query.lower()]) as db:
        try:
            if out is not None:
                db.execute(f"COPY ({query.rstrip().rstrip(';')}) TO {quoted(out)} ({kinds[out.suffix]})")
            else:
                answer = db.execute(query)
                if answer.description is None:
                    raise UserError("the query has no answer: give a SELECT")
                names, rows = [c[0] for c in answer.description], answer.fetchmany(SHOWN + 1)
        except duckdb.Error as error:
            raise UserError(f"{type(error).__name__}: {str(error).splitlines()[0]}") from None
    if out is None:
        caption = f"the first {SHOWN} rows" if len(rows) > SHOWN else ""
        shown = [[_cell(value) for value in row] for row in rows[:SHOWN]]
        print_wide(number_table("", caption, [name.replace(" ", "_") for name in names], shown, 1), console)
    for reason in unread.values():
        console.print(f"could not be read: {reason}", style="yellow", markup=False, soft_wrap=True)
    return 1 if unread else 0


def _cell(value: Any) -> str:
    text = "-" if value is None else f"{value:.6g}" if isinstance(value, float) else " ".join(str(value).split())
    return text if len(text) <= WIDEST else f"{text[: WIDEST - 3]}..."


def publish(paths: Sequence[Path], out: Path, console: Console, *, force: bool = False) -> int:
    """A data set of runs: every step, rollout and verdict as Parquet, a card, hashes. Returns 1 where a run could not
    be read. Raises UserError, and RunFailed where it cannot be written."""
    runs, unread = find(paths)
    for place in [path.resolve() for path in paths] + [run.folder.resolve() for run in runs]:
        if place == out.resolve() or place in out.resolve().parents or out.resolve() in place.parents:
            raise UserError(f"{out} and {place} overlap: give another --out")
    claim_folder(out, force=force)
    with tables(runs) as db:
        counts = {view: db.execute(f"SELECT count(*) FROM {view}").fetchone()[0] for view in VIEWS}
        try:
            for view in VIEWS:
                target = quoted(out / f"{view}.parquet")
                db.execute(f"COPY (SELECT * FROM {view}) TO {target} (FORMAT parquet, COMPRESSION zstd)")
            replace_file(out / "README.md", _card(runs, counts))
            names = [f"{view}.parquet" for view in VIEWS] + ["README.md"]
            lines = [f"{sha256((out / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
            replace_file(out / "SHA256SUMS", "".join(lines))
        except OSError as error:
            raise RunFailed(f"cannot write {out}: {error.strerror}") from None
    for reason in unread.values():
        console.print(f"could not be read: {reason}", style="yellow", markup=False, soft_wrap=True)
    console.print(f"{out}: {', '.join(f'{n:,} {view}' for view, n in counts.items())}", soft_wrap=True)
    return 1 if unread else 0


def _card(runs: Sequence[Run], counts: dict[str, int]) -> str:
    """The data set's card: what it is, where it is from, what its columns mean, what not to do with it."""
    arms = sorted({run.label for run in runs})
    marked = sorted({run.label for run in runs if run.reads_oracle})
    unfinished = [run.name for run in runs if run.cells is None]
    made = {key: sorted({json.dumps(run.provenance.get(key)).strip('"') for run in runs}) for key in runs[0].provenance}
    notes = dict.fromkeys(filter(None, (note(run.provenance) for run in runs for note in (sandbox_note, pairs_note))))
    head = ["---", "license: mit", "tags: [reward-hacking, gradient-routing, grpo]", "configs:"]
    head += [line for view in VIEWS for line in (f"- config_name: {view}", f"  data_files: {view}.parquet")] + [
        "---",
        "",
    ]
    body = [
        "# Rollouts of reward hacking under gradient routing",
        "",
        f"{counts['runs']} training runs of {len(arms)} arms ({', '.join(arms)}), seeds "
        f"{', '.join(map(str, sorted({run.seed for run in runs})))}: {counts['steps']:,} steps and "
        f"{counts['rollouts']:,} rollouts with rewards, gate scores and an oracle's verdicts, made by vGROUT.",
        "",
        "Programs here exploit graders on purpose. The verdicts come from an oracle that no training code could read"
        + (f", but for the ceilings {', '.join(marked)}." if marked else "."),
        "A training seed is the unit of any comparison: rollouts of one run share it.",
        *(["", f"Not finished: {', '.join(unfinished)}."] if unfinished else []),
        *(["", *notes] if notes else []),
        "",
        "| made with | |",
        "|---|---|",
        *(f"| {key} | {', '.join(values)} |" for key, values in made.items()),
        "",
        "`runs.parquet` has one row per run: its settings, and rates of the final evaluation as CELL_RATE. "
        "`steps.parquet` and `rollouts.parquet` name the run in `run`; verdicts are the columns `verdict_*`.",
        "",
    ]
    return "\n".join([*head, *body, *fields.markdown().split("\n")[4:]])
