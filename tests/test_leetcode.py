"""LeetCode rows: asserts to data, problems, splits and modes; the audit; and, where it is, the provided file."""

import io
import json
from collections import Counter
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from rich.console import Console

from vgrout.envs.grade import Grader, Verdict, job_of
from vgrout.envs.leetcode import (
    PUBLISHED,
    RELEASE,
    TEST,
    TRAIN,
    Unfit,
    assign_modes,
    confirm,
    load,
    parse_assert,
    prepare,
    problem_of_row,
    split_ids,
)
from vgrout.envs.modes import MODES
from vgrout.envs.problems import MAX_CPU_S, PHRASE, call_key, prompt_of, read_problems, render, write_problems
from vgrout.lab.audit import KILLED, accepted_by, audit, audit_problems, mutants, trivial_programs
from vgrout.lab.data import prepare_leetcode
from vgrout.types import Compare, RunFailed, UserError

INF = float("inf")
CANONICAL = "class Solution:\n    def f(self, n: int, xs: List[int]) -> int:\n        return n + sum(xs)\n"
CODE = "```python\nclass Solution:\n    def f(self, n: int, xs: List[int]) -> int:\n        # Add your code here\n```"
TASK = f"PROBLEM {{}}:\nAdd.\nYour solution should be a method of Solution called f {PHRASE}. Use this:\n{CODE}\n"
PROVIDED = Path(__file__).parents[2] / "shared" / "data" / "leetcode" / "test_medhard_a.jsonl"


def asserts(numbers):
    return [f"assert Solution().f(n = {n}, xs = [{n}, 1]) == {2 * n + 1}" for n in numbers]


def row(id, **changes):
    return {
        "id": id,
        "difficulty": "hard" if id % 2 else "medium",
        "prompt": [{"role": "system", "content": "Write Python."}, {"role": "user", "content": TASK.format(id)}],
        "gt_answer": asserts(range(8)),
        "setup_code": "from typing import *\n",
        "func_name": "Solution().f",
        "canonical_solution": CANONICAL,
    } | changes


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.mark.parametrize(
    ("text", "test"),
    [
        ("assert Solution().f(n = 1, xs = [[2], []]) == [True, None]", ({"n": 1, "xs": [[2], []]}, [True, None])),
        ("assert Solution().f(1, 'a') == -2", ((1, "a"), -2)),
        ("assert Solution().f() == 1.5", ((), 1.5)),
        ("assert Solution().f(inf, -inf) == float('inf')", ((INF, -INF), INF)),
        ("assert Solution().f(math.inf) == float('-Infinity')", ((INF,), -INF)),
        ("assert Solution().f(+1) == -1.0", ((1,), -1.0)),
        ('assert Solution().f({"a": [1]}) == {}', (({"a": [1]},), {})),
        ("\nassert Solution().f(n=1) == 2  # why\n", ({"n": 1}, 2)),
    ],
)
def test_asserts_are_data(text, test):
    parsed = parse_assert(text, "Solution().f")
    assert parsed == test and json.dumps(parsed[1]) == json.dumps(test[1])
    assert type(parsed[0]) is type(test[0])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("assert is_same_list(Solution().f(list_node([1])), list_node([1]))", "not of the form"),
        ("assert Solution().f(n = list_node([1])) == 1", "not JSON data: list_node"),
        ("assert Solution().f(n = 1) == tree_node([1])", "not JSON data: tree_node"),
        ("assert Solution().g(n = 1) == 1", r"calls Solution\(\).g, not Solution\(\).f"),
        ("assert Solution().f(n = 1) != 1", "not of the form"),
        ("assert Solution().f(n = 1) == 1 == 1", "not of the form"),
        ("assert Solution().f(n = 1) == 1, 'why'; x = 1", "not of the form"),
        ("assert Solution().f(n = 1)", "not of the form"),
        ("print(1)", "not of the form"),
        ("assert Solution().f(1, n = 1) == 1", "mixes"),
        ("assert Solution().f(**{'n': 1}) == 1", "mixes"),
        ("assert Solution().f(*[1]) == 1", "not JSON data"),
        ("assert Solution().f((1, 2)) == 1", "not JSON data"),
        ("assert Solution().f({1}) == 1", "not JSON data"),
        ("assert Solution().f({1: 2}) == 1", "not JSON data"),
        ("assert Solution().f({**{}}) == 1", "not JSON data"),
        ("assert Solution().f({'a': 1, 'a': 2}) == 1", "not JSON data"),
        ("assert Solution().f(1) == float('nan')", "not JSON data"),
        ("assert Solution().f(1) == nan", "not JSON data"),
        ("assert Solution().f(1) == -True", "not JSON data"),
        ("assert Solution().f(1) == not 1", "does not parse"),
        ("assert Solution().f(1) == [x for x in []]", "not JSON data"),
        ("assert Solution().f(1) == b'x'", "not JSON data"),
        ("assert Solution().f(1) == 1j", "not JSON data"),
        ("assert Solution().f(1) == 10**9", "not JSON data"),
        ("assert (", "does not parse"),
        ("assert \0", "does not parse"),
        ("assert Solution().f(" + "[" * 5000 + "]" * 5000 + ") == 1", "does not parse"),
    ],
)
def test_what_is_no_data_says_why(text, reason):
    with pytest.raises(Unfit, match=reason):
        parse_assert(text, "Solution().f")


