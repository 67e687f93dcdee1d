"""`vgrout export`: what a run ships, as files that other libraries load.

adapter_config.json        a PEFT LoRA: delta W = B A of each Linear, alpha = r, so that nothing scales it
adapter_model.safetensors  A [r, i] and B [o, r] under the names that PEFT gives them
base/                      with the bundled organism, which has no name elsewhere: a copy of it
model.safetensors, ...     with `merged`, instead of all these: W + delta in place of W, configuration and tokenizer
README.md                  the model card
export.json                the same for programs: `live` above all, and the SHA-256 of every other file
.vgrout                    says that vgrout made the folder

The factors are those of adapters/peft.py. An adapter that is as wide as its weights is no LoRA: it ships merged.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from vgrout.adapters import attach
from vgrout.adapters.base import Adapter
from vgrout.adapters.peft import blocks, lora, lora_config, lora_files, lora_rank, off, own_factors, target_modules
from vgrout.arms import ARMS
from vgrout.lab.checkpoint import replace_file, write
from vgrout.lab.evaluate import CELLS, size_note
from vgrout.lab.record import MARK, claim_folder, finished, one_writer
from vgrout.lab.run import pairs_note, sandbox_note
from vgrout.lab.runs import Run, read_run
from vgrout.models.chat import PLAIN
from vgrout.models.load import load_model, model_path, weights_digest
from vgrout.types import RunFailed, State, UserError

RECORD, CARD, BASE, TEMPLATE = "export.json", "README.md", "base", "chat_template.jinja"
KIND, FORMAT = "vgrout export", 1
BUNDLED = "micro"
Dtype = Literal["float32", "bfloat16"]
DTYPES: Mapping[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MEANS: Mapping[State, str] = {  # what is live
    "deployed": "the deployed block alone, the quarantine is ablated",
    "full": "the deployed block and the quarantine",
}
KNOWS = {  # what an arm of each access level was told
    "L0": "nothing",
    "L1": "hand-written text",
    "L2": "a generic judge's opinion",
    "L3": "labels of another environment",
    "L4": "the live oracle",
    "env": "nothing, where there is no loophole",
}


# What ships.


@torch.no_grad()
def merge(model: PreTrainedModel, adapter: Adapter, live: State, dtype: torch.dtype) -> float:
    """Make `model` the plain one whose weights hold the delta, in place: added in float32, then rounded to `dtype`.
    Returns the largest error of a module's delta."""
    error = 0.0
    model.float()
    for name, module in adapter.modules.items():
        a, b = own_factors(module, live)
        weight, before = module.base.weight, module.base.weight.to(torch.float64, copy=True)
        weight += sum(module.delta(which) for which in blocks(live)).to(weight.dtype)
        error = max(error, off(weight.to(dtype).double() - before, b @ a))
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module.base)
    model.to(dtype)
    return error


# The folder.


def check_out(out: Path, sources: tuple[Path, ...], *, force: bool) -> None:
    """Raises UserError where `out` is in use, unless `force` and every file in it is an export's, and none of `sources`
    lies in it."""
    try:
        if out.is_symlink() or (out.exists() and not out.is_dir()):
            raise UserError(f"{out} is no folder: give another one")
        if not out.exists() or not any(out.iterdir()):
            return
        if not force:
            raise UserError(f"{out} is in use: give another folder, or --force to replace an export")
        files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_symlink() or not path.is_dir()}
    except OSError as error:
        raise UserError(f"cannot read {out}: {error.strerror}") from None
    foreign = files - _written(out) - {MARK}
    if foreign or not files:
        raise UserError(f"{out} holds {min(foreign, default='a folder')}, which no export wrote: it is not replaced")
    for source in sources:
        if out.resolve() in (source.resolve(), *source.resolve().parents):
            raise UserError(f"{source} lies in {out}: give another folder")


def _written(out: Path) -> set[str]:
    """The files of an export, as it says itself; none where there is no export."""
    try:
        said = json.loads((out / RECORD).read_text())
        return {*said["files"], RECORD} if said["kind"] == KIND else set()
    except (OSError, ValueError, LookupError, TypeError):
        return set()


def finished_run(folder: Path) -> Run:
    """Raises UserError where `folder` is no finished run with its weights."""
    run = read_run(folder)
    if run.cells is None:
        raise UserError(f"{folder} is not finished: go on with `vgrout train --resume {folder}`")
    if not finished(folder, weights=True):
        raise UserError(f"{folder} is a record, or restored from one: it has no weights to export")
    return run


