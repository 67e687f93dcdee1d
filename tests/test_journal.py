"""The journal: what an entry needs, that its past stays, who is named when it does not."""

from __future__ import annotations

import builtins
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from rich.console import Console

from vgrout import cli
from vgrout.lab.journal import FIRST, MARK, add, add_entry, check, faults, parse, sealed
from vgrout.types import UserError

THREE = ("the direction", "absorption", "chance, with one seed")


@pytest.fixture
def journal(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path / "RESEARCH_JOURNAL.md"


def write(journal, title="It held", finding="Deploy hack fell.", hypotheses=THREE, runs=(), figures=()):
    return add(journal, title, finding, hypotheses, runs, figures)


def checked(journal):
    console = Console(record=True, width=300, file=open("/dev/null", "w"))
    return check(journal, console), console.export_text()


def test_newest_first_with_links(journal, small_run, tmp_path):
    (tmp_path / "figures").mkdir()
    figure = tmp_path / "figures" / "a curve.svg"
    figure.write_text("<svg/>")
    run = tmp_path / "runs" / "routeV-s0"
    shutil.copytree(small_run, run)
    assert write(journal, "First") == 1
    assert write(journal, "Second", "Two lines,\n\n- and a list.", runs=[run], figures=[figure]) == 2
    assert write(journal, "Third", runs=[tmp_path / "runs"]) == 3
    text = journal.read_text()
    assert re.findall(r"^## (\d)\. (\w+)", text, re.MULTILINE) == [("3", "Third"), ("2", "Second"), ("1", "First")]
    assert "\n1. the direction\n2. absorption\n3. chance, with one seed\n" in text and "\n- and a list.\n" in text
    linked = re.findall(
        r"^- \[routeV-s0\]\(runs/routeV-s0\): routeV, seed 0, 4 steps, weights sha256 \w{12}$", text, re.M
    )
    assert len(linked) == 2 and "- [a curve.svg](figures/a%20curve.svg): sha256 " in text
    assert checked(journal) == (0, "3 entries, as written\n")
    figure.write_text("<svg></svg>")
    (run / "adapter.safetensors").write_bytes(b"other")
    code, said = checked(journal)
    assert code == 0 and "entry 2 links to a curve.svg, which has changed" in said
    assert said.count("links to routeV-s0, which has changed") == 2
    shutil.rmtree(run)
    assert "entry 3 links to routeV-s0, which is no longer at runs/routeV-s0" in checked(journal)[1]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hypotheses": THREE[:2]}, ["2 hypotheses", "at least 3"]),
        ({"hypotheses": ()}, ["0 hypotheses"]),
        ({"hypotheses": ("Chance", "chance ", "a bug")}, ["twice"]),
        ({"hypotheses": (*THREE, " ")}, ["hypothesis 4 says nothing"]),
        ({"title": "  "}, ["--title says nothing"]),
        ({"finding": "\n"}, ["--finding says nothing"]),
        ({"finding": "x <!-- vgrout entry 9"}, ["comments"]),
        ({"finding": "x\n## 7. Another entry"}, ["heading"]),
        ({"finding": "x\n   ### Three"}, ["'   ### Three' would be a heading"]),
        ({"finding": "x\n#"}, ["'#' would be a heading"]),
        ({"finding": "A heading\n==="}, ["'===' would make a heading of 'A heading'"]),
        ({"finding": "x\n\nA heading\n  -  \nmore"}, ["would make a heading of 'A heading'"]),
        ({"finding": "x\n```python\ny = 1"}, ["code begins with ```", "does not end"]),
        ({"finding": "x\n```\ny\n```\nz\n```"}, ["does not end"]),
        ({"finding": "x\n````\ny\n```"}, ["code begins with ````"]),
        ({"finding": "x\n~~~\ny\n```"}, ["code begins with ~~~"]),
        ({"finding": "x\x1b[2J"}, ["control characters"]),
        ({"runs": ["nowhere"]}, ["nowhere", "no such folder"]),
        ({"runs": ["."]}, ["no run in"]),
        ({"figures": ["no.svg"]}, ["no.svg", "no such file"]),
        ({"figures": ["notes.txt"]}, ["notes.txt", ".svg"]),
        ({"figures": ["folder.svg"]}, ["folder.svg", "directory"]),
        ({"figures": ["two\nlines.svg"]}, [r"'two\nlines.svg'", "cannot be printed"]),
        ({"figures": [os.fsdecode(b"byte\xff.svg")]}, [r"'byte\udcff.svg'", "cannot be printed"]),
        ({"figures": [os.fsdecode(b"byte\xff/a.svg")]}, [r"'byte\udcff/a.svg'", "cannot be printed"]),
    ],
)
def test_what_is_refused_leaves_the_journal_alone(journal, tmp_path, changes, words):
    (tmp_path / "folder.svg").mkdir()
    (tmp_path / os.fsdecode(b"byte\xff")).mkdir()
    for name in ("two\nlines.svg", os.fsdecode(b"byte\xff.svg"), os.fsdecode(b"byte\xff/a.svg")):
        (tmp_path / name).write_text("<svg/>")
    paths = {key: [Path(p) for p in value] for key, value in changes.items() if key in ("runs", "figures")}
    for there in (False, True):
        before = write(journal) and journal.read_text() if there else None
        with pytest.raises(UserError) as error:
            write(journal, **changes | paths)
        assert all(word in str(error.value) for word in words), error.value
        assert (journal.read_text() if journal.exists() else None) == before


