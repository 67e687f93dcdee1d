"""Small checkpoints of several architectures, each in a folder with a tokenizer and a chat template of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeTextConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

TEXTS = [
    "Write a function double(n) that returns 2 * n. The grader runs hidden tests.",
    "def solve(xs, k):\n    total = 0\n    for x in xs[:k]:\n        total += x\n    return total\n",
    "class Solution:\n    def answer(self, n):\n        return [i for i in range(n) if i % 2 == 0]\n",
]
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
}
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
    "{% elif m['role'] == 'system' %}{{ '<<SYS>>' + m['content'] + '<</SYS>>' }}"
    "{% else %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endif %}{% endfor %}"
)
TURNS = (  # the system prompt has no turn of its own
    "{{ bos_token }}{% set ns = namespace(first='') %}{% for m in messages %}{% if m['role'] == 'system' %}"
    "{% set ns.first = m['content'] + '\n\n' %}{% else %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else 'user') + '\n' + ns.first + m['content'] }}"
    "{{ '<end_of_turn>\n' }}{% set ns.first = '' %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


def byte_level(special: list[str]) -> Tokenizer:
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    )
    return words


def sentencepiece(special: list[str]) -> Tokenizer:
    """Puts a space before any text, as SentencePiece does, and BOS."""
    words = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    words.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=360, special_tokens=[*special, *bytes_], max_token_length=6)
    words.train_from_iterator([text.replace("\n", "") for text in TEXTS], trainer)
    first = words.token_to_id("<s>")
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", first)])
    return words


def _qwen3(words: dict) -> PreTrainedModel:
    return Qwen3ForCausalLM(Qwen3Config(**SHAPE, **words))


def _llama(words: dict) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SHAPE, **words))


def _gemma3(words: dict) -> PreTrainedModel:
    kinds = ["sliding_attention", "full_attention"]
    config = Gemma3TextConfig(**SHAPE, **words, sliding_window=8, layer_types=kinds, query_pre_attn_scalar=8)
    return Gemma3ForCausalLM(config)


def _qwen3_moe(words: dict) -> PreTrainedModel:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "decoder_sparse_step": 1}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SHAPE, **words, **experts))


def _qwen3_5_moe(words: dict) -> PreTrainedModel:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    linear = {
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
    }
    shape = {key: value for key, value in SHAPE.items() if key != "intermediate_size"}
    config = Qwen3_5MoeTextConfig(**shape, **words, **experts, **linear, shared_expert_intermediate_size=24)
    return Qwen3_5MoeForCausalLM(config)


# name -> (model, tokenizer, special tokens, BOS, EOS, the end of a turn where it is another, template)
KINDS: dict[str, tuple[Callable[[dict], PreTrainedModel], Callable, list[str], str | None, str, str | None, str | None]]
KINDS = {
    "qwen3": (_qwen3, byte_level, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], None, "<|im_end|>", None, CHATML),
    "llama": (_llama, sentencepiece, ["<unk>", "<s>", "</s>"], "<s>", "</s>", None, INST),
    "gemma3": (
        _gemma3,
        byte_level,
        ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"],
        "<bos>",
        "<eos>",
        "<end_of_turn>",
        TURNS,
    ),
    "qwen3_moe": (_qwen3_moe, byte_level, ["<|endoftext|>"], None, "<|endoftext|>", None, None),
    "qwen3_5_moe": (_qwen3_5_moe, byte_level, ["<|endoftext|>", "<|im_end|>"], None, "<|im_end|>", None, CHATML),
}


def make(kind: str, folder: Path) -> Path:
    """A checkpoint of a kind in `folder`: random weights, large enough that every layer matters."""
    model_of, words_of, special, bos, eos, turn, template = KINDS[kind]
    raw = words_of(special)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token=bos, eos_token=eos, clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = template
    ids = {"vocab_size": raw.get_vocab_size(), "eos_token_id": raw.token_to_id(eos), "pad_token_id": 0}
    ids |= {"bos_token_id": raw.token_to_id(bos) if bos else None}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_of(ids)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(4)
    ends = [raw.token_to_id(token) for token in (eos, turn) if token]
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=0, bos_token_id=ids["bos_token_id"])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