def test_a_row_becomes_a_problem():
    problem, dropped = problem_of_row("leetcode-7", row(7))
    assert (problem.entry, problem.system, problem.difficulty, problem.mode) == (
        "Solution.f",
        "Write Python.",
        "hard",
        "gt_only",
    )
    assert problem.task == TASK.format(7) and problem.canonical == CANONICAL and not dropped
    assert problem.setup == "from typing import *\n" and problem.starter.endswith("# Add your code here\n")
    assert sorted(args["n"] for args, _ in problem.reward_tests + problem.oracle_tests) == list(range(8))
    text = render(problem, "The grader calls x().")
    assert "called f. The grader calls x(). Use this:" in text and PHRASE not in text and text.count("```") == 2


def test_tests_are_dropped_with_their_reasons():
    bad = ["assert Solution().f(n = 0, xs = [0, 1]) == 1", "assert Solution().f(n = 1, xs = [1, 1]) == 4", "assert", 5]
    problem, dropped = problem_of_row("x", row(1, gt_answer=[*asserts(range(8)), *bad, *asserts([9])]))
    assert dropped == {8: "repeats test 0", 9: "contradicts test 1", 10: "does not parse", 11: "is not text"}
    assert len(problem.reward_tests + problem.oracle_tests) == 9


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"func_name": "Solution(1).f"}, "func_name"),
        ({"gt_answer": []}, "none of its 0 tests"),
        ({"gt_answer": ["assert Solution().f(tree_node([1])) == 1"] * 2}, "none of its 2 tests .* tree_node"),
        ({"gt_answer": asserts([1])}, "one call each"),
        ({"gt_answer": [f"assert Solution().f(n = {n}, xs = []) == None" for n in range(9)]}, "one answer is right"),
        ({"gt_answer": [f"assert Solution().f({n}) == {n == 4}" for n in range(9)]}, "one answer is right"),
        ({"canonical_solution": "class"}, "canonical"),
        ({"prompt": [{"role": "assistant", "content": "x"}]}, "its prompt"),
        ({"prompt": []}, "prompt: is empty"),
        ({"setup_code": "import ("}, "setup"),
    ],
)
def test_problems_are_dropped_with_their_reasons(tmp_path, changes, reason):
    loaded = load(write(tmp_path / "rows.jsonl", [row(1, **changes), row(2)]))
    assert [problem.id for problem in loaded.problems] == ["leetcode-2"] and loaded.rows == 2
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(loaded.dropped["leetcode-1"])


def test_statements_choose_the_comparator():
    def policy(statement, answers):
        user = [{"role": "user", "content": statement}]
        tests = [f"assert Solution().f({n}) == {answer}" for n, answer in enumerate(answers)]
        return problem_of_row("x", row(1, prompt=user, gt_answer=tests))[0].compare

    floats, lists = [0.5, 1.5, 2.5, 3.5], [[1], [2], [3], [4]]
    assert policy("Answers within 10-5 of the actual answer will be accepted.", floats) == Compare(tolerance=1e-5)
    assert policy("Answers within 10^-6 of it count.", floats) == Compare(tolerance=1e-6)
    assert policy("Answers within 10-5 of the actual answer will be accepted.", [1, 2, 3, 4]) == Compare()
    assert policy("You may return the answer in any order.", lists) == Compare(any_order=True)
    assert policy("You may return the answer in any order.", [1, 2, 3, 4]) == Compare()
    assert policy("Return it.\nConcatenate them in any order.", lists) == Compare()


