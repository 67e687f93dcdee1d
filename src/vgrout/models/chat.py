"""What a model reads and writes as tokens: its chat template, the ends of a turn, prompts and completions.

A prompt and its completion are tokenised apart, in training rows, demonstrations and pairs as in sampling. So a
tokenizer that would merge the end of a prompt with the start of a completion changes nothing, and BOS stands where the
template puts it, for rollouts and pairs alike.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from vgrout.types import Prompt, UserError

# For a base model, which has no template: the system prompt, the user's text and the answer, an empty line after each.
# BOS comes first where the tokenizer puts it before any text.
PLAIN = (
    "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ '\n\n' }}"
    "{% endif %}{% endfor %}"
)
SAMPLE = "def solve(xs, k):\n    return [x + 1 for x in xs[:k] if x != 'a b']  # 1,234 \u00e9\n"  # says how text is cut
SPACE = "\u2581"  # how SentencePiece writes a space


def settle(tokenizer: PreTrainedTokenizerFast, model: PreTrainedModel, template: str) -> None:
    """Give the tokenizer the template to use (a file's; its own; the plain one) and, as its end token, the one with
    which that template ends an answer. Raises UserError for a template that cannot be read or used."""
    if template:
        tokenizer.chat_template = _read(Path(template))
    elif tokenizer.chat_template is None:
        tokenizer.chat_template = _begins(tokenizer) + PLAIN
    if not isinstance(tokenizer.chat_template, str):
        names = ", ".join(sorted(tokenizer.chat_template))
        raise UserError(f"the tokenizer has several chat templates ({names}): give one as a file, --chat-template FILE")
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end token")
    tokenizer.eos_token = _end(tokenizer, model)
    if tokenizer.pad_token_id is None:  # padding is never read: any token will do
        tokenizer.pad_token = tokenizer.eos_token


def chat_facts(tokenizer: PreTrainedTokenizerFast, model: PreTrainedModel) -> Mapping[str, Any]:
    """How the model is talked to, for a run's provenance."""
    template = tokenizer.chat_template
    words = [sorted(tokenizer.get_vocab().items()), tokenizer(SAMPLE, add_special_tokens=False)["input_ids"]]
    return {
        "chat_template_sha256": hashlib.sha256(template.encode()).hexdigest(),
        "chat_template": "plain" if template.endswith(PLAIN) else "its own, or a file",
        "thinking": "off" if "enable_thinking" in template else "no switch",
        "end_tokens": tokenizer.convert_ids_to_tokens(end_tokens(model, tokenizer)),
        "answers_end_with": tokenizer.eos_token,
        "tokenizer_sha256": hashlib.sha256(json.dumps(words).encode()).hexdigest(),
    }


def render(tokenizer: PreTrainedTokenizerFast, prompt: Prompt) -> str:
    """The text of a prompt under the chat template, up to where the answer begins; thinking is off where the template
    has a switch for it. Raises UserError where the template does not take the prompt."""
    chat = [{"role": "system", "content": prompt.system}] if prompt.system else []
    return _apply(tokenizer, [*chat, {"role": "user", "content": prompt.user}], opens=True)


def encode_prompt(tokenizer: PreTrainedTokenizerFast, prompt: Prompt) -> list[int]:
    return tokenizer(render(tokenizer, prompt), add_special_tokens=False)["input_ids"]


def encode_completion(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """The tokens of an answer, its end token last."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if ids and not text.startswith(" ") and tokenizer.convert_ids_to_tokens(ids[0]).startswith(SPACE):
        # The tokenizer puts a space before any text; behind a line break the text begins as it is.
        before, both = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in ("\n", f"\n{text}"))
        if both[: len(before)] == before:
            ids = both[len(before) :]
    return [*ids, tokenizer.eos_token_id]


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Ids of the tokens after which nothing more is sampled."""
    return sorted({tokenizer.eos_token_id, *_configured(model)})


def _configured(model: PreTrainedModel) -> list[int]:
    """The end tokens that the model's files name."""
    config = model.generation_config if model.generation_config is not None else model.config
    own = config.eos_token_id
    return [] if own is None else [own] if isinstance(own, int) else list(own)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the chat template {path}: {getattr(error, 'strerror', None) or error}") from None


def _begins(tokenizer: PreTrainedTokenizerFast) -> str:
    first = tokenizer("x")["input_ids"][:1]
    return "{{ bos_token }}" if tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id] else ""


def _end(tokenizer: PreTrainedTokenizerFast, model: PreTrainedModel) -> str:
    """The end token that the template writes behind an answer; the tokenizer's own where it writes none."""
    ends, mark = {tokenizer.eos_token_id, *_configured(model)}, "answer"
    chat = [{"role": "user", "content": "question"}, {"role": "assistant", "content": mark}]
    text = _apply(tokenizer, chat, opens=False)
    after = tokenizer(text[text.rfind(mark) + len(mark) :], add_special_tokens=False)["input_ids"]
    found = next((token for token in after if token in ends), tokenizer.eos_token_id)
    return tokenizer.convert_ids_to_tokens(found)


def _apply(tokenizer: PreTrainedTokenizerFast, chat: list[dict[str, str]], *, opens: bool) -> str:
    try:
        return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=opens, enable_thinking=False)
    except Exception as error:  # noqa: BLE001 - a template is a program of its own, and raises what it likes
        said = " ".join(str(error).split())[:200]
        roles = " and ".join(m["role"] for m in chat)
        raise UserError(
            f"the chat template does not take {roles} messages: {said}; give another one, --chat-template FILE"
        ) from None