def test_a_run_whose_name_cannot_be_shown(journal, small_run, tmp_path):
    for name in (os.fsdecode(b"byte\xff-s0"), "two\nlines-s0"):
        shutil.copytree(small_run, tmp_path / name)
        with pytest.raises(UserError, match="cannot be printed"):
            write(journal, runs=[tmp_path / name])
    assert not journal.exists()


@pytest.mark.parametrize(
    "finding",
    [
        "#3 did it",
        "####### seven",
        "x\n    # code",
        "x\n\n---\n\ny",
        "x\n```python\n# a comment\nA\n===\n```\ny",
        "x\n~~~\n```\n~~~",
        "x\n````\n```\n````\n---",
        "| a | b |\n| - | - |\n| 1 | 2 |",
    ],
)
def test_markdown_that_stays_inside_an_entry(journal, finding):
    write(journal, finding=finding)
    assert f"\n\n{finding}\n\n**What" in journal.read_text() and checked(journal) == (0, "1 entry, as written\n")


def test_a_journal_behind_a_symbolic_link(journal, tmp_path, tmp_path_factory):
    for folder in ("notes", "figures"):
        (tmp_path / folder).mkdir()
    (tmp_path / "figures" / "a.svg").write_text("<svg/>")
    journal.symlink_to("notes/J.md")
    by = tmp_path_factory.mktemp("elsewhere") / "by"
    by.symlink_to(tmp_path)
    for path in (journal, by / "notes" / "J.md"):
        write(path, figures=[Path("figures/a.svg")])
        write(path, figures=[by / "figures" / "a.svg"])
        assert checked(path)[1].endswith("as written\n") and "note:" not in checked(path)[1]
    assert journal.is_symlink() and os.listdir(tmp_path / "notes") == ["J.md"]
    assert journal.read_text().count("](../figures/a.svg)") == 4
    loop = tmp_path / "loop.md"
    loop.symlink_to("loop.md")
    with pytest.raises(UserError, match="cannot read"):
        write(loop)


@pytest.mark.parametrize("mode", [0o600, 0o664, 0o444])
def test_permissions_stay(journal, mode):
    write(journal)
    journal.chmod(mode)
    left = journal.with_name(f".tmp-{journal.name}")  # by a writer that was killed
    left.write_text("half")
    left.chmod(0o444)
    write(journal, "Second")
    assert journal.stat().st_mode & 0o7777 == mode and not left.exists()


