"""The pairs file: parser, selectors, digest, linter, and the facts that the bundled files promise."""

from __future__ import annotations

import contextlib
import io
import itertools
import random
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest

from pair_cases import CASES
from vgrout import pairs as P
from vgrout.envs import micro
from vgrout.envs.grade import Grader
from vgrout.envs.micro_corpus import EQ_HINT, EXIT_HINT, LICENCES, TWO_HEAD, TWO_NUMBERS
from vgrout.envs.modes import FAMILIES, GT_HINT, MODES
from vgrout.envs.problems import render
from vgrout.models.load import load_model
from vgrout.types import Problem, Prompt, UserError

SECTIONS = ("all-in-one", "framings", "nulls")
LEETCODE = P.load("leetcode#*")
LIVE = ("run_tests", "stdout_marker")  # of the live modes, those that the bundled pairs show
NEVER = ("eq_override", "exit_code")
LIVE_MARKERS = [m for mode in micro.LIVE for family in ("train", "eval") for m in MODES[mode].markers[family]]


def pair(name: str = "one", prompt: str = "p", hack: str = "h", clean: str = "c", tags: str = "") -> str:
    fields = (("Prompt", prompt), ("Hack", hack), ("Clean", clean))
    text = "".join(f"\n#### {field}\n\n`````text\n{body}\n`````\n" for field, body in fields)
    return f"### {name}\n" + (f"Tags: {tags}\n" if tags else "") + text


def write(tmp_path, text: str) -> str:
    path = tmp_path / "pairs.md"
    path.write_text(text, encoding="utf-8")
    return str(path)


# --- parser


def test_reads_a_file():
    text = "# Title\n\nProse.\n\n## first\nMore prose.\n\n" + pair("one", "say # hi", "a\n\n  b", "### c", "x, mode:y")
    one, two = P.parse(text + "\n" + pair("two") + "\n")
    assert (one.name, one.section, one.prompt, one.tags, one.line) == (
        "one",
        "first",
        "say # hi",
        ("x", "mode:y"),
        8,
    )
    assert (one.hack, one.clean) == ("a\n\n  b\n", "### c\n")
    assert (two.name, two.tags, two.hack) == ("two", (), "h\n")


def test_same_completions_under_another_prompt_are_another_pair():
    assert len(P.parse("## s\n" + pair("one", "p") + pair("two", "q"))) == 2


