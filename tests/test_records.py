"""Records of runs: packed, unpacked, damaged, read; and the page about them."""

import base64
import gzip
import io
import json
import shutil
import threading
from hashlib import sha256
from http.client import HTTPConnection
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from vgrout.config import preset
from vgrout.lab import explorer, fields
from vgrout.lab.archive import (
    RUN,
    STEPS,
    column_types,
    database,
    is_record,
    pack,
    quoted,
    read_record,
    unpack,
)
from vgrout.lab.claims import hits
from vgrout.lab.record import finished, read_jsonl, weights_sha256
from vgrout.lab.report import page, report
from vgrout.lab.runs import find
from vgrout.lab.tabular import ask, publish
from vgrout.lab.view import bind
from vgrout.types import UserError

pytest.importorskip("duckdb")


@pytest.fixture(scope="module")
def made(small_run, tmp_path_factory):
    """A small run of routeV, and its record."""
    root = tmp_path_factory.mktemp("archive")
    shutil.copytree(small_run, root / "run")
    pack(root / "run", root / "record")
    return root


def without_empty(rows):
    return [{key: value for key, value in row.items() if value is not None} for row in rows]


def test_a_record_unpacks_to_the_logs_of_its_run(made, tmp_path):
    run, back = made / "run", tmp_path / "back"
    unpack(made / "record", back)
    for log in ("steps", "rollouts", "verdicts", "evals"):
        there, here = (read_jsonl(folder / f"{log}.jsonl") for folder in (run, back))
        assert there and without_empty(here) == without_empty(there), log
    assert {tuple(row) for row in read_jsonl(back / "rollouts.jsonl")} == {
        tuple(row) for row in read_jsonl(run / "rollouts.jsonl")
    }
    for name in ("config", "provenance", "eval", "timing"):
        there, here = (json.loads((folder / f"{name}.json").read_text()) for folder in (run, back))
        assert here == there
    assert finished(back) and not finished(back, weights=True) and finished(run, weights=True)
    assert weights_sha256(back) == weights_sha256(run)
    pack(back, tmp_path / "again")
    again = read_record(tmp_path / "again")
    assert again["eval"] == read_record(made / "record")["eval"] and again["weights_sha256"] == weights_sha256(run)


def test_a_record_is_small(made):
    logs = sum((made / "run" / f"{log}.jsonl").stat().st_size for log in ("steps", "rollouts", "verdicts"))
    tables = sum(path.stat().st_size for path in (made / "record").glob("*.parquet"))
    assert tables < logs / 4


@pytest.mark.parametrize("name", [RUN, STEPS])
def test_a_damaged_record_is_refused(made, tmp_path, name):
    bad = tmp_path / "bad"
    shutil.copytree(made / "record", bad)
    (bad / name).write_bytes((bad / name).read_bytes()[:-9] + b"something")
    with pytest.raises(UserError, match="damaged|no whole record"):
        unpack(bad, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_in_the_way_stays(made, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="in use"):
        pack(made / "run", tmp_path)
    with pytest.raises(UserError, match="in use"):
        unpack(made / "record", tmp_path)
    with pytest.raises(UserError, match="no finished run"):
        pack(tmp_path, tmp_path / "record")
    assert (tmp_path / "notes.txt").read_text() == "mine" and not is_record(tmp_path / "record")


def test_column_types():
    rows = [{"a": 1, "b": None, "c": True, "d": ["x"]}, {"a": 2.5, "b": None, "c": False, "e": "2026-01-01"}]
    want = {"a": "DOUBLE", "b": "BOOLEAN", "c": "BOOLEAN", "d": "VARCHAR[]", "e": "VARCHAR"}
    assert column_types(rows) == want
    for mixed in ({"a": {}}, {"a": "1"}, {"a": True}):
        with pytest.raises(ValueError, match="no column holds"):
            column_types([*rows, mixed])


# What is read back: runs, wherever they are, and a page about them.


def test_runs_are_found_wherever_they_are(made):
    runs, unread = find([made / "run"])
    kept, _ = find([made / "record"])
    assert not unread and [r.label for r in runs] == [r.label for r in kept] == ["routeV"]
    (run,), (record,) = runs, kept
    assert record.cfg == run.cfg and record.cells == run.cells and record.evals == run.evals
    assert without_empty(record.steps) == without_empty(run.steps)
    assert record.weights_sha256 == run.weights_sha256 and run.oracle
    assert without_empty(record.rollouts()) == without_empty(run.rollouts())
    rows = run.evaluated("heldout_deploy")
    assert len(rows) == preset("smoke").eval_rollouts and all(row["verdict_compiled"] in (True, False) for row in rows)
    assert np.nanmean(hits(record, "solve", "heldout_deploy")[1]) == run.cells["heldout_deploy"]["solve"]["mean"]


def test_what_cannot_be_read_is_named(made, tmp_path):
    shutil.copytree(made / "record", tmp_path / "routeV-s0")
    shutil.copytree(made / "run", tmp_path / "bad-s0")
    (tmp_path / "bad-s0" / "config.json").write_text("{")
    runs, unread = find([tmp_path])
    assert [run.name for run in runs] == ["routeV-s0"] and "is not JSON" in unread[tmp_path / "bad-s0"]
    with pytest.raises(UserError, match="more than one run is called routeV-s0"):
        find([made / "record", tmp_path])
    with pytest.raises(UserError, match="no run in"):
        find([tmp_path / "routeV-s0" / "nowhere"])
    with pytest.raises(UserError, match="is not JSON"):
        find([tmp_path / "bad-s0"])


def test_a_page_about_one_run(made, tmp_path):
    console = Console(file=io.StringIO())
    for source in ("run", "record"):
        assert report([made / source], tmp_path / f"{source}.html", tmp_path / "figures", console) == 0
    page = (tmp_path / "run.html").read_text()
    assert page == (tmp_path / "record.html").read_text()
    assert "everything below is exploratory" in page and 'id="plane"' in page and page.count("<svg") == 5
    assert "src=" not in page and "@import" not in page and "url(" not in page  # nothing from elsewhere
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        f"{name}.{kind}" for name in ("plane", "restore", "training", "scores", "modes") for kind in ("svg", "png")
    }


