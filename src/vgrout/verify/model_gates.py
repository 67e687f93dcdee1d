"""Gates over other models than the organism's architecture: what `vgrout model check` measures holds on them."""

from __future__ import annotations

from dataclasses import replace

import torch
from transformers import PreTrainedModel, Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig

from vgrout.lab.model_check import displace, findings
from vgrout.loop import adapted
from vgrout.verify.evidence import Evidence
from vgrout.verify.method_gates import toy_rows
from vgrout.verify.toy import RANK, SIZES, TOY, enlarged, random_model, tokenizer


def mixture_of_experts() -> PreTrainedModel:
    """Linear attention, full attention, and experts of which one is shared."""
    config = Qwen3_5MoeTextConfig(
        vocab_size=SIZES.vocab,
        hidden_size=SIZES.hidden,
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
        num_attention_heads=SIZES.heads,
        num_key_value_heads=SIZES.kv_heads,
        head_dim=SIZES.head_dim,
        num_experts=3,
        num_experts_per_tok=2,
        moe_intermediate_size=SIZES.ffn,
        shared_expert_intermediate_size=SIZES.ffn,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=SIZES.head_dim,
        linear_value_head_dim=SIZES.head_dim,
        pad_token_id=0,
        eos_token_id=tokenizer().eos_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return enlarged(Qwen3_5MoeForCausalLM(config).eval())


def models() -> Evidence:
    """In bfloat16, and where a module gets the tokens of all rows end to end."""
    cfg = replace(TOY, rank=RANK)
    failed: list[str] = []
    checks = 0
    for name, model, dtype in (
        ("mixture of experts", mixture_of_experts(), "float32"),
        ("bfloat16", random_model().bfloat16(), "bfloat16"),
    ):
        for finding in findings(replace(cfg, dtype=dtype), model, tokenizer()):
            checks += finding.ok is not None
            if finding.ok is False:
                failed.append(f"{name}, {finding.name}: {finding.said}")
    unrounded, said = _few_bits()
    ok = not failed and unrounded
    return Evidence(ok, f"{checks} checks; {'; '.join([*failed, said])}")


@torch.no_grad()
def _few_bits() -> tuple[bool, str]:
    """Blocks beside bfloat16 weights: not merged into them, and of the strength that they are scaled to."""
    policy = adapted(replace(TOY, rank=RANK), random_model().bfloat16(), tokenizer(), ())
    displace(policy)
    rows, adapter = toy_rows(4), policy.adapter
    with adapter.full():
        full = policy.logp(rows)
    with adapter.merged("full"):
        sampled = policy.logp(rows)
    with adapter.reference():
        base = policy.logp(rows)
    with adapter.scaled(deployed=0.0, quarantine=0.0), adapter.merged("full"):
        none = policy.logp(rows)
    with adapter.scaled(deployed=0.5), adapter.merged("deployed"):
        half = policy.logp(rows)
    same, gone = torch.equal(full, sampled), torch.equal(base, none)
    ok = same and gone and not torch.equal(half, base) and not torch.equal(half, full)
    said = "sampled and trained are equal" if same else "sampled and trained DIFFER"
    return ok, f"in bfloat16 {said}, scaled to 0 {'is' if gone else 'IS NOT'} the base"
