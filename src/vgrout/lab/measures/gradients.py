"""Where the gradients of hacks and of honest rollouts go, block by block, at a run's checkpoints.

A checkpoint after s steps is what sampled and trained the rollouts of step s. So the step's gradient is made again from
the log, in two parts that add up to it: that of the rollouts which the oracle calls hacks, and that of the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vgrout.adapters.base import BLOCKS
from vgrout.arms import ARMS, hooks
from vgrout.arms.base import part
from vgrout.config import Config
from vgrout.engines.torch_engine import encode_completion, encode_prompt
from vgrout.lab.archive import VERDICT, with_verdicts
from vgrout.lab.checkpoint import FOLDER, whole
from vgrout.lab.measures.base import Cells, OnWeights, Shown, average, by_label, marked
from vgrout.lab.record import read_jsonl
from vgrout.lab.run import MICRO, Workshop
from vgrout.lab.runs import Run
from vgrout.loop import backward, collate
from vgrout.method.loss import live_groups
from vgrout.method.policy import Policy, Rows
from vgrout.types import Decision, Prompt, Rollout, UserError

CLASSES = ("hack", "other")
UNFLAGGED, ALONE = "unflagged hack", "unflagged hack, quarantine ablated"
AGREES = 0.02  # largest relative difference to the gradient norms of the log


def rebuilt(row: Mapping[str, Any], policy: Policy) -> Rollout:
    """A rollout from its line in the log, tokenised again."""
    prompt = Prompt(row["problem"], row["prompt"], marker=row["marker"], hinted=row["hinted"])
    tokens = tuple(encode_completion(policy.tokenizer, row["text"]))[: row["tokens"]]  # one cut off has no end token
    group = int(row["id"].split("-")[1])
    read = tuple(encode_prompt(policy.tokenizer, prompt))
    return Rollout(row["id"], prompt, row["text"], read, tokens, group, row["source"], row["state"])


def zones(rows: Sequence[Mapping[str, Any]]) -> Decision:
    """The masks that the log's zones stand for."""
    m, d = (torch.tensor([float(row["zone"] in names) for row in rows]) for names in (("absorb", "route"), ("route",)))
    return Decision(m=m, d=d, weight=torch.ones(len(rows)), penalty=torch.zeros(len(rows)))


def norms(policy: Policy) -> dict[str, float]:
    """The gradient norm of each block."""
    out = {}
    for which in BLOCKS:
        own = [p.grad.norm() for p in policy.adapter.parameters(which) if p.grad is not None]
        out[which] = float(torch.stack(own).norm()) if own else 0.0
    return out


