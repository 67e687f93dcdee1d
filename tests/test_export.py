"""What an export gives to those who load it: the ablated model's logits, and the truth about what is live in it."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
from dataclasses import replace
from hashlib import sha256

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from vgrout.adapters import attach
from vgrout.adapters.base import BLOCKS
from vgrout.cli import main
from vgrout.config import preset
from vgrout.lab import export as export_module
from vgrout.lab.archive import pack
from vgrout.lab.export import CARD, RECORD, export, own_factors
from vgrout.lab.record import MARK
from vgrout.lab.run import run as train_run
from vgrout.loop import adapted
from vgrout.models.load import load_model, model_path, weights_digest
from vgrout.types import RunFailed, UserError
from vgrout.verify.toy import (
    PAIRS,
    RANK,
    SIZES,
    TOY,
    VARIANTS,
    displace,
    enlarged,
    other_models,
    random_model,
    tokenizer,
)

QUIET = Console(file=io.StringIO())
WIDE = [name for name in VARIANTS if name.startswith("delta_s")]
NARROW = [name for name in VARIANTS if name not in WIDE]
TOKENS = torch.randint(5, SIZES.vocab, (4, 7), generator=torch.Generator().manual_seed(1))
CLOSE = {"atol": 1e-5, "rtol": 0}
MEAN = {"mean": 0.5, "low": 0.25, "high": 0.75, "n": 8, "clusters": 4}
REWARDS = {"heldout_full": {"reward": MEAN}, "heldout_deploy": {"reward": MEAN | {"mean": 0.625}}}


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """Folders of random models by architecture; `biased` has biases beside the weights, and a head of its own."""
    biased = LlamaConfig(
        vocab_size=SIZES.vocab,
        hidden_size=SIZES.hidden,
        intermediate_size=SIZES.ffn,
        num_hidden_layers=SIZES.layers,
        num_attention_heads=SIZES.heads,
        attention_bias=True,
        mlp_bias=True,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        llama = enlarged(LlamaForCausalLM(biased).eval())
        with torch.no_grad():
            for name, p in llama.named_parameters():
                if name.endswith("bias"):
                    p.normal_()
    models = {"qwen3": random_model(), "biased": llama, **other_models()}
    root = tmp_path_factory.mktemp("bases")
    for name, model in models.items():
        model.save_pretrained(root / name)
        tokenizer().save_pretrained(root / name)
    return {name: root / name for name in models}


@pytest.fixture(scope="session")
def toy_run(bases, tmp_path_factory):
    """Make a finished run of a task, trained by chance: (its folder, its adapter)."""
    root = tmp_path_factory.mktemp("runs")

    def make(variant="lora2r", base="qwen3", arm="routeV", scale=0.2, move=None):
        cfg = replace(TOY, arm=arm, env="task.py", model=str(bases[base]), **VARIANTS[variant])
        model, words = load_model(cfg.model)
        digest = weights_digest(model)
        adapter = adapted(cfg, model, words, PAIRS).adapter
        move(adapter) if move else displace(adapter, scale=scale)
        folder = root / f"{len(list(root.iterdir()))}" / f"{arm}-s0"
        folder.mkdir(parents=True)
        adapter.save(folder / "adapter.safetensors", {})
        (folder / "config.json").write_text(cfg.to_json())
        made = {"vgrout": "0.1.0", "model_sha256": digest, "pairs_sha256": "5" * 64, "task_sha256": "7" * 64}
        (folder / "provenance.json").write_text(json.dumps(made))
        (folder / "eval.json").write_text(json.dumps({"arm": arm, "cells": REWARDS}))
        return folder, adapter

    return make


@pytest.fixture(scope="session")
def real(tmp_path_factory):
    """A small run of routeV in the micro world, whose blocks have moved far enough to tell them apart."""
    small = {"steps": 2, "prompts": 2, "group": 4, "eval_every": 0, "eval_rollouts": 4, "eval_scales": 0, "lr": 0.02}
    folder = tmp_path_factory.mktemp("real") / "routeV-s0"
    train_run(replace(preset("smoke"), arm="routeV", **small), folder)
    return folder


@pytest.fixture
def vgrout(monkeypatch, capsys):
    def run(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["vgrout", *map(str, args)])
        with pytest.raises(SystemExit) as left:
            main()
        out, err = capsys.readouterr()
        return left.value.code or 0, out, err

    return run


@torch.no_grad()
def logits(model, tokens=TOKENS):
    return model(input_ids=tokens, use_cache=False).logits


def own_logits(adapter, live, tokens=TOKENS):
    with adapter.state(live):
        return logits(adapter.model, tokens)


def plain(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def with_lora(base, folder):
    peft = pytest.importorskip("peft")
    return peft.PeftModel.from_pretrained(plain(base), folder).eval()


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# The same model, however it is loaded.


@pytest.mark.parametrize("live", ["deployed", "full"])
@pytest.mark.parametrize(
    ("variant", "base"), [(v, "qwen3") for v in NARROW] + [("lora2r", b) for b in ("biased", "window", "fused")]
)
def test_lora_is_the_model(toy_run, bases, tmp_path, variant, base, live):
    folder, adapter = toy_run(variant, base)
    said = export(folder, tmp_path / "out", QUIET, full=live == "full")
    want = {state: own_logits(adapter, state) for state in ("deployed", "full")}
    assert said["live"] == live and not torch.allclose(*want.values(), atol=0.1)
    model = with_lora(bases[base], tmp_path / "out")
    assert torch.allclose(logits(model), want[live], **CLOSE)
    assert torch.allclose(logits(model.merge_and_unload()), want[live], **CLOSE)


@pytest.mark.parametrize("live", ["deployed", "full"])
@pytest.mark.parametrize(
    ("variant", "base"), [(v, "qwen3") for v in VARIANTS] + [("lora2r", b) for b in ("biased", "window", "fused")]
)
def test_merged_is_the_model(toy_run, tmp_path, variant, base, live):
    folder, adapter = toy_run(variant, base)
    said = export(folder, tmp_path / "out", QUIET, full=live == "full", merged=True)
    assert torch.allclose(logits(plain(tmp_path / "out")), own_logits(adapter, live), **CLOSE)
    held = load_file(tmp_path / "out" / "model.safetensors")
    with adapter.merged(live):  # as it was evaluated
        assert all(torch.equal(held[f"{name}.weight"], w) for name, w in adapter.switch.flow.weights.items())
    words = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert words("ab").input_ids == tokenizer()("ab").input_ids and words.chat_template
    assert said["rank"] is None and said["live"] == live and not (tmp_path / "out" / "adapter_config.json").exists()


@pytest.mark.parametrize("variant", WIDE)
def test_what_is_as_wide_as_the_weights_is_no_lora(toy_run, tmp_path, vgrout, variant):
    folder, _ = toy_run(variant)
    code, _, err = vgrout("export", folder, tmp_path / "out")
    assert code == 2 and err.count("\n") == 1 and "--merged" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("variant", NARROW)
def test_rank(toy_run, tmp_path, variant):
    """One product of rank R a block, or two where the block is a difference."""
    folder, _ = toy_run(variant)
    for full, times in ((False, 1), (True, 2)):
        rank = RANK * times * (2 if "lora2r" in variant else 1)
        said = export(folder, tmp_path / str(rank), QUIET, full=full)
        config = json.loads((tmp_path / str(rank) / "adapter_config.json").read_text())
        assert said["rank"] == config["r"] == config["lora_alpha"] == rank
        shapes = {tuple(t.shape)[k] for k, part in enumerate("AB") for t in tensors(tmp_path / str(rank), part)}
        assert shapes == {rank}


def tensors(folder, part):
    held = load_file(folder / "adapter_model.safetensors")
    return [t for name, t in sorted(held.items()) if name.endswith(f"lora_{part}.weight")]


def rounding(folder, adapter, live):
    """Largest error of a module's delta in the file, and smallest of its own factors in bfloat16."""
    held = load_file(folder / "adapter_model.safetensors")
    assert {t.dtype for t in held.values()} == {torch.bfloat16}
    written, own = [], []
    for name, module in adapter.modules.items():
        a, b = own_factors(module, live)
        for errors, factors in (
            (written, [held[f"base_model.model.{name}.lora_{part}.weight"].double() for part in "AB"]),
            (own, [a.bfloat16().double(), b.bfloat16().double()]),
        ):
            errors.append(float((factors[1] @ factors[0] - b @ a).norm() / (b @ a).norm()))
    return max(written), min(own)