@pytest.mark.parametrize(
    "file, text",
    [
        ("steps.jsonl", '{"lr": 1}\n'),
        ("steps.jsonl", "3\n"),
        ("rollouts.jsonl", "junk\n"),
        ("verdicts.jsonl", ""),
        ("eval.json", '{"cells": {}}'),
        ("eval.json", "[]"),
        ("provenance.json", "[]"),
        ("timing.json", "[]"),
    ],
)
def test_a_damaged_run_is_left_out(made, tmp_path, file, text):
    shutil.copytree(made / "run", tmp_path / "bad-s0")
    shutil.copytree(made / "record", tmp_path / "routeV-s0")
    (tmp_path / "bad-s0" / file).write_text(text)
    runs, unread = find([tmp_path])
    assert [run.name for run in runs] == ["routeV-s0"] and "is damaged" in unread[tmp_path / "bad-s0"]


def test_a_page_replaces_no_record(made, tmp_path):
    with pytest.raises(UserError, match="ends in .html"):
        report([made / "run"], made / "run" / "config.json", None, Console(file=io.StringIO()))


def test_a_page_about_half_a_run(made, tmp_path):
    shutil.copytree(made / "run", tmp_path / "routeV-s0")
    (tmp_path / "routeV-s0" / "eval.json").unlink()
    shutil.copytree(made / "record", tmp_path / "none-s0")
    (tmp_path / "none-s0" / STEPS).write_bytes(b"junk")
    console = Console(file=io.StringIO(), width=200)
    assert report([tmp_path], tmp_path / "page.html", None, console) == 1
    page = (tmp_path / "page.html").read_text()
    assert "1 not finished" in page and "0 of 1" in page and 'id="training"' in page and 'id="plane"' not in page
    assert "Could not be read" in page and "damaged" in console.file.getvalue()


def test_text_of_runs_is_escaped(made, tmp_path):
    shutil.copytree(made / "run", tmp_path / "routeV-s0")
    file = tmp_path / "routeV-s0" / "provenance.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"sandbox": "<script>alert(1)</script>"}))
    html, _, _ = page([tmp_path])
    assert "<script>alert" not in html and "&lt;script&gt;alert" in html


# Many runs as tables, a data set, and a page on a port.


def test_sql(made, tmp_path):
    console = Console(file=io.StringIO(), width=200)
    query = "SELECT label, round(avg(heldout_deploy_solve), 4) AS solve FROM runs GROUP BY 1"
    assert ask([made / "run"], query, None, console) == 0 and "routeV" in console.file.getvalue()
    answers = {}
    for source in ("run", "record"):
        out = tmp_path / f"{source}.json"
        query = "SELECT phase, count(*) AS n, sum(verdict_solved::int) AS solved FROM rollouts GROUP BY 1 ORDER BY 1"
        ask([made / source], query + ";", out, console)
        answers[source] = json.loads(out.read_text())
    rows = find([made / "run"])[0][0].rollouts()
    want = {phase: sum(row["phase"] == phase for row in rows) for phase in {row["phase"] for row in rows}}
    assert {row["phase"]: row["n"] for row in answers["run"]} == want and answers["run"] == answers["record"]
    with pytest.raises(UserError, match="nope"):
        ask([made / "run"], "SELECT nope FROM steps", None, console)
    with pytest.raises(UserError, match="ends in .csv"):
        ask([made / "run"], "SELECT 1", tmp_path / "answer.txt", console)


