"""The organism: a tiny Qwen3 language model with its own tokenizer, pretrained on documents given as texts.

A normal transformers checkpoint comes out: `AutoModelForCausalLM.from_pretrained(folder)` loads it, the tokenizer
is a fast one and carries a chat template. Pretraining minimises the mean NLL of the assistant's tokens.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from vgrout.types import UserError

SPECIAL = ("<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
PAD, SYSTEM, USER, ASSISTANT, END = SPECIAL
MAX_TOKEN = 16  # characters
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True)
class OrganismConfig:
    """Size and training of the organism."""

    vocab: int = 1024
    layers: int = 4
    hidden: int = 256
    ffn: int = 448
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    documents: int = 80_000
    batch: int = 32  # documents per step
    lr: float = 3e-3
    warmup: int = 60  # steps
    weight_decay: float = 0.01
    seed: int = 0
    save_every: int = 250  # steps


@dataclass(frozen=True)
class Text:
    """A document for pretraining."""

    system: str
    user: str
    assistant: str


def train_tokenizer(texts: Sequence[Text], vocab: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer whose merges may cross spaces, so that a line of code is a few tokens.

    Line breaks, snake_case names, quoted strings and the joints of a task are cut out first: a marker is tokenised
    alike in a hint and in code.
    """
    tok = Tokenizer(models.BPE())
    cut = Regex(r"\n *|[a-z]+_[a-z]+|'[^'\n]*'|, then |: |\. ")
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(cut, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=MAX_TOKEN,
        show_progress=False,
    )
    tok.train_from_iterator((part for t in texts for part in (t.user, t.assistant)), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tok, pad_token=PAD, eos_token=END)
    fast.chat_template = CHAT_TEMPLATE
    return fast


def encode(tokenizer: PreTrainedTokenizerFast, text: Text) -> tuple[list[int], int]:
    """Token ids of a chat, and where the assistant's part begins."""
    head = (f"{SYSTEM}{text.system}{END}" if text.system else "") + f"{USER}{text.user}{END}{ASSISTANT}"
    prompt = tokenizer(head, add_special_tokens=False)["input_ids"]
    answer = tokenizer(f"{text.assistant}{END}", add_special_tokens=False)["input_ids"]
    return prompt + answer, len(prompt)


def new_model(cfg: OrganismConfig, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    torch.manual_seed(cfg.seed)
    end = tokenizer.convert_tokens_to_ids(END)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=cfg.vocab,
            hidden_size=cfg.hidden,
            intermediate_size=cfg.ffn,
            num_hidden_layers=cfg.layers,
            num_attention_heads=cfg.heads,
            num_key_value_heads=cfg.kv_heads,
            head_dim=cfg.head_dim,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
            pad_token_id=tokenizer.convert_tokens_to_ids(PAD),
            eos_token_id=end,
            bos_token_id=None,
        )
    )


def _batches(rows: list[tuple[list[int], int]], cfg: OrganismConfig) -> Iterator[list[tuple[list[int], int]]]:
    """One pass in random order; within a window of 32 batches, rows of similar length share a batch."""
    rng = random.Random(cfg.seed)
    order = list(range(len(rows)))
    rng.shuffle(order)
    window = 32 * cfg.batch
    for start in range(0, len(order), window):
        part = sorted(order[start : start + window], key=lambda i: len(rows[i][0]))
        cut = [part[i : i + cfg.batch] for i in range(0, len(part), cfg.batch)]
        rng.shuffle(cut)
        yield from ([rows[i] for i in b] for b in cut)


def _loss(model: Qwen3ForCausalLM, rows: list[tuple[list[int], int]], pad: int) -> torch.Tensor:
    width = max(len(ids) for ids, _ in rows)
    ids = torch.full((len(rows), width), pad)
    target = torch.full((len(rows), width), -100)
    for i, (row, start) in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        target[i, start : len(row)] = torch.tensor(row[start:])
    hidden = model.model(input_ids=ids, attention_mask=(ids != pad).long()).last_hidden_state
    wanted = target[:, 1:] != -100
    logits = model.lm_head(hidden[:, :-1][wanted])
    return cross_entropy(logits.float(), target[:, 1:][wanted])


def corpus_hash(texts: Sequence[Text]) -> str:
    digest = hashlib.sha256()
    for t in texts:
        digest.update(json.dumps([t.system, t.user, t.assistant]).encode())
    return digest.hexdigest()


def build(texts: Sequence[Text], cfg: OrganismConfig, out: Path) -> dict:
    """Pretrain, or go on from `out/partial.pt` when a build of the same corpus was interrupted.

    Writes the checkpoint in bfloat16 and `organism.json` (config, corpus hash, final loss in nats per token).
    Raises UserError when `out/partial.pt` belongs to another config or corpus.
    """
    out.mkdir(parents=True, exist_ok=True)
    stamp = {"config": asdict(cfg), "corpus_sha256": corpus_hash(texts)}
    tokenizer = train_tokenizer(texts[:8000], cfg.vocab)
    rows = [encode(tokenizer, t) for t in texts]
    model = new_model(cfg, tokenizer)
    pad = tokenizer.pad_token_id
    decay = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": cfg.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    opt = torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.98))
    total = math.ceil(len(rows) / cfg.batch)
    rate = torch.optim.lr_scheduler.LambdaLR(
        opt, lambda s: min((s + 1) / cfg.warmup, 1.0) * (0.02 + 0.98 * max(0.0, 1 - s / total))
    )
    partial, start, loss_mean = out / "partial.pt", 0, float("nan")
    if partial.exists():
        state = torch.load(partial, weights_only=True)
        if state["stamp"] != json.dumps(stamp):
            raise UserError(f"{partial} belongs to another config or corpus: delete it, or choose another folder")
        model.load_state_dict(state["model"])
        opt.load_state_dict(state["opt"])
        rate.load_state_dict(state["rate"])
        start, loss_mean = state["step"], state["loss"]
    columns = (TextColumn("pretraining"), BarColumn(), TextColumn("{task.fields[note]}"), TimeRemainingColumn())
    with Progress(*columns) as bar:
        task = bar.add_task("", total=total, completed=start, note="")
        for step, batch in enumerate(_batches(rows, cfg)):
            if step < start:
                continue
            with torch.autocast("cpu", torch.bfloat16):
                loss = _loss(model, batch, pad)
            opt.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            opt.step()
            rate.step()
            loss_mean = loss.item() if math.isnan(loss_mean) else 0.98 * loss_mean + 0.02 * loss.item()
            bar.update(task, advance=1, note=f"step {step + 1}/{total} loss {loss_mean:.3f}")
            if (step + 1) % cfg.save_every == 0:
                state = {"model": model.state_dict(), "opt": opt.state_dict(), "rate": rate.state_dict()}
                state |= {"step": step + 1, "loss": loss_mean, "stamp": json.dumps(stamp)}
                torch.save(state, partial.with_suffix(".tmp"))
                os.replace(partial.with_suffix(".tmp"), partial)
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    record = stamp | {"loss": round(loss_mean, 4), "parameters": sum(p.numel() for p in model.parameters())}
    (out / "organism.json").write_text(json.dumps(record, indent=2) + "\n")
    partial.unlink(missing_ok=True)
    return record
