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
from vgrout.lab.run import MICRO, Workshop
from vgrout.lab.runs import Run
from vgrout.loop import backward, collate
from vgrout.method.policy import Policy, Rows
from vgrout.types import Decision, Prompt, Rollout, UserError

CLASSES = ("hack", "other")
ABSORBED = "unflagged hack"  # trained both blocks: which of them takes it up?


def rebuilt(row: Mapping[str, Any], policy: Policy) -> Rollout:
    """A rollout from its line in the log, tokenised again."""
    prompt = Prompt(row["problem"], row["prompt"], marker=row["marker"], hinted=row["hinted"])
    tokens = tuple(encode_completion(policy.tokenizer, row["text"]))[: row["tokens"]]
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
                    old[some, : taken.tokens.shape[1]] = policy.logp(taken)
    batch = replace(batch, logp_old=old)
    advantage = torch.tensor([float(row["advantage"]) for row in rows])
    # A group without variance has no advantage anywhere, and gave no loss.
    live = torch.tensor([bool(advantage[batch.group == g].any()) for g in batch.group.tolist()])
    hacked = torch.tensor([bool(row[VERDICT + "hacked"]) for row in rows])
    decision = zones(rows)
    chosen: dict[str, Tensor] = {"all": torch.ones_like(hacked), "hack": hacked, "other": ~hacked}
    chosen[ABSORBED] = hacked & decision.absorb
    out: dict[str, Any] = {}
    for name, mask in chosen.items():
        for which in BLOCKS:
            for p in policy.adapter.parameters(which):
                p.grad = None
        backward(cfg, policy, batch, replace(decision, weight=mask.float()), advantage, live)
        out[name] = {"rollouts": int(mask.sum()), **norms(policy)}
    return out


class Gradients(OnWeights):
    name = "gradients"
    title = "Which block learns from hacks"
    what = (
        "Gradient norms of the deployed block and the quarantine, from the rollouts of one step that the oracle calls "
        "hacks and from the others, and the quarantine's share of each; means over checkpoints and seeds. Absorption: "
        "the quarantine's share of the gradient of hacks that were not flagged and trained both blocks; without any "
        "absorption both blocks get half."
    )
    needs = "finished runs with their weights and a checkpoint before the last step, of arms that only route or absorb"

    def make(self, run: Path, cfg: Config, shop: Workshop) -> dict[str, Any]:
        arm = ARMS[cfg.arm]
        if cfg.env != MICRO or not {*hooks(arm)} <= {"route", "begin"} or arm.action not in ("-", "route"):
            raise UserError(f"{run} is of {cfg.arm}: gradients are made again for arms that only route or absorb")
        by_step: dict[int, list[dict]] = {}
        for row in with_verdicts(run):
            if row["phase"] == "train":
                by_step.setdefault(row["step"], []).append(row)
        policy, steps = shop.policy, []
        mine = policy.adapter.tensors()
        for checkpoint in sorted(whole(run / FOLDER), key=lambda c: c.step):
            if checkpoint.step not in by_step:
                continue
            with torch.no_grad():
                for name, tensor in part(checkpoint.state, "adapter.").items():
                    mine[name].copy_(tensor)
            steps.append({"step": checkpoint.step, **at_step(cfg, policy, by_step[checkpoint.step])})
        if not steps:
            raise UserError(f"{run} has no checkpoint before its last step")
        return {"steps": steps}

    def of(self, runs: Sequence[Run], base: Cells | None) -> Shown | None:
        made = dict((run.name, result) for run, result in self.made(runs))
        rows, data = [], []
        for label, group in by_label([run for run in runs if run.name in made]).items():
            steps = [step for run in group for step in made[run.name]["steps"]]
            cells, told = [], {}
            for name in CLASSES:
                mean = {which: average([s[name][which] for s in steps if s[name]["rollouts"]]) for which in BLOCKS}
                share = _share(mean["quarantine"], mean["deployed"])
                cells += [_said(mean["deployed"], 4), _said(mean["quarantine"], 4), _said(share, 2)]
                told[name] = mean | {"share": share}
            index = average([_share(s[ABSORBED]["quarantine"], s[ABSORBED]["deployed"]) for s in steps])
            rows.append([marked(group[0]), f"{len(group)} x {len(steps) // len(group)}", *cells, _said(index, 2)])
            data.append({"arm": label, "seeds": [run.seed for run in group], **told, "absorption": index})
        head = ("arm", "seeds x steps")
        for name in CLASSES:
            head += (f"{name}: deployed", "quarantine", "share")
        return Shown((*head, "absorption"), rows, data) if rows else None


def _share(quarantine: float | None, deployed: float | None) -> float | None:
    total = (quarantine or 0.0) + (deployed or 0.0)
    return None if quarantine is None or not total else quarantine / total


def _said(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