def test_line_ends_of_the_past_stay(journal):
    write(journal)
    plain = journal.read_bytes()
    past = plain.replace(b"\n", b"\r\n")
    journal.write_bytes(past)
    assert checked(journal) == (0, "1 entry, as written\n")
    assert write(journal, "Second") == 2 and checked(journal) == (0, "2 entries, as written\n")
    text = journal.read_bytes()
    head, entry = past[: past.index(b"\r\n## 1.")], past[past.index(b"\r\n## 1.") :]
    assert text.startswith(head) and text.endswith(entry) and text.count(b"\n") == text.count(b"\r\n")
    body = plain[plain.index(b"\n## 1.") :]
    journal.write_bytes(head + body)  # a mixture
    write(journal, "Second")
    assert journal.read_bytes().endswith(body) and checked(journal)[0] == 0
    journal.write_bytes(text.replace(b"absorption", b"adsorption", 1))
    assert "changed: entry 2" in checked(journal)[1]


def test_links_of_the_author_are_his_own(journal):
    figure = journal.parent / "a.svg"
    figure.write_text("<svg/>")
    lists = "- [paper](https://arxiv.org/abs/1)\n- [notes](gone.md): sha256 0123456789ab\n- [above](#top)"
    for finding in (lists, f"**Runs**\n\n{lists}", f"**What could explain it**\n\n{lists}"):
        write(journal, finding=finding)
        write(journal, finding=finding, figures=[figure])
    assert checked(journal) == (0, "6 entries, as written\n")
    text = journal.read_text()
    by_hand = text.replace("**Figures**\n", "**Figures**\n\n- [paper](https://arxiv.org/abs/1)\n- [top](#top)\n")
    journal.write_text(by_hand)
    assert "note:" not in checked(journal)[1]
    journal.write_text(text)
    figure.unlink()
    assert checked(journal)[1].count("links to a.svg, which is no longer at a.svg") == 3


@pytest.mark.parametrize("name", ["a[1].svg", "a](b) [c.svg", "back\\slash.svg", "back\\]].svg", "(round) #1.svg"])
def test_names_with_signs_of_markdown(journal, name):
    figure = journal.parent / name
    figure.write_text("<svg/>")
    write(journal, figures=[figure])
    shown = name.replace("\\", "\\\\").replace("[", "\\[").replace("]", "\\]")
    assert f"- [{shown}](" in journal.read_text() and checked(journal) == (0, "1 entry, as written\n")
    figure.write_text("<svg></svg>")
    assert f"links to {name}, which has changed" in checked(journal)[1]
    figure.unlink()
    assert f"links to {name}, which is no longer at {name}" in checked(journal)[1]


def test_a_changed_past_is_named(journal):
    for title in ("One", "Two", "Three"):
        write(journal, title)
    whole = journal.read_text()
    head, (three, two, one), _ = parse(whole, journal)
    assert [e.number for e in (three, two, one)] == [3, 2, 1] and (one.after, two.after) == (FIRST, one.seal)

    def without(entry):
        start = whole.index(entry.text)
        return whole[:start] + whole[whole.index("-->", start) + 3 :]

    forged = two.text.replace("fell", "rose")
    tampered = {
        "a word": (whole.replace(two.text, forged), "entry 2 (2. Two"),
        "a word, sealed anew": (
            whole.replace(two.text, forged).replace(f"sha256 {two.seal}", f"sha256 {sealed(forged, two.after)}"),
            "entry 3 was written after another entry 2",
        ),
        "taken out": (without(two), "entry 3 stands where entry 2 should"),
        "the oldest taken out": (without(one), "entry 2 stands where entry 1 should"),
        "put between": (whole.replace(two.text, "\nIn passing.\n" + two.text), "entry 2 ("),
        "after the oldest": (whole + "\nLater.\n", "text after the oldest"),
        "in another order": (
            head + "".join(whole.split(MARK)[1].split("-->\n")[i] + "-->\n" for i in (1, 0, 2)),
            "stands where",
        ),
    }
    for how, (text, word) in tampered.items():
        assert text != whole, how
        journal.write_text(text)
        code, said = checked(journal)
        assert code == 1 and word in said and "not as written" in said, (how, said)
        with pytest.raises(UserError, match="Restore it: corrections go into a new entry"):
            write(journal, "Four")
        assert journal.read_text() == text
    journal.write_text(whole.replace("Newest first.", "Our own words above."))  # the head belongs to nobody
    assert checked(journal)[0] == 0 and write(journal, "Four") == 4 and "Our own words" in journal.read_text()