def loaded(run: Run) -> tuple[PreTrainedModel, PreTrainedTokenizerFast, Adapter]:
    """The run's model with its adapter, and the tokenizer. Raises UserError where the model is gone or another one."""
    cfg = run.cfg
    try:
        model, tokenizer = load_model(cfg.model, dtype=cfg.dtype, template=cfg.chat_template)
    except UserError as error:
        raise UserError(f"{run.folder} was trained on {cfg.model}, which does not load: {error}") from None
    there, here = run.provenance.get("model_sha256"), weights_digest(model)
    if there != here:
        other = f"its weights are {here[:12]}, those of the run were {str(there)[:12]}"
        raise UserError(f"{run.folder} was trained on another {cfg.model}: {other}")
    # Any init will do, one that reads the pairs too: the run's own is in the file.
    adapter = attach(model, cfg.adapter, cfg.rank, cfg.init_seed)
    adapter.load(run.folder / "adapter.safetensors")
    return model, tokenizer, adapter


def export(
    folder: Path,
    out: Path,
    console: Console,
    *,
    full: bool = False,
    merged: bool = False,
    dtype: Dtype = "float32",
    base: str = "",
    force: bool = False,
) -> dict[str, Any]:
    """Write what the run in `folder` ships into `out`, whole or not at all; what export.json says.

    `full`: with the quarantine live. `merged`: a plain checkpoint. `base`: the name of the base model for those who
    load the LoRA. Raises UserError, and RunFailed where it cannot be written.
    """
    run = finished_run(folder)
    cfg = run.cfg
    sources = (folder, *(() if cfg.model == BUNDLED else (Path(cfg.model),)))
    check_out(out, sources, force=force)
    ships: State = "deployed" if ARMS[cfg.arm].ablates else "full"
    live: State = "full" if full else ships
    model, tokenizer, adapter = loaded(run)
    copies = cfg.model == BUNDLED and not base and not merged
    hub = cfg.model != BUNDLED and not Path(cfg.model).is_dir()  # a name, not this machine's copy of it
    named = base or (cfg.model if hub else "")
    home = Path(os.path.abspath(out)) / BASE if copies else model_path(cfg.model).resolve()
    # A template that is not the model's own goes along: the base has none, or another.
    foreign = bool(cfg.chat_template) or tokenizer.chat_template.endswith(PLAIN)
    said: dict[str, Any] = {
        "kind": KIND,
        "format": FORMAT,
        "live": live,
        "ships": ships,
        "form": "merged" if merged else "lora",
        "dtype": dtype,
        "run": run.name,
        "arm": cfg.arm,
        "seed": cfg.seed,
        "steps": cfg.steps,
        "access": run.access,
        "reads_oracle": run.reads_oracle,
        "base": {"model": cfg.model, "loads_from": named or str(home), "named": named or None, "copied": copies},
        "base_dtype": cfg.dtype,
        "chat_template": TEMPLATE if foreign else None,
        "adapter": {"kind": cfg.adapter, "init": cfg.init, "rank_per_block": cfg.rank, "modules": len(adapter.modules)},
        "target_modules": target_modules(adapter),
        "results": run.cells,
        "weights_sha256": run.weights_sha256,
        "provenance": run.provenance,
    }
    if merged:
        rank, error = None, merge(model, adapter, live, DTYPES[dtype])
    else:
        rank = lora_rank(adapter, live, "export it with --merged, or train with a lower --rank")
        tensors, error = lora(adapter, live, rank, DTYPES[dtype])
    said |= {"rank": rank, "delta_error": float(f"{error:.3g}")}
    with placed(out, sources, force=force) as part:
        if merged:
            model.save_pretrained(part)
            tokenizer.save_pretrained(part)
        else:
            config = lora_config(said["base"]["loads_from"], rank, said["target_modules"])
            for name, data in lora_files(tensors, config).items():
                write(part / name, data)
            if foreign:
                replace_file(part / TEMPLATE, tokenizer.chat_template)
        if copies:
            shutil.copytree(model_path(cfg.model), part / BASE)
        _write_words(part, said)
    for line in (*spoken(said), f"{out}: sha256 {said['sha256']}, over what is live and each file's hash"):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return said


