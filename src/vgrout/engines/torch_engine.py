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
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerFast

from vgrout.adapters.base import Adapter
from vgrout.dist import ALONE, Ranks
from vgrout.engines.base import Engine, Sample, by_state
from vgrout.models.chat import encode_completion, encode_prompt
from vgrout.types import State

__all__ = ["Sample", "TorchEngine", "encode_completion", "encode_prompt"]


class TorchEngine(Engine):
    """The default: the training model itself samples, on merged weights; at most `most` rows at once, 0: all. Each of
    several processes samples for its prompts."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        adapter: Adapter,
        most: int = 0,
        ranks: Ranks = ALONE,
    ) -> None:
        super().__init__(model, tokenizer, adapter)
        self.most, self.ranks, self.body, self.head = most, ranks, model.base_model, model.get_output_embeddings()

    @classmethod
    def of(cls, cfg, model, tokenizer, adapter, ranks=ALONE):
        return cls(model, tokenizer, adapter, cfg.sample_batch, ranks)

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
        at = self.ranks.owners(owner).tolist()  # the process that samples each row
        own = [i for i, process in enumerate(at) if process == self.ranks.rank]

        def in_batches(size: int) -> list[tuple[list[int], list[float]]]:
            out: list[tuple[list[int], list[float]]] = []
            batches = [own[start : start + size] for start in range(0, len(own), size)]
            # What is collected of a sharded model in inference mode could not be used in training.
            quiet = torch.no_grad() if self.ranks.sharded else torch.inference_mode()
            with quiet, self.adapter.merged(state):
                for batch, real in self.ranks.level(batches, [0]):
                    rows = Counter(owner[i] for i in batch)  # how many of each prompt, in order
                    asked = [prompts[p] for p in rows], list(rows.values())
                    found = self._decode(*asked, max_new, temperature, uniforms[batch], real)
                    if real:
                        out += zip(*found, strict=True)
            return out

        samples = []
        size = max(1, min(self.most or len(own), len(own)))
        for row, logp in self.ranks.fitting(size, "sampling", in_batches):
            text = self.tokenizer.decode(row, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            samples.append(Sample(tuple(row), tuple(logp), text))
        found = [iter(part) for part in self.ranks.gather(samples)]
        return [next(found[process]) for process in at]

    def _decode(self, prompts, counts, max_new, temperature, uniforms, real=True):
        """`real` False: only to keep in step with other processes."""
        pad, device = self.tokenizer.pad_token_id, self.model.device
        ends, uniforms = torch.tensor(self.ends, device=device), uniforms.to(device)
        width = max(map(len, prompts))
        ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts], device=device)
        seen = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        cache = DynamicCache(config=self.model.config)
        position = (seen.cumsum(1) - 1).clamp(min=0)
        out = self.body(input_ids=ids, attention_mask=seen, position_ids=position, past_key_values=cache)
        repeat = torch.tensor(list(counts), device=device)
        hidden = out.last_hidden_state[:, -1].repeat_interleave(repeat, 0)
        alive = torch.arange(len(prompts), device=device).repeat_interleave(repeat)
        cache.reorder_cache(alive)  # keeps these rows, as often as they stand there
        seen, place = seen[alive], position[alive, -1]
        rows = torch.arange(len(alive), device=device)  # which sample each live row is
        tokens: list[list[int]] = [[] for _ in range(len(alive))]
        logps: list[list[float]] = [[] for _ in range(len(alive))]
        for t in range(max_new):
            logp = torch.log_softmax(self.head(hidden).float() / temperature, dim=-1)
            token = self._draw(logp, uniforms[rows, t])
            chosen = logp.gather(1, token[:, None])[:, 0]
            for row, tok, lp in zip(rows.tolist(), token.tolist(), chosen.tolist(), strict=True):
                if real:
                    tokens[row].append(tok)
                    logps[row].append(lp)
            live = (~torch.isin(token, ends)).nonzero()[:, 0]
            real = real and len(live) > 0
            if t == max_new - 1 or not self.ranks.more(real):
                break
            live = live if real else rows.new_zeros(1)  # other processes need this one's passes
            if len(live) < len(token):
                cache.reorder_cache(live)
                seen, place, rows, token = seen[live], place[live], rows[live], token[live]
            place = place + 1
            seen = torch.cat((seen, seen.new_ones(len(seen), 1)), 1)
            out = self.body(
                input_ids=token[:, None], attention_mask=seen, position_ids=place[:, None], past_key_values=cache
            )
            hidden = out.last_hidden_state[:, -1]
        return tokens, logps

    @staticmethod
    def _draw(logp: Float[Tensor, "N V"], u: Float[Tensor, N]) -> Int[Tensor, N]:
        cdf = logp.double().exp().cumsum(-1)
        return (cdf < (u.double() * cdf[:, -1])[:, None]).sum(-1).clamp(max=logp.shape[-1] - 1)