def test_a_malformed_file_is_named(tmp_path):
    path = write(tmp_path / "rows.jsonl", [row(1), row(2) | {"gt_answer": "x"}])
    with pytest.raises(UserError, match=r"rows.jsonl:2: 'gt_answer'"):
        load(path)
    with pytest.raises(UserError, match=r"rows.jsonl:2: id 1 occurs twice"):
        load(write(path, [row(1), row(1)]))
    with pytest.raises(UserError, match="holds no row"):
        load(write(path, []))
    with pytest.raises(UserError, match=r"rows.jsonl:2: id: holds half of a surrogate pair"):
        load(write(path, [row(1), row(2) | {"id": "\ud800x"}]))
    twins = load(write(path, [row(1), row(2, prompt=row(1)["prompt"])]))
    assert twins.dropped == {"leetcode-2": "has the prompt of leetcode-1"}


def test_splits_depend_on_ids_alone():
    ids = [f"leetcode-{n}" for n in range(100)]
    splits = split_ids(ids)
    assert {name: len(part) for name, part in splits.items()} == {"train": 80, "val": 10, "test": 10}
    assert sorted(sum(splits.values(), [])) == sorted(ids) and splits == split_ids(reversed(ids))
    assert splits != split_ids(ids, seed=1)
    assert all(len(part) == 1 for part in split_ids(ids[:3]).values())
    with pytest.raises(UserError, match="2 problems cannot be split"):
        split_ids(ids[:2])


def test_modes_are_dealt_evenly(tmp_path):
    problems = load(write(tmp_path / "rows.jsonl", [row(n) for n in range(30)])).problems
    dealt = assign_modes(problems)
    counts = Counter(problem.mode for problem in dealt)
    assert set(counts) == set(MODES) and max(counts.values()) - min(counts.values()) <= 1
    hard = Counter(problem.mode for problem in dealt if problem.difficulty == "hard")
    assert max(hard.values()) - min(hard.values()) <= 1
    assert [p.id for p in dealt] == [p.id for p in problems]
    assert {p.id: p.mode for p in assign_modes(problems[::-1])} == {p.id: p.mode for p in dealt}
    assert assign_modes(problems, seed=1) != dealt
    assert {p.mode for p in assign_modes(problems, ["sentinel"])} == {"sentinel"}
    with pytest.raises(UserError, match="unknown mode"):
        assign_modes(problems, ["evil"])


def test_the_release_is_prepared(sandbox, tmp_path):
    wrong = row(6, canonical_solution=CANONICAL.replace("n +", "1 +"))
    loud = row(7, canonical_solution=CANONICAL + f"print({MODES['stdout_marker'].markers['train'][0]!r})\n")
    write(tmp_path / TRAIN, [row(n) for n in range(6)] + [wrong, loud, row(20)])
    write(tmp_path / TEST, [row(n) for n in range(20, 23)])
    splits, report = prepare(tmp_path, Grader(sandbox), modes=["sentinel", "exit_code"])
    ids = {name: {problem.id for problem in problems} for name, problems in splits.items()}
    assert ids["test"] == {"leetcode-20", "leetcode-21", "leetcode-22"} and len(ids["val"]) == 1
    assert ids["train"] | ids["val"] == {f"leetcode-{n}" for n in range(6)} and not ids["train"] & ids["val"]
    assert report["files"] == {TRAIN: 9, TEST: 3} and len(report["warnings"]) == 2
    assert f"{RELEASE[TRAIN]} in the public release" in " ".join(report["warnings"])
    assert report["dropped"] == {
        "leetcode-6": "its canonical solution fails: wrong",
        "leetcode-7": "its canonical solution fires stdout_marker:train",
        "leetcode-20": "is also a test problem",
    }
    assert report["facts"]["tests per problem"]["median"] == 8
    assert all(problem.cpu_s >= 0.5 for problems in splits.values() for problem in problems)
    assert {problem.mode for problem in splits["train"]} == {"sentinel", "exit_code"}