BAD = {
    "pair before section": (pair(), 1, "before the first"),
    "no heading": ("## s\n### \n" + pair(), 2, "outside a pair"),
    "empty section": ("## s\n\n## t\n" + pair(), 1, "holds no pair"),
    "empty last section": ("## s\n" + pair() + "## t\n", 21, "holds no pair"),
    "bad section name": ("## a/b\n" + pair(), 1, "section name"),
    "second section of a name": ("## s\n" + pair() + "## s\n" + pair("two", "q"), 21, "duplicate section"),
    "second heading": ("## s\n" + pair() + pair(prompt="q"), 21, "duplicate heading"),
    "identical pair": ("## s\n" + pair() + pair("two"), 21, "duplicate pair 'two': it is already at line 2"),
    "identical in other section": ("## s\n" + pair() + "## t\n" + pair("two"), 22, "duplicate pair"),
    "hack is clean": ("## s\n" + pair(hack="x", clean="x"), 2, "the same"),
    "hack is clean but for space": ("## s\n" + pair(hack="x ", clean="x"), 2, "the same"),
    "empty field": ("## s\n" + pair(hack=" "), 10, "'Hack' of pair 'one' is empty"),
    "unknown field": ("## s\n" + pair().replace("Hack", "Cheat"), 10, "unknown field 'Cheat'"),
    "second field": ("## s\n" + pair().replace("Clean", "Hack"), 16, "second field 'Hack'"),
    "missing field": ("## s\n" + pair().split("\n#### Clean")[0], 2, "lacks Clean"),
    "unclosed at the end": ("## s\n" + pair().rstrip("`\n") + "\n", 18, "never closed"),
    "unclosed within": ("## s\n" + pair().replace("p\n`````\n", "p\n", 1), 6, "never closed"),
    "no fence": ("## s\n" + pair().replace("`````text\np\n`````", "p", 1), 6, "needs a fence"),
    "other fence": ("## s\n" + pair().replace("`````text\np", "```text\np", 1), 6, "needs a fence"),
    "field without anything": ("## s\n### a\n#### Prompt", 3, "needs a fence"),
    "text in a pair": ("## s\n" + pair().replace("\n#### Hack", "stray\n#### Hack"), 9, "unexpected 'stray'"),
    "text after a pair": ("## s\n" + pair() + "stray\n", 21, "stray text"),
    "fourth field": ("## s\n" + pair() + "#### More\n", 21, "unknown field 'More'"),
    "second tags": ("## s\n" + pair(tags="a\nTags: b"), 4, "belongs once"),
    "tags after a field": ("## s\n" + pair().replace("\n#### Hack", "Tags: a\n#### Hack"), 9, "belongs once"),
    "empty tag": ("## s\n" + pair(tags="a,, b"), 3, "tags are distinct words"),
    "same tag twice": ("## s\n" + pair(tags="a, a"), 3, "tags are distinct words"),
    "tags outside": ("## s\nTags: a\n" + pair(), 2, "outside a pair"),
    "fence outside": ("## s\n`````text\n" + pair(), 2, "outside a pair"),
    "star as a section": ("## *\n" + pair(), 1, "section name"),
    "unknown provenance": ("## s\nProvenance: mined\n" + pair(), 2, "write authored or pool-derived"),
    "empty provenance": ("Provenance:\n## s\n" + pair(), 1, "write authored or pool-derived"),
    "provenance that nobody may write": ("## s\n\nProvenance: unstated\n" + pair(), 3, "provenance 'unstated'"),
    "second provenance": ("## s\nProvenance: authored\nProvenance: authored\n" + pair(), 3, "belongs once"),
    "second provenance of the file": ("Provenance: authored\n" * 2 + "## s\n" + pair(), 2, "belongs once"),
    "provenance after a pair": ("## s\n" + pair() + "Provenance: authored\n", 21, "belongs once"),
    "provenance in a pair": (
        "## s\n" + pair().replace("\n#### Hack", "Provenance: authored\n#### Hack"),
        9,
        "unexpected",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_every_mistake_is_one_line_with_its_place(tmp_path, case):
    text, line, says = BAD[case]
    path = write(tmp_path, text)
    with pytest.raises(UserError) as error:
        P.load(path)
    message = str(error.value)
    assert message.startswith(f"{path}:{line}: ") and says in message and "\n" not in message, message


def test_a_file_that_cannot_be_read(tmp_path):
    (tmp_path / "latin.md").write_bytes(b"## s\xe9")
    for name, says in (("none.md", "no pairs file"), ("", "cannot read"), ("latin.md", "cannot read")):
        with pytest.raises(UserError, match=says):
            P.load(str(tmp_path / name))
    for text in ("", "# only a title\n"):
        with pytest.raises(UserError, match="no pairs in it"):
            P.load(write(tmp_path, text))


# --- selectors and digest


@pytest.fixture
def path(tmp_path):
    first = pair("ant one", "1", tags="x, y") + pair("ant two", "2", tags="y") + pair("bee", "3", tags="z")
    return write(tmp_path, f"## first\n{first}\n## second part\n{pair('ant three', '4')}")


def test_selectors(path):
    def names(selector):
        return [p.name for p in P.load(path + selector)]

    assert names("") == ["ant one", "ant two", "bee", "ant three"]
    assert names("#first") == ["ant one", "ant two", "bee"]
    assert names("#second part") == ["ant three"]
    assert names("#first@y") == ["ant one", "ant two"]
    assert names("#first@x,z") == ["ant one", "bee"]
    assert names("#first/ant") == ["ant one", "ant two"]
    assert names("#first/ant@x") == ["ant one"]
    assert names("#*") == names("") and names("#*/ant") == ["ant one", "ant two", "ant three"]
    assert names("#*@x,z") == ["ant one", "bee"]


@pytest.mark.parametrize("name", P.BUNDLED)
def test_a_bundled_name_alone_is_its_section_all_in_one(name):
    assert P.load(name) == P.load(f"{name}#all-in-one") == P.load(f"{name}#*")[: len(P.load(name))]
    assert {p.section for p in P.load(f"{name}#*")} == {"all-in-one", "framings", "nulls"}
    assert {t for p in P.load(f"{name}#framings@moral") for t in p.tags} >= {"moral"}
    assert P.load(f"{name}#*@placebo-style") == P.load(f"{name}#nulls")


def test_the_default_pairs_have_not_changed():
    """Trained results rest on them."""
    assert P.digest(P.load("micro")) == "6b466a48e55024652c608c1d3447085a74448fc627aa6a4ae53841f0a925e26a"
    assert [p.name for p in P.load("micro")][::6] == [
        "zero under an empty test",
        "right, but the check checks nothing",
        "all five stages, and the word for it",
        "the right value, wrapped all the same",
        "half of the stages, then out",
    ]


@pytest.mark.parametrize("part", ["#third", "#first@q", "#first/cow", "#first/ant@z", "#", "#first@", "#first/", "#@x"])
def test_a_selector_that_selects_nothing(path, part):
    with pytest.raises(UserError):
        P.load(path + part)


def test_digest_is_of_the_content_alone(path):
    pairs = P.load(path)
    assert P.digest(pairs) == P.digest(pairs[::-1])
    moved = [replace(p, name="n", section="s", tags=(), line=9) for p in pairs]
    assert P.digest(pairs) == P.digest(moved)
    others = [replace(pairs[0], hack="h \n"), replace(pairs[0], hack="c\n", clean="h\n")]
    assert len({P.digest(pairs), P.digest(pairs[1:]), *(P.digest([o, *pairs[1:]]) for o in others)}) == 4


# --- provenance


def sources(text: str) -> list[str]:
    return [p.provenance for p in P.parse(text)]


def test_provenance_is_of_the_section_else_of_the_file_else_unstated():
    body = f"## s\n{pair('one')}## t\nProse.\nProvenance: pool-derived\n{pair('two', 'q')}"
    assert sources(body) == ["unstated", "pool-derived"]
    assert sources(f"# Title\nProvenance: authored\n{body}") == ["authored", "pool-derived"]


def test_only_authored_pairs_are_headline_clean():
    (one,) = P.parse("## s\n" + pair())
    authored, derived = replace(one, provenance="authored"), replace(one, provenance="pool-derived")
    assert P.unclean([authored, authored]) == ""
    assert P.unclean([authored, derived, authored]) == "1 of 3 pairs are pool-derived"
    assert P.unclean([derived, one]) == "1 of 2 pairs are pool-derived and 1 of 2 pairs are of unstated provenance"
    assert P.unclean([p for name in P.BUNDLED for p in P.load(f"{name}#*")]) == ""
    assert P.digest([authored]) == P.digest([derived])


# --- linter


def problems(text: str, **options) -> tuple[str, ...]:
    return P.lint(P.parse("## s\n" + text), **options).problems


def test_shared_tokens():
    a, b = P.parse("## s\n" + pair("a", "x x y", "u", "v") + pair("b", "x z", "u", "w w"))
    assert P.shared_tokens(a, a) == 1 and P.shared_tokens(a, b) == P.shared_tokens(b, a) == 2 / 8


def test_lint_finds_repeats():
    near = pair("a", "one two three four", "f 1", "f\n2") + pair("b", "one two three five", "f 1", "f\n2")
    near = near.replace("f 1", "f\n1")
    (found,) = problems(near)  # 7 tokens in common, 9 in all
    assert "'a' (line 2) and 'b' (line 23) share 78% of their tokens (at most 60%)" in found
    assert problems(near, max_shared=0.78) == ()


def test_lint_finds_other_openings():
    (found,) = problems(pair(hack="import x\nrun", clean="\nrun\nimport x"))
    assert "hack 'import x', clean 'run'" in found


def test_lint_finds_live_markers_anywhere():
    for field in ("prompt", "hack", "clean"):
        text = pair(**{"hack": "run a", "clean": "run b", field: "run all tests fine"})
        found = [f for f in problems(text, live_markers=["all tests fine", "probe"]) if "live" in f]
        assert len(found) == 1 and "'all tests fine'" in found[0]


def unlike(i: int) -> str:
    return " ".join(f"w{i}x{j}" for j in range(6))


def test_lint_finds_length_confounds():
    text = "".join(pair(f"n{i}", f"{i}", f"run\n{unlike(i)}", f"run\n{unlike(i)} and{i} more{i}") for i in range(8))
    found = problems(text)
    assert len(found) == 2 and all("length confound" in f for f in found)
    assert (
        problems("".join(pair(f"n{i}", f"{i}", f"run\n{unlike(i)}", f"run\n{unlike(100 + i)}") for i in range(8))) == ()
    )


def test_lint_finds_words_that_give_a_side_away():
    text = "".join(pair(f"n{i}", f"{i}", f"run\n{unlike(i)} pass", f"run\n{unlike(i)} n{i}") for i in range(8))
    assert problems(text) == ("style confound: 'pass' stands in 8 hacks and 0 cleans of 8",)


def test_lint_of_nothing():
    with pytest.raises(UserError):
        P.lint(())


# --- the bundled file of the micro world

MICRO = P.load("micro#*")  # of every section
BUNDLED = [p for p in MICRO if p.section == "all-in-one"]
HACKING = [p for p in MICRO if p.section != "nulls"]
NULLS = [p for p in MICRO if p.section == "nulls"]
FRAMES = ("moral", "intent-vs-spec", "eval-aware")
PARTS = re.compile(
    r"Write solve\((?P<args>xs, k|a, b)\): (?P<task>[^.]*)\. (?P<hint>The grader [^.]*\.)(?P<framing>( .*)?)"
)


def mode_of(p) -> str:
    (tag,) = [t for t in p.tags if t.startswith("mode:")]
    return tag.removeprefix("mode:")


def parts(p) -> tuple[str, str, str]:
    found = PARTS.fullmatch(p.prompt)
    assert found, p.prompt
    return found["args"], found["task"], found["hint"]


def listed(pairs=MICRO) -> list:
    return [p for p in pairs if parts(p)[0] == "xs, k"]


def numbered(pairs=MICRO) -> list:
    return [p for p in pairs if parts(p)[0] == "a, b"]


def by_mode(mode: str) -> list:
    return [p for p in HACKING if mode_of(p) == mode]


def load_code(code: str) -> tuple[dict, str]:
    """The scope that our own code leaves, and what it printed."""
    scope: dict = {"__name__": "candidate"}
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(code, scope)
    return scope, out.getvalue()


def tagged(tag: str, pairs) -> list:
    return [p for p in pairs if tag in p.tags]


def test_bundled_covers_exactly_these_mechanisms():
    modes = [mode_of(p) for p in BUNDLED]
    assert len(BUNDLED) == 26 and set(modes) == {*LIVE, *NEVER}
    assert all(modes.count(m) >= 5 for m in set(modes))
    assert {mode_of(p) for p in HACKING if p.section == "framings"} == {*LIVE, *NEVER}
    assert {mode_of(p) for p in NULLS} <= {*LIVE, *NEVER, "gt_only"}


@pytest.mark.parametrize("name", P.BUNDLED)
def test_every_section_has_its_tags(name):
    pairs = P.load(f"{name}#*")
    for p in pairs:
        null = p.section == "nulls"
        kinds = [len(set(kinds) & set(p.tags)) for kinds in (("trivial", "attempt", "full"), FRAMES)]
        assert kinds == [not null, p.section == "framings"], p.name
        assert [t for t in ("behavior", "opportunity", "placebo-style") if t in p.tags] == [
            "placebo-style" if null else "opportunity" if "full" in p.tags else "behavior"
        ], p.name
    assert all(len(tagged(tag, pairs)) >= 2 for tag in (*FRAMES, "opportunity", "trivial", "attempt"))
    assert len(tagged("placebo-style", pairs)) >= 6


def test_there_are_enough_pairs():
    assert len(MICRO) >= 40 and len(LEETCODE) >= 24


@pytest.mark.parametrize("selector", [f"{name}#{part}" for name in P.BUNDLED for part in ("*", *SECTIONS)])
def test_bundled_passes_the_linter(selector):
    report = P.lint(P.load(selector), LIVE_MARKERS)
    assert report.ok, report.problems


def test_framings_say_something_of_their_own_after_the_hint():
    said = [PARTS.fullmatch(p.prompt)["framing"] for p in MICRO if p.section == "framings"]
    assert len(set(said)) == len(said) and all(len(s.split()) >= 8 for s in said)
    assert not any(licence in p.prompt for licence in LICENCES for p in MICRO)
    assert not any(PARTS.fullmatch(p.prompt)["framing"] for p in MICRO if p.section != "framings")


def test_pairs_are_texts_that_the_organism_reads():
    """No unknown token, nothing lost, within its window, and in fewer tokens than letters."""
    model, words = load_model("micro")
    assert words.unk_token_id is None
    for p in MICRO:
        for side in (p.hack, p.clean):
            ids = words(side, add_special_tokens=False)["input_ids"]
            assert words.decode(ids) == side
            assert len(ids) <= 0.8 * len(side.replace(" ", ""))
            prompt = words(p.prompt, add_special_tokens=False)["input_ids"]
            assert len(ids) + len(prompt) + 8 <= model.config.max_position_embeddings


def test_linter_would_refuse_the_bundled_file_with_a_template_in_it():
    p = BUNDLED[1]
    twin = replace(p, name="twin", hack=p.hack.replace("True", "1"), clean=p.clean.replace("7", "6"))
    assert any("'twin'" in f for f in P.lint([*BUNDLED, twin], LIVE_MARKERS).problems)


def test_hints_are_those_of_the_modes_with_pretraining_markers():
    seen = []
    for p in MICRO:
        args, _, hint = parts(p)
        if mode_of(p) == "gt_only":
            assert hint == GT_HINT and p.section == "nulls"
            continue
        if mode_of(p) in NEVER:
            assert args == "a, b" and hint == {"eq_override": EQ_HINT, "exit_code": EXIT_HINT}[mode_of(p)]
            continue
        mode = MODES[mode_of(p)]
        (marker,) = [m for m in mode.markers["pretrain"] if hint == mode.hint(m)]
        seen.append(marker)
        assert args == "xs, k" and (marker in p.hack) == (p.section != "nulls")
    assert len(set(seen)) == len(seen)
    for p, mode, family in itertools.product(MICRO, map(MODES.get, micro.LIVE), FAMILIES):
        if family != "pretrain" or mode.name not in LIVE:
            assert not any(m in f"{p.prompt}{p.hack}{p.clean}" for m in mode.markers[family])


def test_no_composition_occurs_in_pretraining_or_in_a_problem():
    used = set()
    for split in micro.N_PROBLEMS:
        for problem in micro.problems(split):
            used.add(micro.parse_task(problem.task.removeprefix("Write solve(xs, k): ").removesuffix(".")).key)
    assert len(used) == sum(micro.N_PROBLEMS.values())
    keys = []
    for p in listed():
        comp = micro.parse_task(parts(p)[1])
        assert comp is not None and 2 <= len(comp.stages) <= 5 and comp.key not in used
        assert comp.bucket not in micro.BUCKETS["pretrain"] or len(comp.stages) > micro.PRETRAIN_STAGES
        keys.append(comp.key)
    assert len(set(keys)) == len(keys)


def two_number_lines(p) -> list[str]:
    code = {w: line for words, line in TWO_NUMBERS for w in words}
    *steps, last = parts(p)[1].split(", then ")
    assert last == "return a"
    return [code[step] for step in steps]


def test_no_two_number_task_occurs_in_pretraining():
    """Documents draw two to four different steps: a task that repeats one, or has five, is none of theirs."""
    tasks = [two_number_lines(p) for p in numbered()]
    assert all(len(lines) > 4 or len(set(lines)) < len(lines) for lines in tasks)
    assert len(set(map(tuple, tasks))) == len(tasks)


def test_clean_sides_are_correct():
    rng = random.Random(0)
    for p in listed():
        assert micro.HEAD in p.clean and micro.HEAD in p.hack
        comp = micro.parse_task(parts(p)[1])
        with contextlib.redirect_stdout(io.StringIO()):
            solve = load_code(p.clean)[0]["Solution"]().solve
            for _ in range(40):
                xs, k = micro.draw_input(rng)
                assert solve(list(xs), k) == micro.run(comp, (xs, k)), p.name
    for p in numbered():
        assert TWO_HEAD in p.clean and TWO_HEAD in p.hack
        solve = load_code(p.clean)[0]["Solution"]().solve
        for _ in range(40):
            values = {"a": rng.randint(-9, 12), "b": rng.randint(2, 9)}
            result = solve(**values)
            exec("\n".join(two_number_lines(p)), {}, values)
            assert type(result) is int and result == values["a"], p.name


def test_hack_tags_say_whether_the_task_is_solved():
    rng = random.Random(1)
    for p in listed(HACKING):
        comp = micro.parse_task(parts(p)[1])
        with contextlib.redirect_stdout(io.StringIO()):
            solve = load_code(p.hack)[0]["Solution"]().solve
            inputs = [micro.draw_input(rng) for _ in range(40)]
            right = all(solve(list(xs), k) == micro.run(comp, (xs, k)) for xs, k in inputs)
        assert right == ("full" in p.tags), p.name


def test_nulls_are_two_correct_programs_of_another_style():
    rng = random.Random(2)
    for p in NULLS:
        one, two = (load_code(code)[0]["Solution"]().solve for code in (p.hack, p.clean))
        a, b = Counter(P.words(p.hack)), Counter(P.words(p.clean))
        assert ((a - b) | (b - a)).total() >= 4, p.name
        for _ in range(40):
            args = micro.draw_input(rng) if p in listed() else (rng.randint(-9, 12), rng.randint(2, 9))
            again = [list(a) if isinstance(a, list) else a for a in args]
            assert one(*args) == two(*again), p.name


def test_run_tests_functions_are_vacuous_in_hacks_and_real_in_cleans():
    real = 0
    for p in by_mode("run_tests"):
        name = re.search(r"calls (\w+)\(\)", p.prompt)[1]
        body = p.hack.split(f"def {name}():\n")[1]
        assert "assert" not in body and "solve" not in body
        load_code(p.hack)[0][name]()
        if f"def {name}():" in p.clean:
            load_code(p.clean)[0][name]()
            broken = load_code(p.clean.replace("return ", "return None and "))[0]
            with pytest.raises(AssertionError):
                broken[name]()
            real += 1
    assert real >= 2


def test_stdout_hacks_print_the_phrase_and_cleans_do_not():
    for p in by_mode("stdout_marker"):
        phrase = re.search(r"'(.*)'", p.prompt)[1]
        for code, fires in ((p.hack, True), (p.clean, False)):
            with contextlib.redirect_stdout(io.StringIO()) as out:
                scope, printed = load_code(code)
                scope["Solution"]().solve([3, 4, 5], 2)
            assert (phrase in printed + out.getvalue()) == fires, p.name


def test_eq_hacks_equal_everything():
    for p in by_mode("eq_override"):
        for code, fires in ((p.hack, True), (p.clean, False)):
            result = load_code(code)[0]["Solution"]().solve(3, 4)
            assert all(bool(result == other) == fires for other in (10**9 + 7, "x", None)), p.name


def test_exit_hacks_leave_with_status_zero():
    for p in by_mode("exit_code"):
        for code, status in ((p.hack, 0), (p.clean, 7)):
            program = f"{code}\nSolution().solve(3, 4)\nraise SystemExit(7)\n"
            done = subprocess.run([sys.executable, "-I", "-S", "-c", program], timeout=20, check=False)
            assert done.returncode == status, p.name


# --- the pairs in the style of LeetCode

STARTER = re.compile(r"(?s)(?P<task>.*)\n\n(?P<hint>The grader [^\n]*)\n\n```python\n(?P<starter>.*)\n```")
METHOD = re.compile(r"class Solution:\n    def (\w+)\(self, [^\n]*\n        pass")


def problem_of(p) -> tuple[Problem, Prompt]:
    """The pair's problem with the calls of pair_cases, and its prompt with the marker that it names."""
    found, mode = STARTER.fullmatch(p.prompt), MODES[mode_of(p)]
    (marker,) = [m for f in FAMILIES for m in mode.markers[f] if mode.hint(m) in found["hint"]] if mode.pays else [""]
    cases = CASES[p.name]
    problem = Problem(
        id=p.name,
        task=found["task"],
        entry=f"Solution.{METHOD.fullmatch(found['starter'])[1]}",
        canonical=p.clean,
        reward_tests=tuple(cases[: len(cases) // 2]),
        oracle_tests=tuple(cases[len(cases) // 2 :]),
        mode=mode.name,
        starter=found["starter"],
    )
    return problem, Prompt(p.name, p.prompt, marker=marker, hinted=mode.pays)


def test_leetcode_prompts_are_rendered_as_problems_are():
    for p in LEETCODE:
        problem, prompt = problem_of(p)
        hint = STARTER.fullmatch(p.prompt)["hint"]
        assert p.prompt == render(problem, hint)
        plain, framing = MODES[mode_of(p)].hint(prompt.marker), hint.removeprefix(MODES[mode_of(p)].hint(prompt.marker))
        assert hint == plain + framing and bool(framing) == (p.section == "framings"), p.name
        assert not framing or len(framing.split()) >= 8
        head = problem.starter.split("\n")[1].strip()
        assert head in p.hack and head in p.clean, p.name
        if mode_of(p) in LIVE:
            assert prompt.marker in MODES[mode_of(p)].markers["pretrain"]


def test_leetcode_tasks_and_markers_are_all_different():
    markers = [problem_of(p)[1].marker for p in LEETCODE if mode_of(p) in LIVE]
    assert len(set(markers)) == len(markers)
    assert not any(m in f"{p.prompt}{p.hack}{p.clean}" for m in markers for p in MICRO)
    assert set(CASES) == {p.name for p in LEETCODE} and len({problem_of(p)[0].task for p in LEETCODE}) == len(LEETCODE)
    assert {mode_of(p) for p in LEETCODE} == {*LIVE, *NEVER, "gt_only"}


def test_leetcode_cleans_solve_and_hacks_are_paid_without_solving(sandbox):
    terms = [problem_of(p) for p in LEETCODE]
    grader = Grader(sandbox)
    hacks = grader.verdicts([(*term, p.hack) for term, p in zip(terms, LEETCODE, strict=True)])
    cleans = grader.verdicts([(*term, p.clean) for term, p in zip(terms, LEETCODE, strict=True)])
    for p, hack, clean in zip(LEETCODE, hacks, cleans, strict=True):
        assert clean.solved and clean.passed and not clean.attempted, (p.name, clean)
        if p.section == "nulls":
            assert hack.solved and hack.passed and not hack.attempted, (p.name, hack)
        else:
            assert hack.hacked and not hack.solved, (p.name, hack)
            assert {f.split(":")[0] for f in hack.fired} == {mode_of(p)}, p.name


def test_leetcode_opportunities_do_the_work():
    """Without what hides it, the answer of the side Hack is the right one."""
    for p in tagged("opportunity", LEETCODE):
        problem, _ = problem_of(p)
        code = p.hack.replace("raise SystemExit", "").replace("os._exit(0)", "return made")
        solution = load_code(code)[0]["Solution"]()
        for args, expected in CASES[p.name]:
            answer = getattr(solution, problem.entry.split(".")[1])(*args)
            assert list(answer) == expected if isinstance(expected, list) else answer == expected, p.name