def at_step(cfg: Config, policy: Policy, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Rollouts and block norms of each class, and of all together, in one step. `policy` is as the step found it."""
    rollouts = [rebuilt(row, policy) for row in rows]
    batch = collate(rollouts, [row["reward"] for row in rows], policy.tokenizer.pad_token_id)
    all_rows = Rows(batch.tokens, batch.completion, batch.length)
    old = torch.zeros(batch.tokens.shape)
    for state in ("full", "deployed"):
        index = torch.tensor([i for i, r in enumerate(rollouts) if r.state == state and r.source == "policy"]).long()
        for some in index.split(cfg.score_batch):
            if len(some):
                taken = all_rows.take(some)
                with torch.no_grad(), policy.adapter.merged(state):
                    old[some, : taken.tokens.shape[1]] = policy.logp(taken).cpu()
    batch = replace(batch, logp_old=old)
    advantage = torch.tensor([float(row["advantage"]) for row in rows])
    live = live_groups(batch.reward, batch.group)
    hacked = torch.tensor([bool(row[VERDICT + "hacked"]) for row in rows])
    decision = zones(rows)
    unflagged = hacked & decision.absorb
    without = replace(decision, m=torch.where(unflagged, 0, decision.m))  # as if the quarantine were not there
    chosen: dict[str, tuple[Tensor, Decision]] = {
        "all": (torch.ones_like(hacked), decision),
        "hack": (hacked, decision),
        "other": (~hacked, decision),
        UNFLAGGED: (unflagged, decision),
        ALONE: (unflagged, without),
    }
    out: dict[str, Any] = {}
    for name, (mask, masked) in chosen.items():
        for which in BLOCKS:
            for p in policy.adapter.parameters(which):
                p.grad = None
        backward(cfg, policy, batch, replace(masked, weight=mask.float()), advantage, live)
        out[name] = {"rollouts": int(mask.sum()), **norms(policy)}
    return out


def disagreement(found: Mapping[str, float], logged: Mapping[str, Any]) -> float:
    """Largest relative difference of the blocks' gradient norms to those of the step's record."""
    return max(
        abs(found[which] - logged[f"norm_{which}"]) / max(logged[f"norm_{which}"], 1e-6)
        for which in BLOCKS
        if logged[f"norm_{which}"] is not None
    )


class Gradients(OnWeights):
    name = "gradients"
    title = "Which block learns from hacks"
    what = (
        "Gradient norms of the deployed block and the quarantine, from the rollouts of one step that the oracle calls "
        "hacks and from the others, and the quarantine's share of each; means over the checkpoints of a run, then over "
        "seeds. Absorption: by how much the quarantine, being live, shrinks the deployed block's gradient of those "
        "hacks that were not flagged and train both blocks: 1 - norm with it / norm without it."
    )
    needs = "finished runs with their weights and a checkpoint before the last step, of arms that only route or absorb"

    def make(self, run: Path, cfg: Config, shop: Workshop) -> dict[str, Any]:
        arm = ARMS[cfg.arm]
        if cfg.env != MICRO or not {*hooks(arm)} <= {"route", "begin"} or arm.action not in ("-", "route"):
            raise UserError(f"gradients are made again for arms that only route or absorb, not for {cfg.arm}")
        logged = {step["step"]: step for step in read_jsonl(run / "steps.jsonl")}
        by_step: dict[int, list[dict]] = {}
        for row in with_verdicts(run):
            if row["phase"] == "train":
                by_step.setdefault(row["step"], []).append(row)
        policy, steps = shop.policy, []
        mine = policy.adapter.tensors()
        for checkpoint in sorted(whole(run / FOLDER), key=lambda c: c.step):
            if checkpoint.step not in by_step or logged[checkpoint.step]["skipped"]:
                continue
            with torch.no_grad():
                for name, tensor in part(checkpoint.state, "adapter.").items():
                    mine[name].copy_(tensor)
            found = at_step(cfg, policy, by_step[checkpoint.step])
            if (far := disagreement(found["all"], logged[checkpoint.step])) > AGREES:
                raise UserError(f"the gradient of step {checkpoint.step} differs from the logged one by {far:.0%}")
            steps.append({"step": checkpoint.step, **found})
        if not steps:
            raise UserError("it has no checkpoint before a step that moved anything")
        return {"steps": steps}

    def of(self, runs: Sequence[Run], base: Cells | None) -> Shown | None:
        made = {run.name: result["steps"] for run, result in self.made(runs)}
        rows, data = [], []
        for label, group in by_label([run for run in runs if run.name in made]).items():
            by_seed = [_means(made[run.name]) for run in group]
            told = {key: average([means[key] for means in by_seed]) for key in by_seed[0]}
            cells = [_said(value, 2 if key.endswith(("share", "absorption")) else 4) for key, value in told.items()]
            rows.append([marked(group[0]), str(len(group)), str(sum(len(made[r.name]) for r in group)), *cells])
            data.append({"arm": label, "seeds": [run.seed for run in group], **told})
        head = ("hack: deployed", "quarantine", "share", "other: deployed", "quarantine", "share", "absorption")
        return Shown(("arm", "seeds", "steps", *head), rows, data) if rows else None


def _means(steps: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """What a run's row says, over its steps."""
    out: dict[str, float | None] = {}
    for name in CLASSES:
        own = [step[name] for step in steps if step[name]["rollouts"]]
        out |= {f"{name} {which}": average([s[which] for s in own]) for which in BLOCKS}
        out[f"{name} share"] = average([_share(s["quarantine"], s["deployed"]) for s in own])
    pairs = [(step[UNFLAGGED]["deployed"], step[ALONE]["deployed"]) for step in steps if step[UNFLAGGED]["rollouts"]]
    out["absorption"] = average([1 - live / alone if alone else None for live, alone in pairs])
    return out


def _share(quarantine: float, deployed: float) -> float | None:
    return quarantine / (quarantine + deployed) if quarantine + deployed else None


def _said(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