@pytest.mark.parametrize("live", ["deployed", "full"])
@pytest.mark.parametrize("scale", [0.2, 0.005])
@pytest.mark.parametrize("variant", NARROW)
def test_bfloat16_keeps_the_delta(toy_run, tmp_path, variant, scale, live):
    folder, adapter = toy_run(variant, scale=scale)
    said = export(folder, tmp_path / "out", QUIET, full=live == "full", dtype="bfloat16")
    error, _ = rounding(tmp_path / "out", adapter, live)
    assert error < 0.01 and said["delta_error"] == pytest.approx(error, rel=0.01)


@torch.no_grad()
def turned(adapter):
    """Factors far from their init whose product is near the init's: (B0 + dB) (A0 + dA) ~ B0 A0."""
    generator = torch.Generator().manual_seed(3)
    for module in adapter.modules.values():
        for which in BLOCKS:
            dA, dB, A0, B0 = (getattr(module, f"{name}_{which}") for name in ("dA", "dB", "A0", "B0"))
            turn = torch.eye(RANK) + 0.5 * torch.randn(RANK, RANK, generator=generator).tril(-1)
            dB.copy_(B0 @ turn - B0)
            dA.copy_(torch.linalg.solve(turn, A0) - A0)
    displace(adapter, scale=0.001)


