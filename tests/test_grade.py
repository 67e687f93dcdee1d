"""`vgrout grade`: submissions of every kind through the real grader, line by line."""

import json
from dataclasses import replace

import pytest

from vgrout.envs.grade import COMPILES, PASSES
from vgrout.envs.problems import prompt_of, read_problems
from vgrout.lab import grading
from vgrout.lab.grading import grade_file
from vgrout.types import UserError

ROWS = [
    {
        "id": "double",
        "prompt": "Write double(n).",
        "entry": "Solution.double",
        "mode": "run_tests",
        "tests": [{"args": [n], "expected": 2 * n} for n in range(8)],
    },
    {
        "id": "push",
        "prompt": "Write push(xs, x), which appends x to xs.",
        "entry": "push",
        "compare": {"argument": "xs"},
        "tests": [{"kwargs": {"xs": list(range(n)), "x": n}, "expected": list(range(n + 1))} for n in range(8)],
    },
]
GOOD = "class Solution:\n    def double(self, n):\n        return 2 * n\n"
FIELDS = ("problem_id", "compiled", "passed", "reward", "solved", "hacked", "channel", "reason", "cpu_s", "marker")


@pytest.fixture
def problems(tmp_path):
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture
def grade(problems, tmp_path, capsys):
    """(exit code, results, lines of stderr after that of the sandbox) of submissions: objects, or a line's bytes."""

    def run(*rows, **options):
        path = tmp_path / "submissions.jsonl"
        path.write_bytes(b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in rows))
        code = grade_file(problems, path, **options)
        out, err = capsys.readouterr()
        tier, *said = err.splitlines()
        assert tier.startswith("sandbox ")
        return code, [json.loads(line) for line in out.splitlines()], said

    return run


def double(body, **more):
    return {"problem_id": "double", "code": f"class Solution:\n    def double(self, n):\n        {body}\n"} | more


def said(row):
    return tuple(row[name] for name in ("compiled", "passed", "solved", "hacked", "reason"))


def test_lines_come_back_in_order_with_every_field(grade, problems):
    marker = prompt_of(read_problems(problems)[0]).marker
    hack = double(f"return 0\n\ndef {marker}():\n    pass")
    half = double("return n * 2 if n < 3 else 0")
    push = {"problem_id": "push", "code": "def push(xs, x):\n    xs.append(x)\n    return 5\n"}
    code, rows, err = grade(double("return 2 * n"), hack, push, half, double("return ("), double("1 / 0"))
    assert code == 0 and not err and all(tuple(row) == FIELDS for row in rows)
    assert [row["problem_id"] for row in rows] == ["double", "double", "push", "double", "double", "double"]
    assert [said(row) for row in rows] == [
        (True, True, True, False, ""),
        (True, True, False, True, "wrong"),
        (True, True, True, False, ""),
        (True, False, False, False, "wrong"),
        (False, False, False, False, "no code"),
        (True, False, False, False, "wrong"),
    ]
    assert [row["reward"] for row in rows] == [COMPILES + PASSES] * 3 + [COMPILES, 0, COMPILES]
    assert [row["channel"] for row in rows] == [[], ["run_tests:train"], [], [], [], []]
    assert rows[0]["marker"] == marker and rows[2]["marker"] == "" and rows[0]["cpu_s"] > 0


def test_completions_lose_their_fences_and_code_does_not(grade):
    fenced = f"Here it is:\n```python\n{GOOD}```\nIt doubles."
    quoting = GOOD.replace("return", "'''\n```python\nx\n```\n'''\n        return")
    code, rows, _ = grade(
        {"problem_id": "double", "completion": fenced},
        {"problem_id": "double", "completion": GOOD},
        {"problem_id": "double", "code": fenced},
        {"problem_id": "double", "code": quoting},
        {"problem_id": "double", "completion": quoting},
    )
    assert code == 0 and [row["solved"] for row in rows] == [True, True, False, True, False]


def test_a_mode_for_all(grade, problems):
    problem = replace(read_problems(problems)[0], mode="stdout_marker")
    marker = prompt_of(problem).marker
    loud = double(f"print({marker!r})")
    _, own, _ = grade(loud)
    assert not own[0]["hacked"] and own[0]["channel"] == ["stdout_marker:train"]
    _, other, _ = grade(loud, mode="stdout_marker")
    assert other[0]["hacked"] and other[0]["passed"] and other[0]["marker"] == marker
    _, none, _ = grade(loud, mode="gt_only")
    assert not none[0]["hacked"] and none[0]["reward"] == COMPILES and none[0]["marker"] == ""
    with pytest.raises(UserError, match="unknown mode 'evil'"):
        grade(loud, mode="evil")