def test_files_that_are_no_journal(journal):
    with pytest.raises(UserError, match="no journal at"):
        checked(journal)
    journal.write_text("# Research journal\n\nwritten by hand\n")
    for use in (lambda: write(journal), lambda: checked(journal)):
        with pytest.raises(UserError, match="no journal that vgrout began"):
            use()
    journal.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="cannot read"):
        write(journal)
    with pytest.raises(UserError, match="cannot write"):
        write(journal.parent / "nowhere" / "J.md")
    assert not faults(f"{MARK}\n", journal)


@pytest.fixture
def answers(monkeypatch):
    """A terminal that gives these answers, then ends. What it was asked."""
    asked = []

    def ready(*lines):
        left = iter(lines)

        def answer(question):
            asked.append(question)
            try:
                return next(left)
            except StopIteration:
                raise EOFError from None

        monkeypatch.setattr(sys, "stdin", type("Terminal", (), {"isatty": lambda self: True})())
        monkeypatch.setattr(builtins, "input", answer)
        return asked

    return ready


def talk(journal, title="", finding="", hypotheses=(), runs=(), figures=()):
    return add_entry(journal, Console(file=open("/dev/null", "w")), title, finding, hypotheses, runs, figures)


def test_a_terminal_is_asked_for_what_is_missing(journal, answers, capsys):
    asked = answers("A title", "", "A finding", "one", "", "two", "ONE", "three", "four", "", "nowhere", "", "")
    assert talk(journal) == 0
    text = journal.read_text()
    assert "## 1. A title (" in text and "1. one\n2. two\n3. three\n4. four\n" in text and "**Runs**" not in text
    assert asked[-1].startswith("figure 1 (empty") and "hypothesis 4 (empty: no more): " in asked
    out = capsys.readouterr().out
    assert "a finding says nothing" in out and "given already" in out and "nowhere: no such folder" in out


def test_a_terminal_is_asked_for_nothing_else(journal, answers):
    asked = answers("three")
    with pytest.raises(UserError, match="nothing was written"):
        talk(journal, "T", "F", ("one", "two"))
    assert [q.split(" (")[0] for q in asked] == ["hypothesis 3: ", "hypothesis 4"] and not journal.exists()
    assert talk(journal, "T", "F", THREE) == 0 and len(asked) == 2  # all was given


def test_what_was_given_is_looked_at_before_anybody_types(journal, answers):
    asked = answers("never")
    with pytest.raises(UserError, match="nowhere"):
        talk(journal, runs=[Path("nowhere")])
    assert not asked


def test_the_command_line(journal, monkeypatch, capsys):
    def vgrout(*args):
        monkeypatch.setattr(sys, "argv", ["vgrout", "journal", *args])
        with pytest.raises(SystemExit) as left:
            cli.main()
        return left.value.code or 0, *capsys.readouterr()

    code, out, err = vgrout("add", "--title", "T", "--hypotheses", *THREE)
    assert code == 2 and err == "vgrout: --finding: missing\n" and not journal.exists()
    code, out, err = vgrout("add", "--title", "T", "--finding", "F", "--hypotheses", "a", "b")
    assert code == 2 and "2 hypotheses" in err and err.count("\n") == 1
    code, out, err = vgrout("add", "--title", "T", "--finding", "F", "--hypotheses", *THREE)
    assert code == 0 and "entry 1 in RESEARCH_JOURNAL.md" in out
    assert vgrout("check")[:2] == (0, "1 entry, as written\n")
    journal.write_text(journal.read_text().replace("absorption", "adsorption"))
    code, out, err = vgrout("check")
    assert code == 1 and "entry 1 (1. T" in out