def test_publish(made, tmp_path):
    publish([made / "run", made / "record"][:1], tmp_path / "set", Console(file=io.StringIO()))
    with database() as db:
        found = db.execute(f"SELECT count(*) FROM read_parquet({quoted(tmp_path / 'set' / 'rollouts.parquet')})")
        assert found.fetchone()[0] == len(find([made / "run"])[0][0].rollouts())
    card = (tmp_path / "set" / "README.md").read_text()
    assert "1 training runs of 1 arms (routeV)" in card and "| `m_auroc` |" in card
    for line in (tmp_path / "set" / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ")
        assert sha256((tmp_path / "set" / name).read_bytes()).hexdigest() == digest
    with pytest.raises(UserError, match="in use"):
        publish([made / "run"], tmp_path / "set", Console(file=io.StringIO()))
    shutil.copytree(made / "run", tmp_path / "own")
    for out in (tmp_path / "own", tmp_path / "own" / "set", tmp_path):
        with pytest.raises(UserError, match="overlap"):
            publish([tmp_path / "own"], out, Console(file=io.StringIO()), force=True)
    assert (tmp_path / "own" / "eval.json").is_file()


def test_every_field_has_a_meaning(made):
    for name in fields.TABLES:
        assert not fields.undocumented(name, read_jsonl(made / "run" / f"{name}.jsonl")), name
    assert (Path(__file__).parents[1] / "docs" / "metrics.md").read_text() == fields.markdown()


def test_the_rollouts_of_a_page(made):
    """What the page holds is what the run recorded; where not all fit, whole steps and the headline stay."""
    runs, _ = find([made / "run"])
    rows = runs[0].rollouts()
    held = json.loads(gzip.decompress(base64.b64decode(explorer.packed(explorer.table(runs)))))
    columns = held["columns"]
    assert held["every"] == 1 and held["whole"] and len(columns["id"]) == len(rows)
    for i, row in enumerate(rows):
        prompt = held["prompts"][columns["prompt"][i]]
        assert held["texts"][columns["text"][i]] == row["text"] and held["ids"][columns["id"][i]] == row["id"]
        assert prompt == {"problem": row["problem"], "text": row["prompt"], "source": row["source"]}
        bits = {flag: bool(columns["bits"][i] >> k & 1) for k, flag in enumerate(held["flags"])}
        assert bits == {flag: row[f"verdict_{flag}"] for flag in held["flags"]}
        assert columns["step"][i] == row.get("step") and held["problems"][row["problem"]]["canonical"]
    few = explorer.table(runs, limit=2 * explorer.step_size(runs[0]) + runs[0].cfg.eval_rollouts)
    steps = [step for step in few["columns"]["step"] if step is not None]
    assert (
        few["every"] == 2
        and not few["whole"]
        and set(steps) == {0, 2}
        and len(steps) == 2 * explorer.step_size(runs[0])
    )
    assert few["phases"] == ["train", "eval:heldout_deploy"]


def test_a_page_on_a_port(made):
    with bind([made / "record"], 0, Console(file=io.StringIO())) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = server.server_address[1]

        def get(path, host):
            connection = HTTPConnection("127.0.0.1", port, timeout=20)
            connection.request("GET", path, headers={"Host": host})
            answer = connection.getresponse()
            return answer.status, answer.read().decode()

        status, html = get("/", f"127.0.0.1:{port}")
        assert status == 200 and 'id="x-data"' in html
        assert get("/", "evil.example")[0] == 404 and get("/etc/passwd", f"localhost:{port}")[0] == 404
        server.shutdown()
    with pytest.raises(UserError, match="port = 70000"):
        bind([made / "record"], 70000, Console(file=io.StringIO()))


def test_scales_between_what_ships_and_what_was_trained(made, tmp_path):
    """A half-strength quarantine is a point of its own; without one the page has no such figure."""
    (run,), _ = find([made / "run"])
    assert [point["scale"] for point in run.scales["shrunk"]] == [0.5]
    assert [point["scale"] for point in run.scales["restored"]] == [0.5]
    figures = {figure.name for figure in page([made / "run"])[1]}
    assert "restore" in figures and "restore" not in {
        figure.name for figure in page([without_scales(made / "run", tmp_path)])[1]
    }


def without_scales(run, out):
    shutil.copytree(run, out / "routeV-s0")
    said = json.loads((run / "eval.json").read_text())
    del said["scales"]
    (out / "routeV-s0" / "eval.json").write_text(json.dumps(said))
    return out / "routeV-s0"