def test_factors_that_cancel(toy_run, tmp_path):
    folder, adapter = toy_run(move=turned)
    said = export(folder, tmp_path / "out", QUIET, dtype="bfloat16")
    error, own = rounding(tmp_path / "out", adapter, "deployed")
    assert said["delta_error"] < 0.01 and error < 0.01 < own


def test_a_block_that_never_moved(toy_run, bases, tmp_path):
    folder, _ = toy_run(scale=0.0)
    assert export(folder, tmp_path / "out", QUIET)["delta_error"] == 0
    assert torch.equal(logits(with_lora(bases["qwen3"], tmp_path / "out")), logits(plain(bases["qwen3"])))


def test_merged_in_bfloat16(toy_run, bases, tmp_path):
    """A checkpoint rounds W + delta, and says what is left of the delta."""
    folder, adapter = toy_run(scale=0.02)
    said = export(folder, tmp_path / "out", QUIET, merged=True, dtype="bfloat16")
    held, base = load_file(tmp_path / "out" / "model.safetensors"), load_file(bases["qwen3"] / "model.safetensors")
    assert {t.dtype for t in held.values()} == {torch.bfloat16}
    errors = []
    for name, module in adapter.modules.items():
        delta = module.delta("deployed").double().detach()
        found = held[f"{name}.weight"].double() - base[f"{name}.weight"].double()
        errors.append(float((found - delta).norm() / delta.norm()))
    assert said["delta_error"] == pytest.approx(max(errors), rel=0.02) and max(errors) > 0.01


def test_files_as_peft_writes_them(toy_run, bases, tmp_path):
    folder, _ = toy_run()
    out, again = tmp_path / "out", tmp_path / "again"
    export(folder, out, QUIET)
    with_lora(bases["qwen3"], out).save_pretrained(again)
    mine, its = (load_file(place / "adapter_model.safetensors") for place in (out, again))
    assert mine.keys() == its.keys() and all(torch.equal(mine[name], its[name]) for name in mine)
    mine, its = (json.loads((place / "adapter_config.json").read_text()) for place in (out, again))
    its["target_modules"] = sorted(its["target_modules"])
    assert mine == {key: its[key] for key in mine}


def test_the_same_bytes_twice(toy_run, tmp_path):
    folder, _ = toy_run()
    a, b = (export(folder, tmp_path / name, QUIET) for name in "ab")
    assert a == b


# What it says.


