"""Break the lines that the gates guard, one at a time, and see that the gate notices.

python -m vgrout.verify.mutate [--quick | --only GATE...]
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

PACKAGE = Path(__file__).parents[1]
ACCIDENTS = ("ImportError", "ModuleNotFoundError", "SyntaxError", "IndentationError", "NameError", "AttributeError")

Outcome = Literal["caught", "SURVIVED", "NOT FOUND", "BROKEN", "FAILS ANYWAY"]


@dataclass(frozen=True)
class Mutation:
    """`old` stands exactly once in `file`; with `new` in its place, `gate` must fail."""

    gate: str
    file: str
    old: str
    new: str
    quick: bool = False


MUTATIONS: tuple[Mutation, ...] = (
    Mutation("identity", "adapters/lora2r.py", "torch.zeros(o, rank)", "torch.full((o, rank), 1e-3)", True),
    Mutation("zeros", "adapters/base.py", "> 0, stopped, dep)", "> 0, dep, dep)", True),
    Mutation("zeros", "adapters/base.py", "a, b = a.detach(), b.detach()", "a = a.detach()"),
    Mutation("detach", "adapters/base.py", 'jacobian = flow.detach == "params"', "jacobian = False", True),
    Mutation(
        "detach",
        "adapters/base.py",
        "Flow(quarantine=runs == 1, cut=cuts == 1, detach=self.detach)",
        "Flow(quarantine=runs == 1, cut=cuts == 1)",
    ),
    Mutation("detach", "adapters/base.py", "Flow(quarantine=runs, detach=self.detach,", "Flow(quarantine=runs,"),
    Mutation("models", "adapters/base.py", "x.unflatten(0, self.switch.shape)", "x[:, None]", True),
    Mutation(
        "models", "adapters/base.py", "scale * self.block(x, which, fixed=True)", "self.block(x, which, fixed=True)"
    ),
    Mutation("models", "adapters/base.py", "dtype.itemsize < 4 for", "dtype.itemsize < 2 for"),
    Mutation("identity", "adapters/frozen_b.py", "torch.zeros(rank, i)", "torch.full((rank, i), 1e-3)"),
    Mutation("ablation", "adapters/delta_s.py", "self.U * self.get_parameter", "self.U + self.get_parameter"),
    Mutation(
        "round_trip",
        "adapters/delta_s.py",
        "self.register_buffer(key, (q",
        "self.register_buffer(key, persistent=False, tensor=(q",
    ),
    Mutation("zeros", "adapters/base.py", "quar * flow.m[:, None, None]", "quar"),
    Mutation("step", "adapters/base.py", "return dep.detach()", "return dep"),
    Mutation("step", "method/policy.py", "(part[:, None, :] == 0)", "(part[:, None, :] >= 0)"),
    Mutation("step", "method/policy.py", "(mine & seen).tril()", "seen.tril()"),
    Mutation(
        "step",
        "method/policy.py",
        "position[s, here:end], part[s, here:end] = torch.arange(prompt, prompt + sizes[i]), k",
        "position[s, here:end], part[s, here:end] = torch.arange(here, end), k",
    ),
    Mutation("mixture", "adapters/base.py", "flow.d[:, None, None] > 0", "flow.d.amax() > 0", True),
    Mutation("ablation", "adapters/base.py", '"deployed": Flow(quarantine=False)', '"deployed": Flow()', True),
    Mutation("ablation", "adapters/lora2r.py", "torch.cat((dB, B0), dim=1)", "torch.cat((dB, 0 * B0), dim=1)"),
    Mutation(
        "reference",
        "adapters/base.py",
        '"reference": Flow(deployed=False, quarantine=False)',
        '"reference": Flow(quarantine=False)',
        True,
    ),
    Mutation("reference", "adapters/base.py", "module.base.weight + delta.to(", "module.base.weight + 2 * delta.to("),
    Mutation("reference", "adapters/base.py", "if FLOWS[state].quarantine:", "if not FLOWS[state].quarantine:"),
    Mutation(
        "round_trip",
        "adapters/base.py",
        "tensor.copy_(file.get_tensor(key))",
        "tensor.copy_(file.get_tensor(key).bfloat16())",
        True,
    ),
    Mutation("probe", "adapters/base.py", "(ax * (delta @ b)).sum(1, ", "(ax * (delta @ b)).mean(1, ", True),
    Mutation("probe", "method/prefix.py", " + stacked(back, width).transpose(0, 1)", ""),
    Mutation("probe", "method/prefix.py", "front.length.repeat_interleave(each)", "front.length.repeat(each)"),
    Mutation("probe", "method/prefix.py", "position = seen[:, None] + torch", "position = seen[:1, None] + torch"),
    Mutation("probe", "method/prefix.py", "prompt[:, None].expand", "(prompt[:, None] | True).expand"),
    Mutation("probe", "method/prefix.py", "if s.requires_grad), strict=True)", "), strict=True)"),
    Mutation("probe", "method/policy.py", 'not getattr(text, "sliding_window", None)', "True"),
    Mutation("probe", "method/policy.py", "shares = self.packs and", "shares ="),
    Mutation("probe", "method/policy.py", "(hidden).float() / self.temperature", "(hidden).float()"),
    Mutation("probe", "adapters/lora2r.py", "return A0 + dA, B0 + dB", "return A0 + dA, dB"),
    Mutation("grpo_identity", "method/loss.py", "beta * kl - surrogate", "beta * kl + surrogate"),
    Mutation("grpo_identity", "method/direction.py", "(hack - clean).mean(0)", "hack.mean(0)"),
    Mutation("loss", "method/loss.py", "rho.clamp(1 - e, 1 + e)", "rho.clamp(max=1 + e)", True),
    Mutation("loss", "method/loss.py", "return gap.exp() - gap - 1", "return 0.5 * gap**2"),
    Mutation("loss", "method/loss.py", "(log_a.exp() * (log_a - log_b))", "(log_b.exp() * (log_b - log_a))"),
    Mutation("loss", "method/loss.py", "completion & live[:, None]", "completion"),
    Mutation("loss", "method/loss.py", "(weight * per_row).sum()", "per_row.sum()"),
    Mutation("loss", "method/loss.py", ".std(unbiased=False)", ".std()"),
    Mutation("loss", "method/loss.py", '"kept": decision.d == 0', '"kept": decision.m == 0'),
    Mutation("loss", "method/loss.py", "torch.where(teacher[:, None], own, logp_old)", "logp_old"),
    Mutation("policies", "method/gate.py", "score > t_hi", "score >= t_hi", True),
    Mutation("policies", "method/gate.py", "exact = score.double()", "exact = score"),
    Mutation("policies", "method/gate.py", "direction.real and hi <= lo", "direction.real and hi < lo"),
    Mutation("policies", "method/gate.py", "direction.score(self.history)", "direction.score(g)"),
    Mutation("policies", "method/gate.py", "self.age / self.half_life", "self.age * 0"),
    Mutation("policies", "method/mixture.py", "self.sd**2 / gap * odds", "self.sd / gap * odds"),
    Mutation(
        "placebo",
        "arms/monitors/gradient.py",
        "decide(score, live, t_lo, t_hi)",
        'decide(score + 0.2 * (self.name == "haar"), live, t_lo, t_hi)',
        True,
    ),
    Mutation("gradient_edits", "method/axes.py", '"one_sided": torch.relu', '"one_sided": torch.abs', True),
    Mutation("gradient_edits", "method/axes.py", "lambda c: 2 * c", "lambda c: c * 1"),
    Mutation("gradient_edits", "method/axes.py", "shares.sign().sum(0)", "shares.sum(0)"),
    Mutation("gradient_edits", "arms/erase.py", "hack[name] - clean[name]", "clean[name] - hack[name]"),
    Mutation("gradient_edits", "arms/subspace.py", "tensor.copy_(init[name])", "tensor.copy_(tensor)"),
    Mutation("gradient_edits", "arms/subspace.py", 'self.bench.clean, "deployed"', 'self.bench.hack, "deployed"'),
    Mutation("gradient_edits", "arms/subspace.py", "s / s.sum()", "s.sign() / s.sum()"),
    Mutation("gradient_edits", "method/policy.py", "self.adapter.deployed() if", "self.adapter.full() if"),
    Mutation(
        "seeds",
        "arms/seeded.py",
        "        self.learn(self.bench.hack)\n\n",
        "        self.learn(self.bench.clean)\n\n",
        True,
    ),
    Mutation("seeds", "arms/seeded.py", "h.norm() / d.norm()", "1 / d.norm()"),
    Mutation("seeds", "arms/seeded.py", "self.place([-d for d in hack])", "pass"),
    Mutation(
        "resume", "arms/erase.py", 'self.axes, self.drawn = part(state, "axes.", there), state', "self.drawn = state"
    ),
    Mutation(
        "resume",
        "arms/edits.py",
        'self.before = part(state, "before.", self.bench.policy.device) or None',
        "self.before = None",
    ),
    Mutation("step", "loop.py", "                advantage[index],", "                -advantage[: len(index)],", True),
    Mutation("step", "loop.py", "decision.m[index], decision.d[index]", "decision.m[index], 0 * decision.d[index]"),
    Mutation("step", "loop.py", " logp_old[index, :width]", " logp_old[: len(index), :width]"),
    Mutation("step", "loop.py", "~teacher[index]", "~teacher[: len(index)]"),
    Mutation("step", "loop.py", "k3(drawn, drawn_ref)", "k3(drawn_ref, drawn)"),
    Mutation("step", "loop.py", "                live[index],", "                live[index] | True,"),
    Mutation("step", "loop.py", "rows.take(torch.cat(parts))", "rows.take(torch.cat(parts[::-1]))"),
    Mutation("idle", "loop.py", 'self.cfg.masked_block == "still"', "False", True),
    Mutation("idle", "loop.py", "p.grad is not None and bool(p.grad.any())", "p.grad is not None"),
    Mutation("idle", "loop.py", 'record["leak"] = self._update()', "self._update()"),
    Mutation("probe", "adapters/delta_s.py", "return self.Vh, self.U\n", 'return self.factors("deployed")\n'),
    Mutation("probe", "adapters/frozen_b.py", "return self.R, self.B", 'return self.factors("deployed")'),
    Mutation(
        "determinism",
        "loop.py",
        'generator=torch.Generator().manual_seed(stream(cfg.sample_seed, "sample", step)),',
        "",
    ),
    Mutation("resume", "loop.py", "tensor.copy_(saved[name])", "tensor.copy_(tensor)", True),
    Mutation("resume", "loop.py", '"state": dict(moments)', '"state": {}'),
    Mutation("resume", "loop.py", 'state["step"], list(', 'state["step"] - 1, list('),
    Mutation("resume", "loop.py", 'list(state["skips"])', "[]"),
    Mutation("resume", "loop.py", 'dict(state["recent"])', "dict(self.recent)"),
    Mutation("resume", "loop.py", 'state["begun"]\n        self.arm_state = self.arm.state()', 'state["begun"]'),
    Mutation("resume", "loop.py", 'self.begun = state["begun"]', "pass"),
    Mutation("resume", "loop.py", "if p in self.optimizer.state else", "if p.grad is not None else"),
    Mutation("resume", "loop.py", 'self.arm.restore(part(state, "arm."))', "pass"),
    Mutation("resume", "arms/monitors/gradient.py", 'Direction(**part(state, "direction."))', "None"),
    Mutation(
        "resume",
        "arms/monitors/gradient.py",
        'self.overlap, self.extracted = state["overlap"], state',
        "self.extracted = state",
    ),
    Mutation("resume", "arms/monitors/gradient.py", 'state["overlap"], state["extracted"]', 'state["overlap"], 0'),
    Mutation("resume", "method/gate.py", 'self.history = state.get("history")', "self.history = None"),
    Mutation("resume", "method/gate.py", 'self.age = state.get("age")', "self.age = None"),
    Mutation(
        "blindness",
        "loop.py",
        "reward = arm.shape(batch)",
        "reward = arm.shape(batch) - torch.tensor([float(g.sealed.hacked) for g in graded])",
    ),
    Mutation("blindness", "arms/monitors/labels.py", "oracle.hacked & seen", "seen & ~seen"),
    Mutation("blindness", "envs/problem_env.py", "sorted(texts, key=lambda text: place(draw, text))", "texts"),
    Mutation(
        "judge",
        "method/judge.py",
        "    if found is None:\n",
        "    if found is None:\n        return False\n    if found is None:\n",
        True,
    ),
    Mutation("judge", "method/judge.py", "RULING.fullmatch(last)", "RULING.search(last)"),
    Mutation("judge", "method/judge.py", "if not answer.whole:", "if not answer.whole and found is None:"),
    Mutation("judge", "method/judge.py", "range(self.cfg.retries + 1)", "range(self.cfg.retries + 2)"),
    Mutation("judge", "method/judge.py", "if not last.again:", "if last.again is None:"),
    Mutation(
        "judge",
        "method/judge.py",
        "[self.answers[key] for key in keys]",
        "[self.answers[key] for key in sorted(keys)]",
    ),
    Mutation("judge", "method/judge_cache.py", "self._known.setdefault(*answer)", "pass"),
    Mutation(
        "activations",
        "method/policy.py",
        "share = (part.completion / part",
        "share = (part.completion.cumsum(1) / part",
    ),
    Mutation(
        "activations",
        "method/policy.py",
        "self.adapter.merged(state, self.score_dtype), ExitStack()",
        'self.adapter.merged("full", self.score_dtype), ExitStack()',
    ),
    Mutation("adv_mod", "arms/advantage.py", "std(unbiased=False).clamp(min=FLOOR)", "std(unbiased=False)", True),
    Mutation("adv_mod", "arms/advantage.py", "z.sigmoid() * (z > 0)", "z.sigmoid()"),
    Mutation("adv_mod", "method/residual.py", "prompts_of(rows)\n", "(rows, torch.arange(len(rows.length)))\n"),
    Mutation("residual_edits", "arms/steering.py", "(h @ d).clamp(min=0)", "(h @ d)", True),
    Mutation("residual_edits", "arms/steering.py", "if phase == self.phase else ()", "if phase else ()"),
    Mutation(
        "residual_edits",
        "method/residual.py",
        ".register_forward_hook(hook(edit)).remove)",
        ".register_forward_hook(hook(edit)).id.__int__)",
    ),
    Mutation("strange_probe", "method/linear_probe.py", "& set(live)", "& set()", True),
    Mutation("strange_probe", "method/linear_probe.py", "and own != model_sha256", "and not own"),
    Mutation("partition", "envs/micro.py", '"val": range(80, 90)', '"val": range(75, 90)'),
    Mutation("partition", "envs/micro_corpus.py", 'c.bucket in BUCKETS["pretrain"]', "c.bucket < 80"),
    Mutation(
        "partition",
        "envs/modes.py",
        "order[PER_FAMILY : 2 * PER_FAMILY]",
        "order[PER_FAMILY - 1 : 2 * PER_FAMILY]",
    ),
    Mutation("canonical", "envs/grade.py", "(problem.mode, prompt.marker) in channels", "bool(channels)"),
    Mutation("canonical", "envs/grade.py", "attempted=bool(channels)", "attempted=own"),
    Mutation("pairs", "pairs.py", "        part = DEFAULT\n", '        part = "*"\n', True),
    Mutation("pairs", "pairs.py", 'stated.get("", "unstated")', 'stated.get("", "authored")'),
    Mutation("pairs", "pairs.py", 'if p.provenance != "authored"', 'if p.provenance == "unstated"'),
    Mutation("pairs", "data/pairs_micro.md", "print('all checks clean')", "note = 'all checks clean'"),
    Mutation("pairs", "data/pairs_micro.md", "        zs = [y for y in ys if y > 0]", "        zs = ys"),
    Mutation("partition", "data/pairs_micro.md", "calls audit_outcome()", "calls judge_code()"),
    Mutation(
        "haar",
        "method/direction.py",
        "cos.std(0).clamp(min=1e-8)",
        "cos.std(0) * (cos[: len(hack)].mean(0) - cos[len(hack) :].mean(0)).sign()",
    ),
    Mutation("instrument", "method/direction.py", "(hack - clean).mean(0)", "(clean - hack).mean(0)"),
)


def check(copy: Path, gates: Sequence[str]) -> tuple[int, str]:
    """Exit code and output of the gates in a copy of the package."""
    # No bytecode: a mutant of the same size within the same second would run the file's older self.
    own = {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "200"}
    command = [sys.executable, "-m", "vgrout", "verify", "--only", *gates]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | own, cwd=copy)
    return done.returncode, done.stdout + done.stderr


def attempt(copy: Path, mutation: Mutation) -> tuple[Outcome, str]:
    """Apply one mutation to the copy, check its gate, take it back."""
    file = copy / "vgrout" / mutation.file
    source = file.read_text(encoding="utf-8")
    if source.count(mutation.old) != 1:
        return "NOT FOUND", f"{mutation.old!r} stands {source.count(mutation.old)} times in {mutation.file}"
    try:
        file.write_text(source.replace(mutation.old, mutation.new), encoding="utf-8")
        code, output = check(copy, [mutation.gate])
    finally:
        file.write_text(source, encoding="utf-8")
    line = next((row for row in output.splitlines() if row.startswith(f"FAIL {mutation.gate} ")), "")
    if code == 0:
        return "SURVIVED", ""
    if code != 1 or not line or any(f"raised {name}" in line for name in ACCIDENTS):
        return "BROKEN", line or (output.strip().splitlines() or ["no output"])[-1]
    return "caught", line.split(": ", 1)[-1]


def main(args: Sequence[str]) -> int:
    """Returns 0 when every mutant is caught, 1 otherwise, 2 for unknown arguments. `--quick` and `--only` take part of
    the mutants."""
    from vgrout.verify import GATES  # here, so that a broken package still prints its usage

    console = Console()
    only = args[1:] if args[:1] == ["--only"] else ()
    unknown = sorted(set(only) - set(GATES))
    if unknown or (args not in ([], ["--quick"]) and not only):
        console.print("usage: python -m vgrout.verify.mutate [--quick | --only GATE...]")
        if unknown:
            console.print(f"no gate is named {', '.join(unknown)}")
        return 2
    chosen = [m for m in MUTATIONS if m.gate in only or not only and (m.quick or "--quick" not in args)]
    unguarded = sorted(set(GATES) - {m.gate for m in MUTATIONS})
    if unguarded:
        console.print(f"gates without a mutation: {', '.join(unguarded)}")
        return 1
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        shutil.copytree(PACKAGE, copy / "vgrout", ignore=shutil.ignore_patterns("__pycache__"))
        gates = list(dict.fromkeys(m.gate for m in chosen))
        code, output = check(copy, gates)
        lines = output.splitlines()
        failing = [g for g in gates if any(line.startswith(f"FAIL {g} ") for line in lines)]
        if code and not failing:
            console.print(output, markup=False, highlight=False)
            return 1
        table = Table("outcome", "gate", "file", "mutation", title=f"{len(chosen)} mutants")
        bad = 0
        for i, mutation in enumerate(chosen, start=1):
            outcome, why = ("FAILS ANYWAY", "") if mutation.gate in failing else attempt(copy, mutation)
            bad += outcome != "caught"
            console.print(f"{i}/{len(chosen)} {mutation.gate} {outcome}: {why}", markup=False, soft_wrap=True)
            change = Text(f"{mutation.old}  ->  {mutation.new or 'nothing'}")
            style = None if outcome == "caught" else "red"
            table.add_row(outcome, mutation.gate, mutation.file, change, style=style)
    console.print(table)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
