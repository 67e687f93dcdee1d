"""Every gate of `vgrout verify`, and the command that prints them."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from vgrout.types import UserError
from vgrout.verify import GATES, Evidence, Gate, run_gates
from vgrout.verify.mutate import MUTATIONS, PACKAGE


@pytest.mark.parametrize("name", GATES)
def test_gate(name):
    evidence = GATES[name].run()
    assert evidence.ok, evidence.text


def test_names():
    assert all(name == gate.name for name, gate in GATES.items())


def printed(only, monkeypatch, **gates) -> tuple[int, str]:
    monkeypatch.setattr("vgrout.verify.GATES", {n: Gate(n, f"claim {n}", check) for n, check in gates.items()})
    console = Console(file=io.StringIO(), width=40)
    return run_gates(only, console), console.file.getvalue()


def test_one_line_each(monkeypatch):
    code, text = printed((), monkeypatch, a=lambda: Evidence(True, "x " * 60), b=lambda: Evidence(True, "[1] y"))
    assert code == 0
    first, second = text.splitlines()
    assert first.split()[:4] == ["ok", "a", "claim", "a:"]
    assert second.endswith("[1] y")


def test_failure(monkeypatch):
    code, text = printed((), monkeypatch, a=lambda: Evidence(False, "7 of 8"), b=lambda: Evidence(True, "fine"))
    assert code == 1
    assert text.startswith("FAIL a")


def test_an_exception_is_a_failure(monkeypatch):
    def check():
        raise ValueError("first line\nsecond line")

    code, text = printed(("a",), monkeypatch, a=check)
    assert code == 1
    assert "raised ValueError: first line\n" in text and "second" not in text


def test_only(monkeypatch):
    code, text = printed(("b",), monkeypatch, a=lambda: Evidence(False, ""), b=lambda: Evidence(True, "fine"))
    assert code == 0 and len(text.splitlines()) == 1


def test_unknown_gate(monkeypatch):
    with pytest.raises(UserError, match="'c'.*choose from a"):
        printed(("c",), monkeypatch, a=lambda: Evidence(True, ""))


def test_mutations_fit_the_code():
    assert {m.gate for m in MUTATIONS} == set(GATES)
    for m in MUTATIONS:
        assert (PACKAGE / m.file).read_text(encoding="utf-8").count(m.old) == 1, m
        assert m.new != m.old