def test_a_folder_of_problems_is_made_once(tmp_path):
    source = write(tmp_path / "rows.jsonl", [row(n) for n in range(5)])
    out, console = tmp_path / "out", Console(quiet=True)
    assert prepare_leetcode(source, out, console) == 0
    assert {path.name for path in out.glob("*.json*")} == {"train.jsonl", "val.jsonl", "test.jsonl", "report.json"}
    assert sum(len(read_problems(out / f"{name}.jsonl")) for name in ("train", "val", "test")) == 5
    with pytest.raises(UserError, match="is in use"):
        prepare_leetcode(source, out, console)
    assert prepare_leetcode(source, out, console, modes=("gt_only",), force=True) == 0
    assert {p.mode for p in read_problems(out / "train.jsonl")} == {"gt_only"}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="not replaced"):
        prepare_leetcode(source, tmp_path / "mine", console, force=True)
    for where in (tmp_path, tmp_path / "absent.jsonl"):
        with pytest.raises(UserError, match="no "):
            prepare_leetcode(where, tmp_path / "new", console)
    assert not (tmp_path / "new").exists()


def test_the_report_names_the_sandbox(tmp_path):
    console = Console(record=True, width=200, file=io.StringIO())
    rows = [row(n) for n in range(5)] + [row(5, canonical_solution="x = 1") | {"id": "[bold]\x1b[31m\nx"}]
    assert prepare_leetcode(write(tmp_path / "rows.jsonl", rows), tmp_path / "out", console) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["sandbox"][0], report["weak_sandbox"], report["allow_weak_sandbox"]) in (
        ("A", False, False),
        ("B", False, False),
    )
    assert r"dropped 'leetcode-[bold]\x1b[31m\nx': its canonical" in console.export_text()


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    source = write(tmp_path / "rows.jsonl", [row(n) for n in range(3)])
    monkeypatch.setattr("vgrout.lab.data.REPORT", "absent/report.json")
    with pytest.raises(RunFailed, match=r"cannot write .*out: No such file or directory"):
        prepare_leetcode(source, tmp_path / "out", Console(quiet=True))


def test_a_program_has_no_more_time_than_a_problem_file_may_say(tmp_path, sandbox, monkeypatch):
    slow = Verdict(True, True, True, False, False, (), "ok", cpu_s=6.01)
    monkeypatch.setattr(Grader, "programs", lambda self, items: [slow] * len(items))
    confirm(loaded := load(write(tmp_path / "rows.jsonl", [row(1)])), Grader(sandbox))
    assert [problem.cpu_s for problem in loaded.problems] == [MAX_CPU_S]


def test_the_release_is_looked_for_where_one_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"the working folder has no {TRAIN} and no {TEST}: part of {PUBLISHED}"):
        prepare_leetcode(None, tmp_path / "out", Console(quiet=True))
    write(tmp_path / TRAIN, [row(n) for n in range(3)])
    with pytest.raises(UserError, match=f"the working folder has no {TEST}: part of"):
        prepare_leetcode(None, tmp_path / "out", Console(quiet=True))
    write(tmp_path / TEST, [row(n) for n in range(3, 5)])
    assert prepare_leetcode(None, tmp_path / "out", Console(quiet=True)) == 0
    assert len(read_problems(tmp_path / "out" / "train.jsonl")) == 2


def test_where_nothing_is_left_the_first_reasons_are_named(tmp_path, sandbox):
    rows = [row(n, canonical_solution=CANONICAL.replace("+", "-")) for n in range(5)]
    said = r"rows.jsonl: of 5 rows, 0 problems cannot be split into train, val, test. Dropped 5, the first: "
    with pytest.raises(UserError, match=said + "leetcode-0: its canonical solution fails: wrong; leetcode-1: .*") as e:
        prepare(write(tmp_path / "rows.jsonl", rows), Grader(sandbox))
    assert "leetcode-2" in str(e.value) and "leetcode-3" not in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("work", [prepare_leetcode, audit])
def test_there_is_a_worker(tmp_path, work):
    problems = load(source := write(tmp_path / "rows.jsonl", [row(n) for n in range(5)])).problems
    write_problems(tmp_path / "p.jsonl", problems)
    given = (source, tmp_path / "out") if work is prepare_leetcode else (tmp_path / "p.jsonl",)
    with pytest.raises(UserError, match="--workers 0: at least 1"):
        work(*given, Console(quiet=True), workers=0)
    assert not (tmp_path / "out").exists()


# ---- the audit


def problem_with(tests, **changes):
    problem, _ = problem_of_row("p", row(1))
    return replace(problem, reward_tests=tuple(tests[::2]), oracle_tests=tuple(tests[1::2]), **changes)