def export_adapter(
    adapter: Adapter, out: Path, *, base: str, live: State, dtype: Dtype = "float32", force: bool = False
) -> dict[str, Any]:
    """Write what ships of a model that another loop trained, as a PEFT LoRA folder, whole or not at all; what its
    export.json says. There is no run to tell of: the card says what is live and how to load it.

    `base`: name or folder of the base model. Raises UserError where it is empty, `out` is in use, or the adapter is no
    LoRA, and RunFailed where it cannot be written.
    """
    if not base:
        raise UserError("the base model has no name: say which one it is (base)")
    home = str(Path(base).resolve()) if Path(base).is_dir() else base
    sources = (Path(base),) if Path(base).is_dir() else ()
    check_out(out, sources, force=force)
    rank = lora_rank(adapter, live, "it has no form that PEFT reads")
    tensors, error = lora(adapter, live, rank, DTYPES[dtype])
    said: dict[str, Any] = {
        "kind": KIND,
        "format": FORMAT,
        "live": live,
        "form": "lora",
        "dtype": dtype,
        "base": {"model": base, "loads_from": home, "named": None, "copied": False},
        "target_modules": target_modules(adapter),
        "rank": rank,
        "delta_error": float(f"{error:.3g}"),
    }
    lines = [f"# {live}", "", f"Live in these weights: {MEANS[live]}.", "", "```python", *how_to_load(said), "```", ""]
    with placed(out, sources, force=force) as part:
        for name, data in lora_files(tensors, lora_config(home, rank, said["target_modules"])).items():
            write(part / name, data)
        replace_file(part / CARD, "\n".join(lines))
        _seal(part, said)
    return said


@contextmanager
def placed(out: Path, sources: tuple[Path, ...], *, force: bool) -> Iterator[Path]:
    """A folder beside `out` that takes its place once everything is in it, and else goes. Raises what `check_out`
    does, and RunFailed where it cannot be written."""
    part = Path(os.path.abspath(out))
    part = part.with_name(f".{part.name}.part")
    claim_folder(part, force=True)
    with one_writer(part):
        try:
            yield part
            check_out(out, sources, force=force)
            if out.exists():
                shutil.rmtree(out)
            os.replace(part, out)
        except (OSError, SafetensorError) as error:
            raise RunFailed(f"cannot write {out}: {getattr(error, 'strerror', None) or error}") from None
        finally:
            shutil.rmtree(part, ignore_errors=True)


def _write_words(part: Path, said: dict[str, Any]) -> None:
    """The card and the record, which gets the files' hashes, and one of all that it says."""
    said["files"] = dict(_hashes(part))
    replace_file(part / CARD, card(said))
    _seal(part, said)


def _seal(part: Path, said: dict[str, Any]) -> None:
    """Write the record of all that is in the folder by now."""
    said["files"] = dict(_hashes(part))
    said["sha256"] = sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
    replace_file(part / RECORD, json.dumps(said, indent=2) + "\n")


