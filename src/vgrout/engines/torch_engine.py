"""Rollouts with plain torch: merged weights, one prefill per prompt, finished rows leave the batch.

Token t of row i is drawn by inverse CDF from uniform u[i, t]; the uniforms depend on the seed alone, so two arms
that still have equal weights sample equal rollouts. Where memory is short the rows are sampled in smaller batches, each
with its own uniforms: its logits are the same up to rounding, so that another token comes out only where the uniform
lies within that rounding of a token's bound.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedTokenizerFast

from vgrout.engines.base import Engine, Sample, by_state
from vgrout.faults import fitting
from vgrout.types import Prompt, State


def encode_prompt(tokenizer: PreTrainedTokenizerFast, prompt: Prompt) -> list[int]:
    chat = [{"role": "system", "content": prompt.system}] if prompt.system else []
    chat.append({"role": "user", "content": prompt.user})
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def encode_completion(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]


class TorchEngine(Engine):
    """The default: the training model itself samples, on merged weights."""

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        counts: Sequence[int],
        *,
        state: State | Sequence[State],
        max_new: int,
        temperature: float,
        uniforms: Float[Tensor, "N T"],
    ) -> list[Sample]:
        samples: list[Sample] = []
        for live, asked, rows in by_state(state, counts):
            samples += self._in_state(prompts[asked], counts[asked], live, max_new, temperature, uniforms[rows])
        return samples

    def _in_state(self, prompts, counts, state, max_new, temperature, uniforms) -> list[Sample]:
        owner = [p for p, count in enumerate(counts) for _ in range(count)]  # the prompt of each row
        if not owner:
            return []

        def in_batches(size: int) -> list[tuple[list[int], list[float]]]:
            out: list[tuple[list[int], list[float]]] = []
            with self.adapter.merged(state):
                for start in range(0, len(owner), size):
                    rows = Counter(owner[start : start + size])  # how many of each prompt, in order
                    u = uniforms[start : start + size]
                    found = self._decode([prompts[p] for p in rows], list(rows.values()), max_new, temperature, u)
                    out += zip(*found, strict=True)
            return out

        samples = []
        for row, logp in fitting(len(owner), "sampling", in_batches):
            text = self.tokenizer.decode(row, skip_special_tokens=True)
            samples.append(Sample(tuple(row), tuple(logp), text))
        return samples

    def _decode(self, prompts, counts, max_new, temperature, uniforms):
        pad, end = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        width = max(map(len, prompts))
        ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts])
        seen = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        cache = DynamicCache(config=self.model.config)
        position = (seen.cumsum(1) - 1).clamp(min=0)
        out = self.model.model(input_ids=ids, attention_mask=seen, position_ids=position, past_key_values=cache)
        repeat = torch.tensor(list(counts))
        hidden = out.last_hidden_state[:, -1].repeat_interleave(repeat, 0)
        alive = torch.arange(len(prompts)).repeat_interleave(repeat)
        cache.batch_select_indices(alive)
        seen, place = seen[alive], position[alive, -1]
        rows = torch.arange(len(alive))  # which sample each live row is
        tokens: list[list[int]] = [[] for _ in range(len(alive))]
        logps: list[list[float]] = [[] for _ in range(len(alive))]
        for t in range(max_new):
            logp = torch.log_softmax(self.model.lm_head(hidden).float() / temperature, dim=-1)
            token = self._draw(logp, uniforms[rows, t])
            chosen = logp.gather(1, token[:, None])[:, 0]
            for row, tok, lp in zip(rows.tolist(), token.tolist(), chosen.tolist(), strict=True):
                tokens[row].append(tok)
                logps[row].append(lp)
            live = (token != end).nonzero()[:, 0]
            if len(live) == 0 or t == max_new - 1:
                break
            if len(live) < len(token):
                cache.batch_select_indices(live)
                seen, place, rows, token = seen[live], place[live], rows[live], token[live]
            place = place + 1
            seen = torch.cat((seen, seen.new_ones(len(seen), 1)), 1)
            out = self.model.model(
                input_ids=token[:, None], attention_mask=seen, position_ids=place[:, None], past_key_values=cache
            )
            hidden = out.last_hidden_state[:, -1]
        return tokens, logps

    @staticmethod
    def _draw(logp: Float[Tensor, "N V"], u: Float[Tensor, N]) -> Int[Tensor, N]:
        cdf = logp.double().exp().cumsum(-1)
        return (cdf < (u.double() * cdf[:, -1])[:, None]).sum(-1).clamp(max=logp.shape[-1] - 1)
