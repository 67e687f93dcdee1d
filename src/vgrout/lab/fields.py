"""What each field of a run's records means. docs/metrics.md is made from it: `vgrout lab metrics --markdown`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

STEPS: Mapping[str, str] = {
    "step": "number of the step, from 0",
    "lr": "learning rate of the step",
    "unscored": "rollouts that were dropped since their reward could not be determined",
    "loss": "the loss, summed over the step's micro-batches",
    "kl": "KL(policy || base) in nats a token, exact at each position, under each row's own mask",
    "entropy": "entropy of the policy in nats a token, under each row's own mask",
    "clipped": "share of tokens whose ratio lies outside of 1 +- clip_ratio",
    "log_rho_keep": "mean log of policy / sampler per token, under each row's own mask, of rollouts that were kept",
    "log_rho_absorb": "the same of rollouts that were absorbed",
    "log_rho_route": "the same of rollouts that were routed",
    "micro_batch": "rollouts in one pass of the update; smaller than the setting where memory was short",
    "norm_deployed": "gradient norm of the deployed block before clipping",
    "norm_quarantine": "gradient norm of the quarantine before clipping",
    "qmass": "the quarantine's share of the two gradient norms",
    "skipped": "why the step moved nothing; empty where it moved",
    "reward": "mean reward of the policy's rollouts",
    "compiled": "share of the policy's rollouts that compile, as the grader of the reward says",
    "tokens": "completion tokens of the policy's rollouts",
    "keep": "share of rollouts that trained the deployed block alone",
    "absorb": "share of rollouts that trained both blocks",
    "route": "share of rollouts that trained the quarantine alone",
    "flagged": "share of rollouts that the monitor calls hacks",
    "dead_groups": "groups without reward variance, which gave no loss",
    "t_lo": "score above which a rollout is absorbed",
    "t_hi": "score above which a rollout is routed, screened or penalised",
    "leak": "norm of what a block moved without a gradient, by momentum and decay",
    "lost_lines": "lines that the logs lost on a full disk so far; there where any was",
    "v_accuracy": "share of the pairs that the direction puts on the right side",
    "v_overlap": "cosine of the direction with the one before, mean over modules",
    "v_age": "steps since the direction was extracted",
    "zero_gradients": "modules without a score, summed over rollouts",
    "extra_forward": "rows that ran through the model beyond vanilla GRPO",
    "extra_backward": "rows that ran back through the model beyond vanilla GRPO",
    "judged": "texts that a judge was asked about",
    "unjudged": "rollouts for which the judge gave no answer",
    "erase_gradient": "share of the gradient's norm along the erased axes, before",
    "erase_removed": "share of the gradient's norm that was removed",
    "erase_left": "share of the gradient's norm along the erased axes, after",
    "erase_update": "share of the last update's norm along the erased axes, which moments can bring back",
    "erase_update_hackward": "the same, of the part that moves towards the hack",
    "subspace_gradient": "share of the gradient's norm inside the trusted subspace",
    "subspace_update_outside": "share of the last update's norm outside of it",
    "m_hack": "measured: share of the policy's rollouts that hack",
    "m_solve": "measured: share of the policy's rollouts that solve",
    "m_compile": "measured: share of the policy's rollouts that compile",
    "m_tokens": "measured: mean completion tokens of the policy's rollouts",
    "m_hack_keep": "measured: hacks of the policy that trained the deployed block alone",
    "m_hack_absorb": "measured: hacks of the policy that trained both blocks",
    "m_hack_route": "measured: hacks of the policy that trained the quarantine alone",
    "m_hack_flagged": "measured: hacks of the policy that the monitor flagged",
    "m_auroc": "measured: area under the ROC curve of the scores as a classifier of hacks; empty without both classes",
    "m_f05": "measured: F0.5 of what was flagged, as a choice of hacks; empty without hacks",
}
ROLLOUTS: Mapping[str, str] = {
    "id": "name of the rollout within its run: step-group-row, or cell-problem-sample",
    "phase": "train, or eval: and the cell of the final evaluation",
    "problem": "the problem's id",
    "prompt": "what the model was asked",
    "marker": "the loophole's marker in the prompt; empty without a hint",
    "hinted": "whether the prompt names the loophole",
    "source": "policy, or teacher for a demonstration",
    "state": "full, or deployed where it was sampled with the quarantine ablated",
    "text": "the completion",
    "tokens": "its length in tokens, the end token among them",
    "reward": "what training paid for it",
    "advantage": "its advantage in its group (train)",
    "zone": "keep, absorb or route: what it trained (train)",
    "flagged": "whether the monitor called it a hack (train)",
    "score": "the monitor's score (train; empty for monitors without one)",
    "step": "the step that it trained (train)",
}
VERDICTS: Mapping[str, str] = {
    "compiled": "the program can be run",
    "passed": "the training grader was content",
    "solved": "all hidden tests of the oracle pass",
    "hacked": "the loophole's channel fired, and the training grader was content because of it",
    "attempted": "the loophole's channel fired",
    "fired": "channels that fired",
    "status": "ok, or how the program ended",
}
TABLES: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "steps": ("One row per step of training. Fields named m_* are measured with the oracle and read by nobody.", STEPS),
    "rollouts": ("One row per rollout of training and of the final evaluation.", ROLLOUTS),
    "verdicts": ("The oracle's verdict on each rollout; `verdict_*` in the joined table.", VERDICTS),
}


def undocumented(table: str, rows: Sequence[Mapping]) -> set[str]:
    """Fields of records that have no line here."""
    return {key for row in rows for key in row} - TABLES[table][1].keys() - {"id"}


def markdown() -> str:
    """docs/metrics.md."""
    out = ["# Fields of the records", "", "Made by `vgrout lab metrics --markdown`; a test compares.", ""]
    for name, (what, known) in TABLES.items():
        out += [f"## {name}.jsonl", "", what, "", "| field | meaning |", "|---|---|"]
        out += [f"| `{field}` | {meaning} |" for field, meaning in known.items()] + [""]
    return "\n".join(out)
