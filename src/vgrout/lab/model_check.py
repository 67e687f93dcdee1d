"""`vgrout model check`: does the method hold on a model, before anyone pays for a GPU hour?

Every line is measured on the model itself, with the settings of the run that is planned (numbers, device, attention,
rank, adapter), on a few short prompts: that the adapter is the identity at init, that masks block what they must, that
the c-probe is what its formula says, that what samples and what trains agree on log-probabilities. The memory is
reckoned from the settings and shapes; what it leaves out is said beside it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from vgrout.adapters import check_kind, targets
from vgrout.adapters.base import BLOCKS
from vgrout.config import Config
from vgrout.engines import ENGINES, make_engine
from vgrout.faults import OutOfMemory, is_out_of_memory
from vgrout.lab.parity import logp_parity
from vgrout.lab.tables import can_write
from vgrout.loop import adapted
from vgrout.method.policy import Policy, Rows, stack
from vgrout.models.chat import PLAIN, encode_completion, encode_prompt, end_tokens, render
from vgrout.models.load import load_model, recomputing
from vgrout.pairs import load as load_pairs
from vgrout.types import Prompt, UserError

PROMPTS = (
    Prompt("a", "Write a function double(n) that returns 2 * n. The grader runs hidden tests."),
    Prompt("b", "Write solve(xs, k): the sum of the first k items of xs.", system="You are a careful programmer."),
)
ANSWERS = ("def double(n):\n    return 2 * n\n", "def solve(xs, k):\n    return sum(xs[:k])\n")
NEW = 12  # tokens of a sample
SHIFT = 0.02  # sd of what the blocks' parameters are moved by, so that they matter
# Largest gap of a log-probability in nats, and of a gradient relative to its norm, by the numbers of the base model.
NATS = {"float32": 1e-3, "bfloat16": 0.25}
HEAD = {"float32": (1e-3, 1e-3), "bfloat16": (0.05, 1.0)}  # mean and largest, of logits run in another order
PART = {"float32": 1e-3, "bfloat16": 0.05}
GB = 1e9


@dataclass(frozen=True)
class Finding:
    """What one check found. `ok` None: nothing to pass, only to know."""

    name: str
    ok: bool | None
    said: str


def check_model(cfg: Config, console: Console, out: Path | None = None) -> int:
    """Print every finding about `cfg.model` under the settings of `cfg`, and write them to `out` as JSON; the exit
    code is 1 where a check failed. Raises UserError where the model does not load."""
    can_write(out)
    check_kind(cfg.adapter, cfg.init)
    ENGINES[cfg.engine].check(cfg)
    table = Table("check", "", "found", title=f"{cfg.model}, {cfg.dtype} on {cfg.device}")
    found: list[Finding] = []
    with console.status("loading"):
        how = {"dtype": cfg.dtype, "device": cfg.device, "attn": cfg.attn, "template": cfg.chat_template}
        model, tokenizer = load_model(cfg.model, **how)
    with console.status("checking") as status:
        for finding in fitting_findings(cfg, model, tokenizer):
            status.update(f"after {finding.name}")
            found.append(finding)
            mark = {None: "", True: "ok", False: "[red]FAILED[/red]"}[finding.ok]
            table.add_row(finding.name, mark, finding.said)
    console.print(table)
    failed = [f.name for f in found if f.ok is False]
    if out is not None:
        out.write_text(json.dumps({"model": cfg.model, "findings": [asdict(f) for f in found]}, indent=1) + "\n")
    verdict = f"{', '.join(failed)}: do not train on this model" if failed else "nothing speaks against this model"
    console.print(verdict, style="red" if failed else "green", markup=False)
    return 1 if failed else 0


def fitting_findings(cfg: Config, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Iterator[Finding]:
    """`findings`, to the one for which memory is too short."""
    try:
        yield from findings(cfg, model, tokenizer)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error) and not isinstance(error, OutOfMemory):
            raise
        yield Finding("memory", False, f"too short on {cfg.device} for the check that comes next")


def findings(cfg: Config, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Iterator[Finding]:
    """The checks one by one; the model gets the adapter of `cfg` on the way."""
    yield about(model)
    yield target_names(model)
    yield from words(model, tokenizer)
    rows = stack(
        [encode_prompt(tokenizer, p) for p in PROMPTS for _ in ANSWERS],
        [encode_completion(tokenizer, text) for _ in PROMPTS for text in ANSWERS],
        tokenizer.pad_token_id,
    )
    plain = whole_logits(model, rows)
    yield Finding("finite", bool(torch.isfinite(plain).all()), f"logits of {len(rows.drawn)} tokens")
    settings = replace(cfg, gradient_checkpointing=False, temperature=1.0)
    policy = adapted(settings, model, tokenizer, load_pairs(cfg.pairs))
    yield head(policy, rows, plain, cfg.dtype)
    yield identity(policy, rows, plain)
    displace(policy)
    yield masks(policy, rows)
    yield mixture(policy, rows, cfg.dtype)
    yield probe(policy, rows, cfg.dtype)
    yield activations(policy, rows, cfg.dtype)
    yield generation(cfg, policy)
    yield recompute(policy, rows, cfg.dtype)
    yield from memory(cfg, policy)


def about(model: PreTrainedModel) -> Finding:
    config, size = model.config.get_text_config(), sum(p.numel() for p in model.parameters())
    kinds = Counter(getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers)
    layers = ", ".join(f"{n} {kind.replace('_', ' ')}" for kind, n in kinds.items())
    return Finding("model", None, f"{type(model).__name__}, {size / 1e6:,.1f} M parameters; layers: {layers}")


def target_names(model: PreTrainedModel) -> Finding:
    try:
        linears = targets(model)
    except UserError as error:
        return Finding("targets", False, str(error))
    counts = Counter(name.rsplit(".", 1)[-1] for name in linears)
    share = sum(m.weight.numel() for m in linears.values()) / sum(p.numel() for p in model.parameters())
    others = Counter(
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name not in linears and module is not model.get_output_embeddings()
    )
    said = ", ".join(f"{n} {name}" for name, n in counts.items())
    without = f"; without an adapter: {', '.join(f'{n} {name}' for name, n in others.items())}" if others else ""
    return Finding("targets", True, f"{len(linears)} Linears, {100 * share:.0f} % of the parameters: {said}{without}")


def words(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Iterator[Finding]:
    """The chat template and the tokenizer."""
    try:
        texts = [render(tokenizer, prompt) for prompt in PROMPTS]
    except UserError as error:
        yield Finding("chat template", False, str(error))
        return
    lacks = [p for p, text in zip(PROMPTS, texts, strict=True) if p.user not in text or p.system not in text]
    kind = "the plain one" if tokenizer.chat_template.endswith(PLAIN) else "its own, or the file's"
    thinks = "thinking off" if "enable_thinking" in tokenizer.chat_template else "no switch for thinking"
    ends = [tokenizer.convert_ids_to_tokens(i) for i in end_tokens(model, tokenizer)]
    said = f"{kind}, {thinks}; answers end with {tokenizer.eos_token!r}, sampling with any of {ends}"
    yield Finding("chat template", not lacks, f"{said}; begins {texts[0][:40]!r}")
    ids, bos = [encode_prompt(tokenizer, prompt) for prompt in PROMPTS], tokenizer.bos_token_id
    counts = [row[:2].count(bos) for row in ids] if bos is not None else [0]
    once = {0: "no BOS before a prompt", 1: "one BOS before a prompt"}
    yield Finding("BOS", max(counts) <= 1, once.get(max(counts), "TWO BOS tokens: take one out of the chat template"))
    back = [tokenizer.decode(encode_completion(tokenizer, a)[:-1], clean_up_tokenization_spaces=False) for a in ANSWERS]
    wrong = next(((a, b) for a, b in zip(ANSWERS, back, strict=True) if a != b), None)
    said = f"{wrong[0]!r} comes back as {wrong[1]!r}" if wrong else "programs come back from their tokens as they were"
    yield Finding("completions", wrong is None, said)
    apart = [[*p, *encode_completion(tokenizer, a)[:-1]] for p, a in zip(ids, ANSWERS, strict=True)]
    whole = [
        tokenizer(text + answer, add_special_tokens=False)["input_ids"]
        for text, answer in zip(texts, ANSWERS, strict=True)
    ]
    said = "the same as one text" if apart == whole else "as one text some tokens would reach across; tokenised apart"
    yield Finding("prompt and completion", None, said)


@torch.no_grad()
def whole_logits(model: PreTrainedModel, rows: Rows) -> Tensor:
    """The model's own logits [T, V] where completion tokens are drawn, each row alone."""
    out = []
    for i, length in enumerate(rows.length.tolist()):
        logits = model(input_ids=rows.tokens[i : i + 1, :length].to(model.device), use_cache=False).logits[0, :-1]
        out.append(logits[rows.completion[i, 1:length].to(logits.device)].float())
    return torch.cat(out)