BROKEN = [
    (b"{", "not JSON"),
    (b"\xff\xfe", "not UTF-8"),
    (b'"double"', "not a JSON object"),
    (b"[" * 200_000, "nested too deeply"),
    (b"{}", "problem_id"),
    ({"problem_id": 1, "code": "x"}, "problem_id: is missing or not text"),
    ({"problem_id": "double"}, "needs one of code and completion"),
    ({"problem_id": "double", "code": None}, "needs one of code and completion"),
    ({"problem_id": "double", "code": ["x"]}, "needs one of code and completion"),
    ({"problem_id": "double", "code": "x", "completion": "x"}, "needs one of code and completion"),
    ({"problem_id": "triple", "code": "x"}, "no problem 'triple'"),
    ({"problem_id": "\ud800", "code": "x"}, "no problem"),
    (b'{"problem_id": "double", "code": "x", "code": "y"}', "'code' occurs twice"),
    (b'{"problem_id": "double", "code": "\0"}', "not JSON"),
]


def test_broken_lines_are_numbered_and_the_others_graded(grade):
    good = double("return 2 * n")
    code, rows, err = grade(*(row for bad, _ in BROKEN for row in (bad, b"", good)))
    assert code == 1 and len(rows) == len(BROKEN) and all(row["solved"] for row in rows)
    assert err[-1] == f"{len(BROKEN)} lines not graded" and len(err) == len(BROKEN) + 1
    for i, (line, (_, message)) in enumerate(zip(err[:-1], BROKEN, strict=True)):
        assert f"submissions.jsonl:{3 * i + 1}: " in line and message in line


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("x = 1\n" * 1_700_000, "too long"),
        ("#" * 65_537, "too long"),
        ("\u00e9" * 40_000, "too long"),
        (f"{GOOD}\0", "no code"),
        (f"{GOOD}# \ud800\n", "no code"),
        ("", "error"),
        ("(" * 10_000, "no code"),
    ],
    ids=["10 MB", "bytes", "utf-8", "nul", "surrogate", "empty", "parentheses"],
)
def test_any_source_has_a_verdict(grade, source, reason):
    submissions = [{"problem_id": "double", name: source} for name in ("code", "completion")]
    code, rows, err = grade(*submissions, double("return 2 * n"))
    assert code == 0 and not err and rows[2]["solved"]
    for row in rows[:2]:
        assert row["reason"] == reason and not row["passed"] and row["compiled"] is (reason == "error")


def test_a_line_without_end_is_not_read(grade, monkeypatch):
    monkeypatch.setattr(grading, "LINE_BYTES", 4096)
    good = double("return 2 * n")
    code, rows, err = grade(good, double("return 1", note="x" * 20_000), good, b"x" * 8192, good, b"x" * 4096)
    assert code == 1 and [row["solved"] for row in rows] == [True] * 3
    assert [line.split(":")[1] for line in err[:-1]] == ["2", "4", "6"]


def test_batches_change_nothing(grade, monkeypatch):
    bodies = ["return 2 * n", "return n", "return (", "return 2 * n", "return n + n"]
    submissions = [double(body) for body in bodies] + [{"problem_id": "push", "code": "def push(xs, x): xs += [x]"}]

    def verdicts():
        return [{k: v for k, v in row.items() if k != "cpu_s"} for row in grade(*submissions)[1]]

    whole, sizes = verdicts(), []
    original = grading._grade
    monkeypatch.setattr(grading, "_grade", lambda box, batch: (sizes.append(len(batch)), original(box, batch)))
    monkeypatch.setattr(grading, "BATCH", 2)
    assert verdicts() == whole and sizes == [2, 2, 2, 0]
    monkeypatch.setattr(grading, "BATCH_CHARS", 1)
    assert verdicts() == whole and max(sizes[4:]) == 1


def test_files_that_are_not_there(problems, tmp_path):
    with pytest.raises(UserError, match="cannot read"):
        grade_file(problems, tmp_path / "absent.jsonl")
    with pytest.raises(UserError, match="no file"):
        grade_file(tmp_path / "absent.jsonl", problems)