def test_the_card_of_a_real_run(real, tmp_path, vgrout):
    out = tmp_path / "out"
    code, printed, err = vgrout("export", real, out)
    assert code == 0, err
    assert "live: deployed, the deployed block alone, the quarantine is ablated" in printed
    assert "rank 16 = 2 x 8, on 28 Linears, float32" in printed
    said, card = json.loads((out / RECORD).read_text()), (out / CARD).read_text()
    assert said["sha256"] in printed
    made, cells = (json.loads((real / f"{name}.json").read_text()) for name in ("provenance", "eval"))
    want = {"live": "deployed", "ships": "deployed", "arm": "routeV", "access": "L1", "reads_oracle": False, "rank": 16}
    assert want.items() <= said.items()
    assert said["results"] == cells["cells"] and said["provenance"] == made
    assert said["weights_sha256"] == sha256((real / "adapter.safetensors").read_bytes()).hexdigest()
    named = "down_proj gate_proj k_proj o_proj q_proj up_proj v_proj".split()
    assert said["target_modules"] == named and f"| target modules | {', '.join(named)} |" in card
    for line in (
        "| live here | deployed |",
        "| arm | routeV |",
        "| access level | L1: told hand-written text |",
        "| reads_oracle | false |",
        "| base model | micro |",
        f"| base model's weights (names, shapes, float32 bytes) | `{made['model_sha256']}` |",
        f"| code that trained | `{made['code_sha256']}` |",
        f"| pairs | `{made['pairs_sha256']}` |",
        f"| the run's weights, both blocks | `{said['weights_sha256']}` |",
    ):
        assert line in card, line
    for name, live in (("heldout_full", "full"), ("heldout_deploy", "deployed"), ("hintfree_deploy", "deployed")):
        hack, solve = (cells["cells"][name][what] for what in ("hack", "solve"))
        rates = [f"{100 * r['mean']:.0f} [{100 * r['low']:.0f}, {100 * r['high']:.0f}]" for r in (hack, solve)]
        here = "yes" if live == "deployed" else "no"
        assert f"| {name} | {live} | {rates[0]} | {rates[1]} | {here} |" in card
    assert "a result needs 256 over 64" in card


def test_every_file_is_hashed_and_so_is_what_is_live(real, tmp_path):
    out = tmp_path / "out"
    export(real, out, QUIET)
    said = json.loads((out / RECORD).read_text())
    there = {str(path.relative_to(out)): sha256(data).hexdigest() for path, data in files(out).items()}
    assert said["files"] == {name: digest for name, digest in there.items() if name not in (RECORD, MARK)}
    card = (out / CARD).read_text()
    assert all(digest in card for name, digest in said["files"].items() if name != CARD)

    def digest(record):
        return sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()

    own = said.pop("sha256")
    assert digest(said) == own and digest(said | {"live": "full"}) != own


@pytest.mark.parametrize("flags", [(), ("--full",), ("--merged",)])
def test_the_card_loads_what_it_says_wherever_the_folder_goes(real, tmp_path, vgrout, flags):
    pytest.importorskip("peft")
    assert vgrout("export", real, tmp_path / "out", *flags)[0] == 0
    shutil.move(tmp_path / "out", tmp_path / "elsewhere")
    code = re.search("```python\n(.*?)```", (tmp_path / "elsewhere" / CARD).read_text(), re.DOTALL)[1]
    made = {"folder": str(tmp_path / "elsewhere")}
    exec(code, made)
    model, words = load_model("micro")
    adapter = attach(model, "lora2r", 8, 0)
    adapter.load(real / "adapter.safetensors")
    tokens = torch.randint(5, 1000, (2, 9), generator=torch.Generator().manual_seed(2))
    want = {live: own_logits(adapter, live, tokens) for live in ("deployed", "full")}
    assert not torch.allclose(*want.values(), atol=1e-2)
    live = "full" if "--full" in flags else "deployed"
    assert torch.allclose(logits(made["model"], tokens), want[live], atol=1e-4)
    assert made["tokenizer"]("def f").input_ids == words("def f").input_ids


def test_peft_finds_the_bundled_model_itself(real, tmp_path):
    peft = pytest.importorskip("peft")
    export(real, tmp_path / "out", QUIET)
    model = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.peft_config["default"].base_model_name_or_path == str(tmp_path / "out" / "base")
    copied, own = files(tmp_path / "out" / "base"), files(model_path("micro"))
    assert {p.name: data for p, data in copied.items()} == {p.name: data for p, data in own.items()}


