"""The queue: what it refuses, one job at a time, outcomes beside their rules, interruption, pueue."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shlex
import shutil
import signal
import sys
import time

import pytest
from rich.console import Console

from vgrout import cli
from vgrout.lab import queue as queue_module
from vgrout.lab.queue import LOG, RUNNER, add, change, entries, run, show_list, show_one
from vgrout.lab.record import read_jsonl
from vgrout.signals import Interrupted
from vgrout.types import RunFailed, UserError

WHY, RESOLVE = "Does it hold?", "It does if the exit code is 0."
FORK = multiprocessing.get_context("fork")


@pytest.fixture
def queue(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")  # no pueue of this machine's
    return tmp_path / "queue"


def put(queue, script, why=WHY):
    return add(queue, why, RESOLVE, ["sh", "-c", script])


def work(queue, **more):
    console = Console(record=True, width=200, file=open("/dev/null", "w"))
    return run(queue, console, **more), console.export_text()


def states(queue):
    return [entry.state for entry in entries(queue)]


def until(true, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("why", "resolve", "command", "words"),
    [
        ("", RESOLVE, ["true"], ["--why", "question"]),
        ("  \n ", RESOLVE, ["true"], ["--why"]),
        ("???", RESOLVE, ["true"], ["--why"]),
        (WHY, "", ["true"], ["--resolve", "rule"]),
        (WHY, "...", ["true"], ["--resolve"]),
        (WHY, "does  it HOLD?", ["true"], ["--resolve repeats --why"]),
        (WHY, RESOLVE, [], ["behind a --"]),
        (WHY, RESOLVE, ["no-such-program-here"], ["no-such-program-here"]),
        (WHY, RESOLVE, ["sh", "-c", "a\0b"], ["NUL"]),
        (WHY, RESOLVE, ["sh", "-c", "true \udcff"], ["UTF-8"]),
        (WHY + "\x1b[2J", RESOLVE, ["true"], ["--why", "cannot be shown"]),
        (WHY, RESOLVE, ["vgrout", "queue", "run"], ["cannot run a queue"]),
    ],
)
def test_an_entry_that_lacks_something_is_refused(queue, why, resolve, command, words):
    with pytest.raises(UserError) as error:
        add(queue, why, resolve, command)
    assert all(word in str(error.value) for word in words) and not queue.exists()


def test_jobs_run_in_turn_and_outcomes_stand_beside_their_rule(queue, tmp_path):
    put(queue, "echo one >> turn; for i in $(seq 30); do echo line $i; done; exit 0")
    put(queue, "echo two >> turn; echo oops >&2; exit 7")
    put(queue, "echo three >> turn; kill -9 $$")
    code, said = work(queue)
    assert code == 1 and RESOLVE in said and "exit code 7" in said
    assert (tmp_path / "turn").read_text().split() == ["one", "two", "three"]
    assert states(queue) == ["finished", "failed", "failed"]
    ended = [row for row in read_jsonl(queue / LOG) if row["event"] == "ended"]
    assert [row["code"] for row in ended] == [0, 7, 137]
    assert all(row["resolve"] == RESOLVE and row["seconds"] >= 0 for row in ended)
    assert ended[0]["last"] == [f"line {i}" for i in range(11, 31)] and ended[1]["last"][-1] == "oops"
    assert (queue / "logs" / "0001-1.log").read_text().count("line ") == 31  # the command's own line too
    assert work(queue)[0] == 0 and len(read_jsonl(queue / LOG)) == 9  # nothing is left, nothing runs twice


def test_a_job_that_cannot_start_does_not_stop_the_next(queue, tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    put(queue, "true")
    monkeypatch.chdir(tmp_path)
    put(queue, "true")
    (tmp_path / "gone").rmdir()
    assert work(queue)[0] == 1
    first, second = entries(queue)
    assert (first.state, first.code, second.state) == ("failed", 127, "finished")
    assert "gone" in first.last[-1]


def test_what_is_added_meanwhile_runs_too(queue, tmp_path):
    put(queue, "echo here > here; while [ ! -f go ]; do sleep 0.05; done")
    runner = FORK.Process(target=work, args=(queue,))
    runner.start()
    until((tmp_path / "here").exists)
    put(queue, "touch late")
    (tmp_path / "go").touch()
    runner.join(20)
    assert runner.exitcode == 0 and (tmp_path / "late").exists() and states(queue) == ["finished"] * 2


def test_a_killed_runner_leaves_an_interrupted_job_and_no_second_one_beside_it(queue, tmp_path, monkeypatch):
    monkeypatch.setattr(queue_module, "PATIENCE_S", 0.0)
    end = "while [ ! -f go ]; do sleep 0.05; done; exit 1"
    put(queue, f"trap 'echo told > told; {end}' TERM; echo here > here; while :; do sleep 0.05; done")
    put(queue, "touch second")
    runner = FORK.Process(target=work, args=(queue,))
    runner.start()
    until((tmp_path / "here").exists)
    assert states(queue) == ["running", "waiting"]
    with pytest.raises(UserError, match=f"in use by process {runner.pid}"):
        work(queue)
    os.kill(runner.pid, signal.SIGKILL)
    runner.join()
    until((tmp_path / "told").exists)  # the job is told to end, and until it has, it holds the queue
    assert states(queue) == ["running", "waiting"]
    with pytest.raises(UserError, match="in use"):
        work(queue)
    (tmp_path / "go").touch()
    until(lambda: states(queue)[0] == "interrupted")
    shown = Console(record=True, width=200, file=open("/dev/null", "w"))
    show_one(queue, 1, shown)
    text = shown.export_text()
    assert "interrupted" in text and "nobody saw one" in text and "vgrout queue again 1" in text and RESOLVE in text
    assert work(queue)[0] == 0 and states(queue) == ["interrupted", "finished"]  # it is not run again unasked
    lost = [row for row in read_jsonl(queue / LOG) if row["event"] == "interrupted"]
    assert len(lost) == 1 and lost[0]["job"] == 1 and lost[0]["code"] is None and lost[0]["resolve"] == RESOLVE
    change(queue, 1, "again")
    assert states(queue) == ["waiting", "finished"]


def signalled(queue, ready, number):
    """The exit code of a runner that gets a signal once its job is ready for it."""

    def interrupted():
        try:
            work(queue)
        except Interrupted as stop:
            os._exit(128 + stop.number)

    runner = FORK.Process(target=interrupted)
    runner.start()
    until(ready)
    os.kill(runner.pid, number)
    runner.join(20)
    return runner.exitcode


def test_a_signal_goes_on_to_the_job_once_and_the_outcome_is_kept(queue, tmp_path):
    put(queue, "trap 'echo told >> told; exit 5' INT; echo here > here; while :; do sleep 0.05; done")
    put(queue, "true")

    code = signalled(queue, (tmp_path / "here").exists, signal.SIGINT)
    assert code == 130 and (tmp_path / "told").read_text() == "told\n"
    first, second = entries(queue)
    assert (first.state, first.code, first.by, second.state) == ("interrupted", 5, "SIGINT", "waiting")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_all_that_a_job_started(queue, tmp_path, number):
    put(queue, "sh -c 'echo $$ > inner; sleep 60; echo late > late'; true")
    put(queue, "true")

    inner = tmp_path / "inner"
    code = signalled(queue, lambda: inner.exists() and inner.read_text(), number)
    assert code == 128 + number and not (tmp_path / "late").exists()
    with pytest.raises(ProcessLookupError):
        os.kill(int(inner.read_text()), 0)
    assert states(queue) == ["interrupted", "waiting"]


def test_jobs_run_without_a_terminal_and_without_their_folder_of_logs(queue, tmp_path, capsys):
    for i in (1, 2):
        put(queue, f"echo {i} >> turn")
    (queue / "logs").rmdir()
    with contextlib.suppress(OSError), open("/dev/full", "w") as full:  # its own close fails
        assert run(queue, Console(file=full)) == 0
    assert (tmp_path / "turn").read_text().split() == ["1", "2"] and states(queue) == ["finished"] * 2
    put(queue, "echo 3 >> turn")
    shutil.rmtree(queue / "logs")
    (queue / "logs").touch()  # no folder
    assert work(queue)[0] == 1 and states(queue)[2] == "failed" and "was not started" in capsys.readouterr().err
    assert entries(queue)[2].code == queue_module.NOT_STARTED


def test_an_outcome_that_cannot_be_written_is_said(queue, monkeypatch):
    put(queue, "exit 3")
    writing, calls = queue_module._writing, []

    def fails(folder):
        calls.append(folder)
        if len(calls) == 3:  # after `_close_lost` and `_next`
            raise UserError("cannot write it")
        return writing(folder)

    monkeypatch.setattr(queue_module, "_writing", fails)
    with pytest.raises(RunFailed, match="job 1 ended with exit code 3 after .*, but cannot write it"):
        work(queue)


def test_what_a_job_leaves_behind_does_not_hold_the_queue(queue, tmp_path):
    put(queue, "sleep 5 & echo $! > left")
    assert work(queue)[0] == 0
    try:
        put(queue, "true")
        assert work(queue)[0] == 0
    finally:
        os.kill(int((tmp_path / "left").read_text()), signal.SIGKILL)


def test_two_runners_take_no_job_twice(queue, tmp_path):
    for i in range(6):
        put(queue, f"echo {i} >> turn; sleep 0.02")
    runners = [FORK.Process(target=work, args=(queue,), kwargs={"job": job}) for job in (2, 2, 1, 5)]
    for runner in runners:
        runner.start()
    for runner in runners:
        runner.join(30)
    assert [runner.exitcode for runner in runners] == [0] * 4
    assert work(queue)[0] == 0
    assert sorted((tmp_path / "turn").read_text().split()) == list("012345")
    started = [row["job"] for row in read_jsonl(queue / LOG) if row["event"] == "started"]
    assert sorted(started) == [1, 2, 3, 4, 5, 6]


def test_again_and_cancelled(queue):
    put(queue, "test -f flag || { touch flag; exit 1; }")
    put(queue, "touch never")
    change(queue, 2, "cancelled")
    assert work(queue)[0] == 1 and states(queue) == ["failed", "cancelled"]
    change(queue, 1, "again")
    assert work(queue)[0] == 0 and states(queue) == ["finished", "cancelled"]
    assert not (queue.parent / "never").exists() and entries(queue)[0].attempts == 2
    assert {p.name for p in (queue / "logs").iterdir()} == {"0001-1.log", "0001-2.log"}
    for job, event, words in ((1, "cancelled", "finished"), (3, "again", "1 to 2"), (0, "again", "no job 0")):
        with pytest.raises(UserError, match=words):
            change(queue, job, event)


def test_a_line_that_was_cut_off_is_no_harm_and_a_broken_one_is_named(queue):
    put(queue, "true")
    whole = (queue / LOG).read_bytes()
    (queue / LOG).write_bytes(whole + b'{"event": "add')
    assert put(queue, "true") == 2 and states(queue) == ["waiting", "waiting"]
    for junk in (b"junk\n", b"[1]\n", b'{"event": "ended", "job": 1}\n', b'{"event": "fly", "job": 1}\n', b"\xff\n"):
        (queue / LOG).write_bytes(whole + junk)
        for use in (lambda: entries(queue), lambda: put(queue, "true"), lambda: work(queue)):
            with pytest.raises(UserError, match=f"{LOG}:2 is no record"):
                use()
    assert (queue / LOG).read_bytes() == whole + junk  # nothing is repaired behind anybody's back


def test_folders_that_are_no_queue(queue, tmp_path):
    with pytest.raises(UserError, match="vgrout queue add"):
        show_list(queue, Console())
    queue.mkdir()
    (queue / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="something else than a queue"):
        put(queue, "true")
    assert [p.name for p in queue.iterdir()] == ["notes.txt"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot make a queue"):
        put(tmp_path / "file", "true")


def fake_pueue(tmp_path, body):
    """A program of that name; it keeps each call's arguments, one a line."""
    file = tmp_path / "bin" / "pueue"
    file.parent.mkdir(exist_ok=True)
    file.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" --- >> {tmp_path}/calls\n{body}\n')
    file.chmod(0o755)


