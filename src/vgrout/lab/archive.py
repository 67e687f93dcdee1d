"""Compact records of finished runs: all that a run logged, without weights, small enough to keep beside the code.

run.json          configuration, provenance, evaluations, seconds, the hash of the weights, and those of the tables
steps.parquet     steps.jsonl
rollouts.parquet  rollouts.jsonl, with each rollout's verdict
A record unpacks into a folder whose logs say the same, from which an experiment goes on and every table is made. It
has no weights, so nothing can be sampled from it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from vgrout.lab.checkpoint import PART, replace_file
from vgrout.lab.record import RESTORED, check_folder, claim_folder, finished, read_jsonl, weights_sha256
from vgrout.types import RunFailed, UserError

RUN, STEPS, ROLLOUTS = "run.json", "steps.parquet", "rollouts.parquet"
TABLES = (STEPS, ROLLOUTS)
VERDICT = "verdict_"  # how columns begin that come from verdicts.jsonl
KEPT = ("config", "provenance", "eval", "timing")  # JSON files of a run's folder
MEASURES = "measures"  # folder of what was measured on a run's weights after it had finished
LEVEL = 19  # of zstd: a record is written once and kept for good


def database():
    """A connection of its own to duckdb. Raises UserError where it is not installed."""
    try:
        import duckdb
    except ImportError:
        raise UserError("records need duckdb: pip install 'vgrout[report]'") from None
    return duckdb.connect(config={"threads": "1"})


def faults() -> tuple[type[Exception], ...]:
    """What duckdb raises, where it is installed."""
    try:
        import duckdb
    except ImportError:
        return ()
    return (duckdb.Error,)


def quoted(text: object) -> str:
    """A literal of SQL."""
    return "'" + str(text).replace("'", "''") + "'"


def column_types(rows: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """The SQL type of each field of JSON objects: the narrowest that holds all its values."""
    seen: dict[str, set[type]] = {}
    for row in rows:
        for key, value in row.items():
            seen.setdefault(key, set()).add(type(value))
    return {key: _sql(types - {type(None)}) for key, types in seen.items()}


def _sql(types: set[type]) -> str:
    for kinds, name in (({bool}, "BOOLEAN"), ({int}, "BIGINT"), ({int, float}, "DOUBLE"), ({str}, "VARCHAR")):
        if types <= kinds:
            return name
    if types == {list}:
        return "VARCHAR[]"
    raise ValueError(f"no column holds {', '.join(sorted(kind.__name__ for kind in types))} together")


def write_table(rows: Sequence[Mapping[str, Any]], out: Path, level: int = LEVEL) -> None:
    """Rows of equal or different fields as Parquet, in their order."""
    types = column_types(rows) or {"step": "BIGINT"}
    with TemporaryDirectory() as folder, database() as db:
        lines = Path(folder) / "rows.jsonl"
        lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
        columns = "{" + ", ".join(f"{quoted(key)}: {quoted(kind)}" for key, kind in types.items()) + "}"
        source = f"read_json({quoted(lines)}, format = 'newline_delimited', columns = {columns})"
        how = f"(FORMAT parquet, COMPRESSION zstd, COMPRESSION_LEVEL {level})"
        db.execute(f"COPY (SELECT * FROM {source}) TO {quoted(out)} {how}")


def _read_table(path: Path, where: str = "", columns: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Rows with those of `columns` that there are; with all where none is named."""
    some = f"COLUMNS(lambda c : list_contains([{', '.join(map(quoted, columns))}], c))" if columns else "*"
    with database() as db:
        found = db.execute(f"SELECT {some} FROM read_parquet({quoted(path)}){where}")
        names = [column[0] for column in found.description]
        return [dict(zip(names, row, strict=True)) for row in found.fetchall()]


def read_steps(record: Path) -> list[dict[str, Any]]:
    """steps.jsonl; fields that a step did not have are None."""
    return _read_table(record / STEPS)


def read_rollouts(
    record: Path, phases: Sequence[str] = (), columns: Sequence[str] = (), every: int = 1
) -> list[dict[str, Any]]:
    """rollouts.jsonl with the verdicts: of some phases or all, of each `every`-th step of training. Fields that a
    rollout did not have are None."""
    where = [f"phase IN ({', '.join(map(quoted, phases))})"] if phases else []
    where += [f"(phase <> 'train' OR step % {every} = 0)"] if every > 1 else []
    return _read_table(record / ROLLOUTS, f" WHERE {' AND '.join(where)}" if where else "", columns)


