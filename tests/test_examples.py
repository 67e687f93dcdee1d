"""The scripts of examples/ do what they say, at small sizes."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from vgrout.types import UserError

EXAMPLES = Path(__file__).parents[1] / "examples"


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_own_loop(tmp_path, monkeypatch):
    from vgrout.api import Router, Routing, load_model

    lines = (EXAMPLES / "own_loop.py").read_text().splitlines()
    assert len(lines) <= 40
    example = script("own_loop")
    monkeypatch.setattr(example, "STEPS", 2)
    torch.manual_seed(0)
    model, tokenizer = load_model("micro")
    base = {name: p.clone() for name, p in model.state_dict().items()}
    router = Router(model, tokenizer, Routing(pairs="micro"))
    with pytest.raises(UserError, match="rollouts of a whole step"):
        router.decide(0, [[5, 6]], [[7, 8]])
    with pytest.raises(UserError, match="adapter already"):
        Router(model, tokenizer, Routing(pairs="micro"))
    zones = example.train(model, tokenizer, router)
    assert [len(step) for step in zones] == [example.ROWS] * 2 and "route" in zones[-1] and "keep" in zones[-1]
    for which in ("deployed", "quarantine"):
        assert all(bool(p.any()) for _, p in router.adapter.named(which)), f"{which} did not train"

    ids = torch.randint(5, 1000, (2, 12))
    with torch.no_grad(), router.adapter.deployed():
        ships = model(ids).logits
    with torch.no_grad():
        assert not torch.allclose(model(ids).logits, ships, atol=1e-4), "the quarantine is live until it is ablated"
    router.export(tmp_path / "peft")
    with torch.no_grad():
        torch.testing.assert_close(router.ship()(ids).logits, ships, rtol=1e-4, atol=1e-4)
    assert {name for name, _ in model.named_parameters()} <= set(base), "nothing of the adapter is left"

    peft = pytest.importorskip("peft", reason="needs the extra peft")
    again, _ = load_model("micro")
    with torch.no_grad():
        loaded = peft.PeftModel.from_pretrained(again, tmp_path / "peft")(ids).logits
    torch.testing.assert_close(loaded, ships, rtol=1e-4, atol=1e-4)


def test_own_task(tmp_path, monkeypatch):
    from vgrout import cli

    task = script("own_task")
    prompt = task.PROMPTS["train"][0]
    solved = "".join(task.STEPS[step] + "\n" for step in task.ASKED[prompt])
    assert [task.reward(prompt, text) for text in (solved, "", "def score_up(): pass")] == [1.0, 0.0, 3.0]
    out = tmp_path / "run"
    command = f"train --env {EXAMPLES / 'own_task.py'} --teacher-n 0 --arm routeV --steps 2 --prompts 2 --group 4"
    small = "--eval-every 0 --eval-rollouts 8 --max-new 48"
    monkeypatch.setattr(sys, "argv", ["vgrout", *command.split(), *small.split(), "--out", str(out)])
    try:
        cli.main()
    except SystemExit as left:
        assert not left.code
    steps = [json.loads(line) for line in (out / "steps.jsonl").read_text().splitlines()]
    assert len(steps) == 2 and all(step["skipped"] is None and step["t_hi"] is not None for step in steps)
    assert any(step["route"] > 0 for step in steps)
    cells = json.loads((out / "eval.json").read_text())["cells"]
    assert all("reward" in cell and "hack" not in cell for cell in cells.values())


def test_trl_micro(tmp_path, monkeypatch):
    pytest.importorskip("trl", reason="needs the extra trl")
    monkeypatch.setattr(sys, "argv", ["trl_micro.py", "--steps", "1", "--out", str(tmp_path / "out")])
    script("trl_micro").main()
    said = json.loads((tmp_path / "out" / "peft" / "export.json").read_text())
    assert said["live"] == "deployed"
    assert (tmp_path / "out" / "adapter.safetensors").is_file()
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_no_run_executes_what_the_examples_use():
    """A better API is no reason to train again: runs are stamped with the code that they execute."""
    from vgrout.lab.source import executed

    files = [path.relative_to(Path(sys.modules["vgrout"].__file__).parent) for path in executed()]
    assert not [path for path in files if path.name == "api.py" or path.parts[0] == "integrations"]