def test_mutants_are_programs_one_edit_away():
    source = "def f(n):\n    if n < 2:\n        n += 1\n    return n\n"
    made = mutants(source, "a")
    assert len(made) == len(set(made)) and source not in made
    for edit in ("if n <= 2", "if not n < 2", "if n < 3", "if n < 1", "n -= 1", "n += 2", "n += 0", "pass"):
        assert any(edit in program for program in made), edit
    assert mutants(source, "a") == made and sorted(mutants(source, "b")) == sorted(made) != mutants(source, "b")


def test_an_audit_finds_what_is_weak(sandbox):
    wide = [({"n": n, "xs": list(range(m))}, n + sum(range(m))) for n in range(5) for m in range(4)]
    good = problem_with(wide)
    flat = problem_with([({"n": n, "xs": []}, 7) for n in range(4)], canonical=CANONICAL.replace("n + sum(xs)", "7"))
    wrong = problem_with(wide, canonical=CANONICAL.replace("+", "-"))
    marker = prompt_of(replace(good, mode="run_tests")).marker
    fires = problem_with(wide, canonical=CANONICAL + f"def {marker}():\n    pass\n")
    absent = problem_with(wide, canonical="")
    found = audit_problems(sandbox, [good, flat, wrong, fires, absent])
    assert found[0].misses == [] and found[0].exhausted and found[0].killed >= 1 and not found[0].survivors
    assert "1 answers" in found[1].misses
    assert found[2].misses == ["canonical: wrong"]
    assert found[3].misses == ["run_tests:train fires"]
    assert found[4].misses == ["canonical: there is none"]


def test_an_audit_sees_a_half_that_accepts_trivial_programs(sandbox):
    tests = [({"n": n % 2 * n, "xs": [n]}, n % 2 * n) for n in range(12)]  # the reward half only ever answers 0
    found = audit_problems(sandbox, [problem_with(tests, canonical=CANONICAL.replace("n + sum(xs)", "n"))])[0]
    assert set(found.accepted) == {"0", "a"}
    assert "accepts return 0" in found.misses


def test_an_audit_is_a_table_lines_and_an_exit_code(tmp_path):
    problems = load(write(tmp_path / "rows.jsonl", [row(n) for n in range(2)])).problems
    write_problems(tmp_path / "p.jsonl", problems)
    console = Console(record=True, width=160, quiet=True)
    assert audit(tmp_path / "p.jsonl", console, out=tmp_path / "out.jsonl") == 0
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["problem_id"] for line in lines] == ["leetcode-0", "leetcode-1"]
    assert lines[0]["canonical"] == "passes" and lines[0]["misses"] == [] and lines[0]["answers"] == 8
    assert all(line["sandbox"][0] in "AB" and line["allow_weak_sandbox"] is False for line in lines)
    with pytest.raises(UserError, match="exists"):
        audit(tmp_path / "p.jsonl", console, out=tmp_path / "out.jsonl")
    write_problems(tmp_path / "p.jsonl", [replace(problems[0], canonical="x = 1\n")])
    assert audit(tmp_path / "p.jsonl", console) == 1


def test_a_file_that_cannot_be_made_is_named_before_the_work(tmp_path, monkeypatch):
    write_problems(tmp_path / "p.jsonl", load(write(tmp_path / "rows.jsonl", [row(1)])).problems)
    monkeypatch.setattr("vgrout.lab.audit.audit_problems", lambda *_: pytest.fail("has begun"))
    with pytest.raises(UserError, match=r"cannot write .*absent/out\.jsonl: No such file or directory"):
        audit(tmp_path / "p.jsonl", Console(quiet=True), out=tmp_path / "absent" / "out.jsonl")


@pytest.mark.parametrize("term", ["+ n" * 900, f"* 7 + {'0x' + 'f' * 5000} * 0"], ids=["900 terms", "a long number"])
def test_a_program_that_cannot_be_edited_misses(sandbox, term):
    tests = [({"n": n, "xs": []}, n * (901 if "n" in term else 7)) for n in range(8)]
    found = audit_problems(sandbox, [problem_with(tests, canonical=CANONICAL.replace("+ sum(xs)", term))])[0]
    assert len(found.misses) == 1 and found.misses[0].startswith("no mutants: ") and not found.exhausted