def _hashes(part: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(part.rglob("*")):
        if path.is_file() and path.name != MARK:
            yield str(path.relative_to(part)), sha256(path.read_bytes()).hexdigest()


# Words.


def spoken(said: Mapping[str, Any]) -> list[str]:
    """What an export says of itself: which block is live first of all."""
    return [
        f"{said['run']}, arm {said['arm']}, access {said['access']}: live: {said['live']}, {MEANS[said['live']]}",
        *notes(said),
        f"{shape(said)}; no module's delta is off by more than {100 * said['delta_error']:.2g} %",
    ]


def notes(said: Mapping[str, Any]) -> list[str]:
    """What whoever uses the export must know of what is live in it, and of the arm."""
    out = []
    if said["live"] != said["ships"]:
        out.append("NOT WHAT SHIPS: the quarantine is live, with what was routed into it.")
    elif said["ships"] == "full":
        out.append(f"{said['arm']} ablates nothing: it ships both blocks.")
    if said["reads_oracle"]:
        out.append(f"{said['arm']} reads the oracle: a ceiling, not a method.")
    return out


def shape(said: Mapping[str, Any]) -> str:
    """The form in words."""
    adapter = said["adapter"]
    on = f"{adapter['modules']} Linears, {said['dtype']}"
    if said["form"] == "merged":
        return f"plain checkpoint, the delta merged into {on}"
    times, rest = divmod(said["rank"], adapter["rank_per_block"])
    why = f" = {times} x {adapter['rank_per_block']}" if not rest else ""
    return f"PEFT LoRA of rank {said['rank']}{why}, on {on}"


def card(said: Mapping[str, Any]) -> str:
    """The model card: what is live, what it is a part of, what it did, how to load it, hashes."""
    base, made, adapter = said["base"], said["provenance"], said["adapter"]
    facts = {
        "live here": said["live"],
        "what the arm ships": said["ships"],
        "arm": said["arm"],
        "access level": f"{said['access']}: told {KNOWS[said['access']]}",
        "reads_oracle": str(said["reads_oracle"]).lower(),
        "seed, steps": f"{said['seed']}, {said['steps']}",
        "form": shape(said),
        "target modules": ", ".join(said["target_modules"]),
        "adapter": f"{adapter['kind']}, init {adapter['init']}, R = {adapter['rank_per_block']} per block",
        "largest error of a delta": f"{100 * said['delta_error']:.2g} %",
        "base model": base["named"] or base["model"],
    }
    warnings = [*notes(said), sandbox_note(made), pairs_note(made), *drifted(made)]
    hashes = {
        "base model's weights (names, shapes, float32 bytes)": made.get("model_sha256"),
        "the run's weights, both blocks": said["weights_sha256"],
        "code that trained": made.get("code_sha256"),
        "pairs": made.get("pairs_sha256"),
        "task": made.get("task_sha256"),
        **{f"`{name}`": digest for name, digest in said["files"].items()},
    }
    lines = [
        "---",
        f"library_name: {'transformers' if said['form'] == 'merged' else 'peft'}",
        "pipeline_tag: text-generation",
        *([f"base_model: {json.dumps(base['named'])}"] if base["named"] else []),
        "tags: [vgrout, gradient-routing, reward-hacking]",
        "---",
        "",
        f"# {said['run']}: {said['live']}",
        "",
        f"Live in these weights: {MEANS[said['live']]}.",
        "".join(f"\n**{note}**\n" for note in warnings if note),
        *_table(("", ""), facts.items()),
        "",
        "## Results",
        "",
        *results(said),
        "",
        "## How to load",
        "",
        "`folder` is the path of this folder.",
        "",
        "```python",
        *how_to_load(said),
        "```",
        "",
        "## Hashes",
        "",
        *_table(("SHA-256 of", ""), ((what, f"`{digest}`") for what, digest in hashes.items() if digest)),
        "",
        f"`{RECORD}` holds all this for programs. Made by vGROUT {made.get('vgrout', '')}.",
        "",
    ]
    return "\n".join(lines)


def drifted(made: Mapping[str, Any]) -> list[str]:
    return [f"The run went on at step {d['step']} with other {', '.join(d['changed'])}." for d in made.get("drift", [])]


def results(said: Mapping[str, Any]) -> list[str]:
    """The run's own evaluation, cell by cell, and which cells are of what is live here."""
    cells = said["results"]
    known = {cell.name: cell for cell in CELLS}
    oracle = all("hack" in cell for cell in cells.values())
    head = ("hack %", "solve %") if oracle else ("mean reward",)
    rows = []
    for name, cell in cells.items():
        state = known[name].state if said["ships"] == "deployed" else "full"
        rates = [interval(cell[what], 100, 0) for what in ("hack", "solve")] if oracle else [_reward(cell)]
        rows.append((name, state, *rates, "yes" if state == said["live"] else "no"))
    first = next(iter(cells.values()))
    size = first["hack"] if oracle else first["reward"]
    return [
        *_table(("cell", "live", *head, "live here"), rows),
        "",
        f"{size['n']} rollouts over {size['clusters']} problems a cell, sampled from the run's own weights in "
        f"{said.get('base_dtype', 'float32')}; "
        "[95 % interval], clustered by problem, for this run alone: it says nothing about other seeds. "
        + size_note(cells),
    ]


def interval(rate: Mapping[str, Any], times: float, digits: int) -> str:
    mean, low, high = (f"{times * rate[key]:.{digits}f}" for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def _reward(cell: Mapping[str, Any]) -> str:
    return interval(cell["reward"], 1, 3)


def _table(head: tuple[str, ...], rows: Any) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(map(str, line))} |" for line in lines]


def how_to_load(said: Mapping[str, Any]) -> list[str]:
    """Python that makes `model` and `tokenizer`; `folder` is where the export lies."""
    if said["form"] == "merged":
        return [
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            f'model = AutoModelForCausalLM.from_pretrained(folder, dtype="{said["dtype"]}")',
            "tokenizer = AutoTokenizer.from_pretrained(folder)",
        ]
    trained, template = said.get("base_dtype", "float32"), []
    if said.get("chat_template"):
        template = [
            "from pathlib import Path",
            f'tokenizer.chat_template = Path(folder, "{TEMPLATE}").read_text()  # as in training',
        ]
    name = f'f"{{folder}}/{BASE}"' if said["base"]["copied"] else json.dumps(said["base"]["loads_from"])
    return [
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        f'base = AutoModelForCausalLM.from_pretrained({name}, dtype="{trained}")  # as it was trained and evaluated',
        "model = PeftModel.from_pretrained(base, folder)",
        f"tokenizer = AutoTokenizer.from_pretrained({name})",
        *template,
    ]