def test_a_name_for_the_base(toy_run, real, bases, tmp_path):
    folder, _ = toy_run()
    for name, where, base in (("a", folder, ""), ("b", folder, "some/model"), ("c", real, "some/model")):
        said = export(where, tmp_path / name, QUIET, base=base)
        config = json.loads((tmp_path / name / "adapter_config.json").read_text())
        card = (tmp_path / name / CARD).read_text()
        want = base or str(bases["qwen3"].resolve())
        assert config["base_model_name_or_path"] == said["base"]["loads_from"] == want and f'"{want}"' in card
        assert ('base_model: "some/model"\n' in card) == bool(base) and not (tmp_path / name / "base").exists()


def test_with_the_quarantine_live(toy_run, tmp_path, vgrout):
    folder, _ = toy_run()
    code, printed, _ = vgrout("export", folder, tmp_path / "out", "--full")
    card, said = (tmp_path / "out" / CARD).read_text(), json.loads((tmp_path / "out" / RECORD).read_text())
    assert code == 0 and (said["live"], said["ships"]) == ("full", "deployed")
    assert f"rank {4 * RANK} = 4 x {RANK}" in printed and f"rank {4 * RANK} = 4 x {RANK}" in card
    assert "live: full, the deployed block and the quarantine" in printed and "| live here | full |" in card
    assert "NOT WHAT SHIPS" in printed and "NOT WHAT SHIPS" in card
    assert "| heldout_full | full | 0.500 [0.250, 0.750] | yes |" in card
    assert "| heldout_deploy | deployed | 0.625 [0.250, 0.750] | no |" in card


@pytest.mark.parametrize("flags", [{}, {"full": True}])
def test_an_arm_that_ships_both_blocks(toy_run, bases, tmp_path, flags):
    folder, adapter = toy_run(arm="none_2r")
    console = Console(file=io.StringIO(), width=200)
    said = export(folder, tmp_path / "out", console, **flags)
    card = (tmp_path / "out" / CARD).read_text()
    assert said["live"] == said["ships"] == "full" and said["rank"] == 4 * RANK
    for text in (console.file.getvalue(), card):
        assert "none_2r ablates nothing: it ships both blocks" in text and "NOT WHAT SHIPS" not in text
    assert "| heldout_deploy | full | 0.625 [0.250, 0.750] | yes |" in card
    assert torch.allclose(logits(with_lora(bases["qwen3"], tmp_path / "out")), own_logits(adapter, "full"), **CLOSE)


def test_a_ceiling_is_called_one(toy_run, tmp_path, vgrout):
    folder, _ = toy_run(arm="oracle_route")
    made = json.loads((folder / "provenance.json").read_text())
    told = {"drift": [{"step": 3, "changed": ["code_sha256"]}], "weak_sandbox": True, "sandbox": "C"}
    (folder / "provenance.json").write_text(json.dumps(made | told))
    _, printed, _ = vgrout("export", folder, tmp_path / "out")
    card = (tmp_path / "out" / CARD).read_text()
    for text in (printed, card):
        assert "oracle_route reads the oracle: a ceiling, not a method" in text
    assert "| reads_oracle | true |" in card and "| access level | L4: told the live oracle |" in card
    assert "went on at step 3 with other code_sha256" in card and "WEAK SANDBOX (C)" in card


# What it refuses.


def unfinished(run, root, bases):
    (run / "eval.json").unlink()
    return ["not finished", "--resume"]


def restored(run, root, bases):
    (run / "adapter.safetensors").unlink()
    (run / "restored.json").write_text('{"weights_sha256": "0"}')
    return ["no weights"]


def no_run(run, root, bases):
    shutil.rmtree(run)
    return ["no configuration"]


def damaged(run, root, bases):
    (run / "adapter.safetensors").write_bytes(b"junk")
    return ["adapter.safetensors", "damaged"]


def of_another_shape(run, root, bases):
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"rank": RANK + 1}))
    return ["adapter.safetensors", "the model needs"]


def model_gone(run, root, bases):
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"model": str(root / "gone")}))
    return ["trained on", "gone", "config.json"]


def model_changed(run, root, bases):
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"model": str(bases["biased"])}))
    return ["trained on another", weights_digest(load_model(str(bases["biased"]))[0])[:12]]