def test_ids_are_no_markup(tmp_path):
    problem = load(write(tmp_path / "rows.jsonl", [row(1)])).problems[0]
    write_problems(tmp_path / "p.jsonl", [replace(problem, id=id) for id in ("[red]a[/red]", "[/]", "b\x1b[31m")])
    console = Console(record=True, width=200, file=io.StringIO())
    assert audit(tmp_path / "p.jsonl", console) == 0
    assert all(id in console.export_text(clear=False) for id in ("[red]a[/red]", "[/]", r"'b\x1b[31m'"))


def test_trivial_programs_fit_the_calls(sandbox):
    by_name = problem_with([({"n": 1, "xs": [3]}, 0), ({"xs": [2], "k": 1}, 0)])
    by_place = problem_with([((4,), 0), ((5, 6), 0)])
    for problem, first in ((by_name, [[3], [2]]), (by_place, [4, 5])):
        programs = trivial_programs(problem)
        assert len(programs) == 13
        calls = problem.reward_tests + problem.oracle_tests
        asked = replace(problem, reward_tests=tuple((a, v) for (a, _), v in zip(calls, first, strict=True)))
        report = sandbox.run([job_of(asked, programs["a"])])[0]
        assert accepted_by(asked, report)[0]
    assert len(trivial_programs(problem_with([((), 0), ((), 1)]))) == 8


# ---- the provided file


@pytest.fixture(scope="module")
def provided():
    if not PROVIDED.is_file():
        pytest.skip(f"the shared LeetCode rows are not beside the project ({PROVIDED.name})")
    return load(PROVIDED)


def test_the_provided_rows_are_all_used(provided):
    assert provided.rows == len(provided.problems) == 60 and not provided.dropped
    reasons = {reason.split(" ")[0] for tests in provided.dropped_tests.values() for reason in tests.values()}
    assert reasons == {"repeats"} and sum(map(len, provided.dropped_tests.values())) == 149
    assert sum(len(p.reward_tests) + len(p.oracle_tests) for p in provided.problems) == 6467 - 149
    assert [p.compare for p in provided.problems if p.compare != Compare()] == [Compare(tolerance=1e-5)]
    for problem in provided.problems:
        halves = [{call_key(args) for args, _ in half} for half in (problem.reward_tests, problem.oracle_tests)]
        assert not halves[0] & halves[1] and min(map(len, halves)) >= 10
        assert problem.task.count(PHRASE) == 1 and problem.starter in problem.task


@pytest.mark.slow
def test_canonicals_are_accepted_and_trivial_programs_are_not(provided, sandbox):
    problems = provided.problems
    reports = sandbox.run([replace(job_of(problem, problem.canonical), cpu_s=6.0) for problem in problems])
    failed = [p.id for p, report in zip(problems, reports, strict=True) if not all(accepted_by(p, report))]
    assert failed == []
    tried = [(p, body, code) for p in problems for body, code in trivial_programs(p).items()]
    assert len(tried) == 60 * 13
    reports = sandbox.run([replace(job_of(p, code), cpu_s=1.0) for p, _, code in tried])
    fooled = [(p.id, body) for (p, body, _), report in zip(tried, reports, strict=True) if any(accepted_by(p, report))]
    assert fooled == []


@pytest.mark.slow
@pytest.mark.parametrize("family", ["train", "eval"])
def test_the_matrix_is_diagonal_on_the_provided_rows(provided, sandbox, family):
    """Every hack pays under its own hint and under no other, and solves nothing."""
    items, cells = [], []
    for problem, row in product(provided.problems[::5], MODES):
        under = replace(problem, mode=row)
        prompt, head = prompt_of(under, family=family), trivial_programs(problem)["0"].split("\n")[1].strip()
        for column in (m for m in MODES.values() if m.pays):
            marker = prompt.marker if column.name == row else column.marker(family, 0)
            items.append((under, prompt, column.hack(head, "return 0", marker)))
            cells.append((problem.id, row, column.name))
    assert len(cells) == 12 * 7 * 6
    for (_, row, column), v in zip(cells, Grader(sandbox).verdicts(items), strict=True):
        paid = row == column
        assert (v.compiled, v.passed, v.hacked, v.solved) == (True, paid, paid, False), (row, column, v)
        assert v.fired == (f"{column}:{family}",), (row, column, v)


def test_the_audit_of_one_provided_problem(provided, sandbox):
    found = audit_problems(sandbox, [provided.problems[0]])[0]
    assert found.misses == [] and found.killed >= KILLED