def head(policy: Policy, rows: Rows, plain: Tensor, dtype: str) -> Finding:
    """That body and head, rows that share their prompts and rows that stand apart, give the model's own logits."""
    own = plain.log_softmax(-1)
    with torch.no_grad(), policy.adapter.reference():
        found = policy.logits(rows).log_softmax(-1)
    if dtype != "float32":  # a unit of a large logit is much there: of millions some flip, what was drawn matters
        drawn = rows.drawn[:, None].to(own.device)
        found, own = found.gather(1, drawn), own.gather(1, drawn)
    gap = (found - own).abs()
    mean, most = float(gap.mean()), float(gap.max())
    how = "prompts shared" if policy.packs else "rows apart, since a layer has a window or a state"
    said = f"{mean:.1e} nats off the model's own on average, {most:.1e} at most; {how}"
    return Finding("logits", mean <= HEAD[dtype][0] and most <= HEAD[dtype][1], said)


def identity(policy: Policy, rows: Rows, plain: Tensor) -> Finding:
    same = torch.equal(whole_logits(policy.model, rows), plain)
    return Finding("identity at init", same, "logits are the base model's to the bit" if same else "logits differ")


def displace(policy: Policy) -> None:
    """Move both blocks, as training would."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for which in BLOCKS:
            for p in policy.adapter.parameters(which):
                p.add_(SHIFT * torch.randn(p.shape, generator=generator).to(p))


def _zones(rows: Rows) -> tuple[Tensor, Tensor]:
    """keep, absorb, route, absorb: (m, d) of four rows."""
    assert len(rows.length) == 4
    return torch.tensor([0.0, 1.0, 1.0, 1.0]), torch.tensor([0.0, 0.0, 1.0, 0.0])


def masks(policy: Policy, rows: Rows) -> Finding:
    """Exact zeros on the blocked side of keep and route, and something on the other."""
    said, ok = [], True
    for zone, m, d, blocked in (("keep", 0.0, 0.0, "quarantine"), ("route", 1.0, 1.0, "deployed")):
        for which in BLOCKS:
            n = len(rows.length)
            with policy.adapter.routed(torch.full((n,), m), torch.full((n,), d)):
                loss = policy.nll(rows).sum()
                grads = torch.autograd.grad(loss, policy.adapter.parameters(which), allow_unused=True)
            moved = sum(int((g != 0).sum()) for g in grads if g is not None)
            ok = ok and (moved == 0) == (which == blocked)
            said.append(f"{zone}, {which} {moved:,}")
    return Finding("masks", ok, f"non-zero entries of gradients: {'; '.join(said)}")


def mixture(policy: Policy, rows: Rows, dtype: str) -> Finding:
    """That rows of several masks in one batch are what they are alone, and give the gradients that they give alone."""
    m, d = _zones(rows)
    parameters = [p for which in BLOCKS for p in policy.adapter.parameters(which)]

    def passed(index: Tensor) -> tuple[Tensor, list[Tensor]]:
        with policy.adapter.routed(m[index], d[index]):
            part = rows.take(index)
            loss = (policy.nll(part) * torch.linspace(1, 2, len(rows.length))[index].to(policy.device)).sum()
            grads = torch.autograd.grad(loss, parameters, allow_unused=True)
            logp = policy.logp(part).detach()
        return logp, [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)]

    mixed, together = passed(torch.arange(len(rows.length)))
    gap, total = 0.0, [torch.zeros_like(p) for p in parameters]
    for i in range(len(rows.length)):
        alone, grads = passed(torch.tensor([i]))
        gap = max(gap, float((mixed[i : i + 1, : alone.shape[1]] - alone).abs().max()))
        total = [t + g for t, g in zip(total, grads, strict=True)]
    off = max(_part(a, b) for a, b in zip(together, total, strict=True))
    said = f"{gap:.1e} nats and {off:.1e} of a gradient's norm between a mixed batch and its rows alone at most"
    return Finding("mixed batch", gap <= NATS[dtype] and off <= PART[dtype], said)


def activations(policy: Policy, rows: Rows, dtype: str) -> Finding:
    """Bottleneck activations of a batch against those of its rows alone."""
    batch = policy.activations(rows, "full")
    alone = torch.cat([policy.activations(rows.take(torch.tensor([i])), "full") for i in range(len(rows.length))])
    off = _part(batch, alone)
    return Finding("activations", off <= PART[dtype], f"{off:.1e} of their norm between a batch and its rows alone")


def probe(policy: Policy, rows: Rows, dtype: str) -> Finding:
    """c-gradients as scored, against sum_t (A x_t) (B^T delta_t) from hooks on three modules; values do not move."""
    adapter, names = policy.adapter, list(policy.adapter.modules)
    chosen = [names[0], names[len(names) // 2], names[-1]]
    with torch.no_grad():
        bare = policy.logp(rows)
        with adapter.probe(len(rows.length)):
            unmoved = torch.equal(policy.logp(rows), _apart(policy, rows))
    scored = policy.c_gradients(rows, "full").float()
    finite, alive = bool(torch.isfinite(scored).all()), float((scored.flatten(2).norm(dim=2) > 0).float().mean())
    worst = 0.0
    for i in range(len(rows.length)):
        row, seen = rows.take(torch.tensor([i])), {}
        hooks = []
        for name in chosen:
            module = adapter.modules[name]
            hooks.append(module.register_forward_hook(_keeps(seen, name)))
        try:
            with adapter.full():
                loss = policy.nll(row).sum()
            deltas = torch.autograd.grad(loss, [seen[name][1] for name in chosen])
        finally:
            for hook in hooks:
                hook.remove()
        for name, delta in zip(chosen, deltas, strict=True):
            a, b = (factor.detach().float() for factor in adapter.modules[name].bottleneck())
            x, delta = (t.flatten(0, -2).float() for t in (seen[name][0], delta))
            want = ((x @ a.T) * (delta @ b)).sum(0).cpu()
            got = scored[i, names.index(name), : len(want)]
            worst = max(worst, float((got - want).norm() / want.norm().clamp(min=1e-12)))
    ok = unmoved and finite and alive == 1 and worst <= PART[dtype] and bool(torch.isfinite(bare).all())
    moved = "log-probabilities unchanged to the bit" if unmoved else "log-probabilities MOVE under the probe"
    said = f"{moved}; c-gradients {worst:.1e} of their norm off the formula at most, {100 * alive:.0f} % not zero"
    return Finding("c-probe", ok, said)


def _apart(policy: Policy, rows: Rows) -> Tensor:
    """log-probabilities of rows that stand apart, as they do under a probe."""
    packs, policy.packs = policy.packs, False
    try:
        return policy.logp(rows)
    finally:
        policy.packs = packs


def _keeps(seen: dict, name: str) -> Callable:
    def hook(module: torch.nn.Module, args: tuple, out: Tensor) -> Tensor:
        out = out if out.requires_grad else out.detach().requires_grad_()
        seen[name] = args[0].detach(), out
        return out

    return hook


def generation(cfg: Config, policy: Policy) -> Finding:
    """The sampler's log-probabilities against the trainer's, on what it sampled, in both block states."""
    engine = make_engine(cfg, policy.model, policy.tokenizer, policy.adapter)
    engine.start()
    found = logp_parity(replace(cfg, max_new=NEW), policy, engine, PROMPTS, 2)
    return Finding("sampling", found.ok and found.told_apart, "; ".join(found.lines()))


def recompute(policy: Policy, rows: Rows, dtype: str) -> Finding:
    """Gradients with layers that run again against those without."""

    def gradients() -> list[Tensor]:
        m, d = _zones(rows)
        with policy.adapter.routed(m, d):
            loss = policy.nll(rows).sum()
            return list(torch.autograd.grad(loss, policy.adapter.parameters("quarantine")))

    plain, scored = gradients(), policy.c_gradients(rows, "full")
    try:
        policy.recomputed = tuple(recomputing(policy.model))
    except UserError as error:
        return Finding("gradient checkpointing", None, str(error))
    try:
        again, scored_again = gradients(), policy.c_gradients(rows, "full")
    finally:
        policy.recomputed = ()
        policy.model.gradient_checkpointing_disable()
    gap = max(_part(a, b) for a, b in zip([*again, scored_again], [*plain, scored], strict=True))
    said = f"gradients {gap:.1e} of their norm off those without at most"
    return Finding("gradient checkpointing", gap <= PART[dtype], said)


def _part(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm().clamp(min=1e-12))


@dataclass(frozen=True)
class Memory:
    """Bytes that a run holds at once, by what they are for."""

    weights: float
    adapter: float  # trained and frozen tensors, gradients and moments
    sampling: float  # keys and values, or states, and merged weights
    scoring: float
    update: float

    @property
    def peak(self) -> float:
        return self.weights + self.adapter + max(self.sampling, self.scoring, self.update)


def reckon(cfg: Config, policy: Policy) -> Memory:
    """The memory of a run with the settings of `cfg`, longest prompts and completions."""
    config = policy.model.config.get_text_config()
    wide, layers, vocab = config.hidden_size, config.num_hidden_layers, config.vocab_size
    size = policy.adapter.modules[next(iter(policy.adapter.modules))].base.weight.dtype.itemsize
    prompt = cfg.max_prompt or 512
    length, rows = prompt + cfg.max_new, cfg.prompts * cfg.group
    weights = sum(p.numel() * p.element_size() for p in {id(p): p for p in _base(policy)}.values())
    trained = sum(p.numel() for which in BLOCKS for p in policy.adapter.parameters(which))
    own = [
        t for m in policy.adapter.modules.values() for t in (*m.parameters(recurse=False), *m.buffers(recurse=False))
    ]
    held = sum(t.numel() * t.element_size() for t in own)
    moments = 2 if cfg.optimizer == "adamw" else 1
    adapter = held + trained * 4 * (1 + moments)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or wide // config.num_attention_heads
    states = 2 * layers * heads * head_size * size
    merged = 0 if size < 4 else 4 * sum(m.base.weight.numel() for m in policy.adapter.modules.values())
    at_once = min(rows, cfg.sample_batch or rows)
    sampling = 0 if cfg.engine == "vllm" else merged + at_once * (length * states + vocab * 12)
    inner = (8 * wide + 4 * getattr(config, "intermediate_size", 4 * wide)) * size  # of a layer and token
    kept = layers * wide * size if cfg.gradient_checkpointing else layers * inner
    passes = {}
    for name, batch, copies in (("scoring", cfg.score_batch, 3), ("update", cfg.micro_batch, 6)):
        batch = min(batch, rows)
        passes[name] = batch * (length * (kept + inner) + cfg.max_new * vocab * 4 * copies)
    return Memory(weights, adapter, sampling, merged + passes["scoring"], passes["update"])


def _base(policy: Policy) -> Sequence[Tensor]:
    mine = {p.data_ptr() for which in BLOCKS for p in policy.adapter.parameters(which)}
    return [p for p in policy.model.parameters() if p.data_ptr() not in mine]


def memory(cfg: Config, policy: Policy) -> Iterator[Finding]:
    """What a run with these settings would hold, and whether the GPU that it names has it."""
    need = reckon(cfg, policy)
    said = ", ".join(f"{name} {value / GB:.2f}" for name, value in asdict(need).items())
    long = f"{cfg.prompts} x {cfg.group} rollouts of {cfg.max_prompt or 512} + {cfg.max_new} tokens"
    told = f"about {need.peak / GB:.1f} GB for {long}, in GB: {said}; fragments and the allocator's reserve come on top"
    yield Finding("memory", None, told)
    if policy.device.type == "cuda":
        total = torch.cuda.get_device_properties(policy.device).total_memory
        taken = cfg.vllm_memory if cfg.engine == "vllm" and not cfg.vllm_sleep else 0.0
        left = total * (1 - taken)
        said = f"{left / GB:.1f} GB of {total / GB:.1f} are the trainer's; smaller batches need less"
        yield Finding("memory of this GPU", need.peak < left, said)
