"""vllm.sampling_params, what vgrout uses of it."""

from __future__ import annotations

from dataclasses import dataclass

_MAX_TEMP = 1e-2


@dataclass
class SamplingParams:
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    logprobs: int | None = None
    detokenize: bool = True

    def __post_init__(self) -> None:
        if 0 < self.temperature < _MAX_TEMP:
            self.temperature = _MAX_TEMP
        if self.seed == -1:
            self.seed = None
        self.stop_token_ids = list(dict.fromkeys(self.stop_token_ids or []))
        if (self.n, self.top_p, self.top_k, self.min_p) != (1, 1.0, 0, 0.0):
            raise NotImplementedError("the stand-in samples once, from the whole distribution")
