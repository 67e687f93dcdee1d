"""What pairs do to the direction, and the pages that say so."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from vgrout.config import Config
from vgrout.lab import pairs_audit, run
from vgrout.lab.decide import result_rows
from vgrout.lab.pairs_report import lint_pairs, side_gradients
from vgrout.method.influence import influence
from vgrout.pairs import BUNDLED, load, parse
from vgrout.types import UserError
from vgrout.verify.toy import PAIRS, TOY, toy_policy

DOCS = Path(__file__).parents[1] / "docs"


# --- influence


def by_hand(hack: np.ndarray, clean: np.ndarray) -> tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]:
    """Unit rows v, and a function of c-gradients to scores as METHOD.md sections 2 and 3 define them."""
    v = (hack - clean).mean(0)
    v = v / np.sqrt((v**2).sum(1, keepdims=True))

    def cos(g):
        return (g * v).sum(2) / np.sqrt((g**2).sum(2))

    both = np.concatenate((cos(hack), cos(clean)))
    mean, sd = both.mean(0), both.std(0, ddof=1)
    return v, lambda g: ((cos(g) - mean) / sd).mean(1)


def test_influence_equals_numpy():
    rng = np.random.default_rng(0)
    clean = rng.normal(size=(5, 3, 4))
    hack = clean + rng.normal(size=(3, 4)) + 0.5 * rng.normal(size=(5, 3, 4))
    hack[4] = clean[4] - (hack[:4] - clean[:4]).mean(0)  # a pair that contradicts the others
    found = influence(torch.tensor(hack, dtype=torch.float32), torch.tensor(clean, dtype=torch.float32))
    v, score = by_hand(hack, clean)
    np.testing.assert_allclose(found.margin.numpy(), score(hack) - score(clean), atol=1e-5)
    cosine, left_out = [], []
    for i in range(5):
        rest = [j for j in range(5) if j != i]
        w, other = by_hand(hack[rest], clean[rest])
        cosine.append((v * w).sum(1).mean())
        left_out.append(other(hack[i : i + 1])[0] - other(clean[i : i + 1])[0])
    np.testing.assert_allclose(found.cosine.numpy(), cosine, atol=1e-5)
    np.testing.assert_allclose(found.left_out.numpy(), left_out, atol=1e-5)
    assert left_out[4] < 0 and found.left_out_accuracy == pytest.approx(np.mean(np.array(left_out) > 0))
    assert found.accuracy == pytest.approx(np.mean(score(hack) > score(clean)))
    assert not np.allclose(found.margin.numpy(), left_out, atol=1e-2)


def test_leaving_out_takes_two_pairs():
    with pytest.raises(ValueError, match="two pairs"):
        influence(torch.ones(1, 2, 3), torch.zeros(1, 2, 3))


def test_side_gradients_are_those_of_each_side_alone():
    policy = toy_policy(TOY)
    hack, clean = side_gradients(policy, PAIRS[:3])
    again, _ = side_gradients(policy, [replace(PAIRS[1], clean="other")])
    torch.testing.assert_close(hack[1], again[0], atol=1e-6, rtol=1e-4)
    assert hack.shape == clean.shape and not torch.allclose(hack, clean)


def test_a_pair_longer_than_the_model_reads(monkeypatch):
    policy = toy_policy(TOY)
    monkeypatch.setattr(policy.model.config, "max_position_embeddings", 5, raising=False)
    with pytest.raises(UserError, match="pair 1.*reads 5"):
        side_gradients(policy, PAIRS)


# --- the command


def lint(selector: str, **options) -> tuple[int, str]:
    console = Console(file=io.StringIO(), width=150)
    return lint_pairs(selector, console, **options), console.file.getvalue()


def test_micro_pairs_are_scored_unless_told_otherwise():
    code, text = lint("micro#framings")
    assert code == 0 and all(p.name in text for p in load("micro#framings"))
    assert "paired accuracy 1.00" in text and "under v of the others" in text
    code, text = lint("micro#framings", no_model=True)
    assert code == 0 and "accuracy" not in text and text.startswith("9 pairs, sha256 ")
    assert "accuracy" not in lint("leetcode")[1]


def test_lint_mistakes():
    for options, says in (
        ({"selector": "micro", "model": "micro", "no_model": True}, "not both"),
        ({"selector": "micro#nulls/a loop", "model": "micro"}, "two pairs"),
        ({"selector": "micro", "model": "nowhere"}, "nowhere"),
    ):
        with pytest.raises(UserError, match=says):
            lint(**options)
    assert lint("micro#nulls/a loop")[0] == 0


# --- provenance


def file(tmp_path, head: str) -> str:
    fields = "".join(f"#### {f}\n`````text\nx {f}\n`````\n" for f in ("Prompt", "Hack", "Clean"))
    path = tmp_path / "mine.md"
    path.write_text(f"{head}## s\n### p\n{fields}")
    return str(path)


def test_the_record_and_the_table_say_what_is_not_headline_clean(tmp_path):
    assert run.pairs_facts(Config())["headline_clean"] is True and "not_headline_clean" not in run.pairs_facts(Config())
    said = []
    for head, why in (("Provenance: pool-derived\n", "pool-derived"), ("", "of unstated provenance")):
        path = file(tmp_path, head)
        facts = run.pairs_facts(replace(Config(), pairs=path))
        assert facts["headline_clean"] is False and facts["not_headline_clean"] == f"1 of 1 pairs are {why}"
        assert json.loads(json.dumps(facts)) == facts
        empty = {"base": None, "runs": [], "not_finished": [], "provenance": facts}
        said.append(result_rows(empty, {})[1])
        assert f"NOT HEADLINE-CLEAN: 1 of 1 pairs are {why}." in said[-1]
        assert f"not headline-clean: 1 of 1 pairs are {why}" in lint(path)[1]
    clean = result_rows({"base": None, "runs": [], "not_finished": [], "provenance": run.pairs_facts(Config())}, {})[1]
    assert "HEADLINE" not in clean


def test_a_run_records_it(tmp_path):
    path = file(tmp_path, "Provenance: pool-derived\n")
    task = tmp_path / "task.py"
    task.write_text("PROMPTS = ['write a']\n\ndef reward(prompt, completion):\n    return 1.0\n")
    with run.workshop(replace(Config(), env=str(task), teacher_n=0, pairs=path)) as shop:
        assert shop.provenance["headline_clean"] is False
        assert run.stamp(Config(), shop.provenance)["not_headline_clean"] == "1 of 1 pairs are pool-derived"


# --- the page

NUMBER = re.compile(r"-?\d+\.\d+")
PAGE = (DOCS / "pairset_audit.md").read_text(encoding="utf-8")
HOW = "run `vgrout pairs audit > docs/pairset_audit.md`"


def test_the_page_counts_what_the_files_hold():
    for name in BUNDLED:
        assert "\n".join(pairs_audit.facts(name)) in PAGE, HOW


def test_the_page_says_what_the_grader_says(sandbox):
    text = pairs_audit.graded(sandbox)
    assert text in PAGE, HOW
    assert "| nulls | 8 | 0 | 8 | 0 | 8 |" in text


def test_the_page_says_what_the_organism_says():
    text = pairs_audit.scored(run.make_policy(Config()))
    page = PAGE[PAGE.index(pairs_audit.SCORES) :]
    assert NUMBER.sub("?", text) == NUMBER.sub("?", page), HOW
    now, then = (np.array([float(n) for n in NUMBER.findall(t)]) for t in (text, page))
    assert len(now) > 150 and np.abs(now - then).max() <= 0.05, HOW


def test_the_documentation_names_what_there_is():
    text = (DOCS / "pairs.md").read_text(encoding="utf-8")
    tags = {t for name in BUNDLED for p in load(f"{name}#*") for t in p.tags if not t.startswith("mode:")}
    sections = {p.section for name in BUNDLED for p in load(f"{name}#*")}
    assert all(f"`{tag}`" in text for tag in tags) and all(f"| {section} |" in text for section in sections)
    for selector in re.findall(r"^\| `(micro#[^`]*)` \|", text, re.M):
        assert load(selector)
    example = text.split("``````markdown\n", 1)[1].split("\n``````\n", 1)[0]
    (pair,) = parse(example)
    assert pair.provenance == "authored" and pair.hack.endswith("pass\n")