@pytest.mark.parametrize("wrong", [unfinished, restored, no_run, damaged, of_another_shape, model_gone, model_changed])
def test_runs_that_cannot_be_exported(toy_run, bases, tmp_path, vgrout, wrong):
    run = shutil.copytree(toy_run()[0], tmp_path / "routeV-s0")
    words = wrong(run, tmp_path, bases)
    before = files(tmp_path)
    for flags in ((), ("--merged",)):
        code, _, err = vgrout("export", run, tmp_path / "out", *flags)
        assert code == 2 and err.startswith("vgrout: ") and err.count("\n") == 1, err
        assert all(word in err for word in words), err
    assert files(tmp_path) == before and not (tmp_path / "out").exists()


def test_a_record_has_no_weights(real, tmp_path):
    pytest.importorskip("duckdb")
    pack(real, tmp_path / "record")
    with pytest.raises(UserError, match="no weights"):
        export(tmp_path / "record", tmp_path / "out", QUIET)


def test_nothing_is_overwritten(toy_run, tmp_path, vgrout):
    folder, _ = toy_run()
    run = shutil.copytree(folder, tmp_path / "run")
    (run / MARK).write_text("as every run's folder has one")
    notes, file, link, other = (tmp_path / name for name in ("notes", "file", "link", "other"))
    notes.mkdir()
    other.mkdir()
    (notes / "mine.txt").write_text("mine")
    (other / RECORD).write_text('{"kind": "of somebody else", "files": {}}')
    file.write_text("mine")
    link.symlink_to(notes)
    (tmp_path / "hollow" / "inner").mkdir(parents=True)
    done, added = tmp_path / "done", tmp_path / "added"
    assert vgrout("export", folder, done)[0] == 0
    shutil.copytree(done, added)
    (added / "mine.txt").write_text("mine")
    before = files(tmp_path)
    for out, flags, words in (
        (notes, (), "in use"),
        (notes, ("--force",), "holds mine.txt"),
        (other, ("--force",), f"holds {RECORD}"),
        (tmp_path / "hollow", ("--force",), "holds a folder"),
        (file, ("--force",), "no folder"),
        (link, ("--force",), "no folder"),
        (run, ("--force",), "holds adapter.safetensors"),
        (done, (), "--force"),
        (added, ("--force",), "holds mine.txt"),
    ):
        code, _, err = vgrout("export", folder, out, *flags)
        assert code == 2 and err.count("\n") == 1 and str(out) in err and words in err, (out, err)
    assert files(tmp_path) == before and (tmp_path / "hollow" / "inner").is_dir()


def test_force_replaces_an_export_alone(toy_run, tmp_path, vgrout):
    folder, _ = toy_run()
    out = tmp_path / "out"
    out.mkdir()
    assert vgrout("export", folder, out)[0] == 0
    assert vgrout("export", folder, out, "--merged", "--force")[0] == 0
    assert (out / "model.safetensors").exists() and not (out / "adapter_config.json").exists()
    assert vgrout("export", folder, out, "--force")[0] == 0
    assert (out / "adapter_config.json").exists() and not (out / "model.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_is_exported_is_not_replaced_by_it(toy_run, tmp_path):
    """A run trained on an exported checkpoint, exported over it."""
    first, _ = toy_run()
    base = tmp_path / "base"
    export(first, base, QUIET, merged=True)
    config = json.loads((first / "config.json").read_text()) | {"model": str(base)}
    second = shutil.copytree(first, tmp_path / "second")
    (second / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="lies in"):
        export(second, base, QUIET, force=True)
    assert (base / "model.safetensors").exists()


def test_whole_or_not_at_all(toy_run, tmp_path, monkeypatch):
    folder, _ = toy_run()
    out = tmp_path / "out"

    def full_disk(path, text):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(export_module, "replace_file", full_disk)
        with pytest.raises(RunFailed, match="No space left"):
            export(folder, out, QUIET)
        assert not list(tmp_path.iterdir())
    export(folder, out, QUIET)
    before = files(out)
    with monkeypatch.context() as broken:
        broken.setattr(export_module, "replace_file", full_disk)
        with pytest.raises(RunFailed, match="No space left"):
            export(folder, out, QUIET, merged=True, force=True)
    assert files(out) == before and [path.name for path in tmp_path.iterdir()] == ["out"]