def test_pueue_gets_a_command_that_runs_the_job_by_this_queue(queue, tmp_path, monkeypatch):
    put(queue, "echo 'a  b' > out; exit 4", why='Is it "quoted" & $safe?')
    put(queue, "true")
    change(queue, 2, "cancelled")
    put(queue, "touch third")
    fake_pueue(tmp_path, f"wc -l < {tmp_path}/calls")
    code, said = work(queue)
    assert code == 0 and "2 jobs handed over" in said and states(queue) == ["handed over", "cancelled", "handed over"]
    calls = [call.splitlines() for call in (tmp_path / "calls").read_text().split("---\n")[:-1]]
    head = ["add", "--print-task-id", "--working-directory", str(tmp_path), "--label"]
    assert [call[:5] for call in calls] == [head, head] and [call[6] for call in calls] == ["--", "--"]
    assert calls[0][5] == 'vgrout 1: Is it "quoted" & $safe?' and all(len(call) == 8 for call in calls)
    handed = [row for row in read_jsonl(queue / LOG) if row["event"] == "handed"]
    assert [row["task"].isdigit() for row in handed] == [True, True] and not (tmp_path / "out").exists()
    assert work(queue)[1].startswith("0 jobs")  # none is handed over twice
    python, m, vgrout, *args = shlex.split(calls[0][7])  # what pueue's shell makes of its one word
    assert [python, m, vgrout] == [sys.executable, "-m", "vgrout"]
    monkeypatch.setattr(sys, "argv", ["vgrout", *args])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 1 and (tmp_path / "out").read_text() == "a  b\n"
    assert states(queue) == ["failed", "cancelled", "handed over"] and not (tmp_path / "third").exists()
    assert work(queue, job=1, local=True)[1].startswith("job 1 neither waits")  # pueue restarts its task
    change(queue, 3, "again")
    assert work(queue, local=True)[0] == 0 and (tmp_path / "third").exists()