def with_verdicts(run: Path) -> list[dict[str, Any]]:
    """rollouts.jsonl of a run's folder, the fields of its verdict behind `verdict_` in each row."""
    verdicts = {row.pop("id"): row for row in read_jsonl(run / "verdicts.jsonl")}
    return [
        row | {VERDICT + key: value for key, value in verdicts.get(row["id"], {}).items()}
        for row in read_jsonl(run / "rollouts.jsonl")
    ]


def is_record(folder: Path) -> bool:
    return all((folder / name).is_file() for name in (RUN, *TABLES))


def pack(run: Path, out: Path) -> None:
    """Write the record of a finished run, whole or not at all. Raises UserError where `run` is not finished, or `out`
    is something else than a record; RunFailed where it cannot be written."""
    if not finished(run):
        raise UserError(f"{run} is no finished run")
    if out.exists() and not is_record(out):
        raise UserError(f"{out} is in use: give another folder")
    part = out.with_name(f".{out.name}.part")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        write_table(read_jsonl(run / "steps.jsonl"), part / STEPS)
        write_table(with_verdicts(run), part / ROLLOUTS)
        said = {name: json.loads((run / f"{name}.json").read_text()) for name in KEPT}
        said |= {"evals": read_jsonl(run / "evals.jsonl"), "weights_sha256": weights_sha256(run)}
        said[MEASURES] = measured(run)
        said["sha256"] = {name: _digest(part / name) for name in TABLES}
        replace_file(part / RUN, json.dumps(said, separators=(",", ":")) + "\n")
        shutil.rmtree(out, ignore_errors=True)
        os.replace(part, out)
    except (OSError, ValueError, LookupError, *faults()) as error:
        said = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise RunFailed(f"cannot write the record {out}: {said}") from None


def measured(run: Path) -> dict[str, Any]:
    """What was measured on a run's weights, by name."""
    files = sorted(file for file in (run / MEASURES).glob("*.json") if not file.name.startswith(PART))
    return {file.stem: json.loads(file.read_text()) for file in files}


def _digest(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()


def read_record(record: Path) -> dict[str, Any]:
    """run.json of a record whose tables are what it says. Raises UserError."""
    try:
        said = json.loads((record / RUN).read_text())
        damaged = [name for name in TABLES if _digest(record / name) != said["sha256"][name]]
        whole = all(isinstance(said[name], dict) for name in KEPT) and isinstance(said["weights_sha256"], str)
        whole = whole and isinstance(said["evals"], list)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{record} is no whole record of a run: {type(error).__name__}: {error}") from None
    if damaged or not whole:
        raise UserError(f"{record} is damaged: {', '.join(damaged) or RUN} is not what was written")
    return said


def unpack(record: Path, run: Path) -> None:
    """The folder of the run, as `pack` found its logs. Raises UserError where the record is damaged or `run` in use,
    RunFailed where it cannot be written."""
    said = read_record(record)
    check_folder(run, force=False)
    whole, run = run, run.with_name(f".{run.name}.part")  # a folder that is half there would be taken for a run
    try:
        shutil.rmtree(run, ignore_errors=True)
        claim_folder(run, force=False)
        _write_lines(run / "steps.jsonl", read_steps(record))
        rollouts, verdicts = [], []
        for row in read_rollouts(record):
            own = {key: value for key, value in row.items() if not key.startswith(VERDICT)}
            verdict = {key.removeprefix(VERDICT): row[key] for key in row if key.startswith(VERDICT)}
            # Fields of the other phase are not there, rather than empty.
            rollouts.append(own if own["phase"] == "train" else {k: v for k, v in own.items() if k not in TRAINED})
            if any(value is not None for value in verdict.values()):
                verdicts.append({"id": own["id"], **verdict})
        _write_lines(run / "rollouts.jsonl", rollouts)
        _write_lines(run / "verdicts.jsonl", verdicts)
        _write_lines(run / "evals.jsonl", said["evals"])
        for name in KEPT:
            if name != "eval":
                replace_file(run / f"{name}.json", json.dumps(said[name], indent=2) + "\n")
        for name, result in said.get(MEASURES, {}).items():
            (run / MEASURES).mkdir(exist_ok=True)
            replace_file(run / MEASURES / f"{name}.json", json.dumps(result, indent=1) + "\n")
        replace_file(run / RESTORED, json.dumps({"weights_sha256": said["weights_sha256"]}) + "\n")
        replace_file(run / "eval.json", json.dumps(said["eval"], indent=2) + "\n")
        if whole.exists():  # empty, or ours and empty
            shutil.rmtree(whole)
        os.replace(run, whole)
    except OSError as error:
        raise RunFailed(f"cannot unpack {record}: {error.strerror or error}") from None


TRAINED = ("advantage", "zone", "flagged", "score", "step")  # what only rollouts of training have


def _write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    replace_file(path, "".join(json.dumps(row) + "\n" for row in rows))