@pytest.mark.parametrize(
    ("body", "word"),
    [("echo 'no daemon' >&2; exit 1", "no daemon"), ("echo hello", "'hello'"), ("exit 3", "exit code 3")],
)
def test_a_pueue_that_takes_nothing_leaves_the_job_waiting(queue, tmp_path, body, word):
    put(queue, "true")
    fake_pueue(tmp_path, body)
    with pytest.raises(RunFailed, match=word) as error:
        work(queue)
    assert "--local" in str(error.value) and states(queue) == ["waiting"]


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["add", "--resolve", RESOLVE, "--", "true"], 2, ["--why"]),
        (["add", "--why", WHY, "--", "true"], 2, ["--resolve"]),
        (["add", "--why", WHY, "--resolve", RESOLVE], 2, ["behind a --"]),
        (["add", "--why", WHY, "--resolve", RESOLVE, "--"], 2, ["behind a --"]),
        (["add", "--why", WHY, "--resolve", RESOLVE, "true", "--steps", "3"], 2, ["behind a --"]),
        (["add", "--why", WHY, "--resolve", RESOLVE, "--", "vgrout", "train", "--steps", "3"], 2, ["--out"]),
        (["add", "--why", WHY, "--resolve", RESOLVE, "--", "vgrout", "decide", "--arms", "x"], 2, ["unknown arm 'x'"]),
        (["add", "--why", WHY, "--resolve", RESOLVE, "--", "vgrout", "train", "--stepz", "3"], 2, ["--stepz"]),
        (["add", "--why", WHY, "--resolve", RESOLVE, "--", "vgrout", "sweep", "--arms", "x"], 2, ["unknown arm 'x'"]),
        (["add", "--why", WHY, "--resolve", RESOLVE, "--", "vgrout", "trian"], 2, ["trian"]),
        (["show", "1"], 2, ["no queue"]),
        (["run"], 2, ["no queue"]),
        (["again", "one"], 2, ["one"]),
        (
            ["add", "--why", WHY, "--resolve", RESOLVE, "--", "vgrout", "train", "--preset", "smoke", "--out", "x"],
            0,
            ["job 1"],
        ),
    ],
)
def test_the_command_line(queue, monkeypatch, capfd, args, code, words):
    monkeypatch.setattr(sys, "argv", ["vgrout", "queue", *args])
    with pytest.raises(SystemExit) as left:
        cli.main()
    out, err = capfd.readouterr()
    assert (left.value.code or 0) == code, err
    assert all(word in out + err for word in words), out + err
    assert (queue.parent / "runs").exists() == (code == 0)


def test_a_held_lock_is_seen(queue):
    put(queue, "true")
    assert not queue_module._at_work(queue)
    with queue_module._runner(queue, wait=False):
        assert queue_module._at_work(queue) and (queue / RUNNER).read_text() == f"process {os.getpid()}\n"
    assert not queue_module._at_work(queue)
