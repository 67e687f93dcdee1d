"""vllm.entrypoints.llm, what vgrout uses of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..engine.arg_utils import EngineArgs
from ..lora.request import LoRARequest
from ..outputs import RequestOutput
from ..sampling_params import SamplingParams
from ..v1.engine.llm_engine import LLMEngine


class LLM:
    def __init__(
        self,
        model: str,
        *,
        dtype: str = "auto",
        seed: int = 0,
        gpu_memory_utilization: float = 0.92,
        **kwargs: Any,
    ) -> None:
        named = {"dtype": dtype, "seed": seed, "gpu_memory_utilization": gpu_memory_utilization}
        self.llm_engine = LLMEngine(EngineArgs(model=model, **named, **kwargs))

    def generate(
        self,
        prompts: dict | Sequence[dict],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        lora_request: Sequence[LoRARequest] | LoRARequest | None = None,
    ) -> list[RequestOutput]:
        prompts = prompts if isinstance(prompts, Sequence) else [prompts]
        each = [x if isinstance(x, Sequence) else [x] * len(prompts) for x in (sampling_params, lora_request)]
        if any(len(x) != len(prompts) for x in each):
            raise ValueError("The lengths of prompts, params and lora_request must be the same.")
        return self.llm_engine.run(prompts, *each)

    def sleep(self, level: int = 1, mode: str = "abort") -> None:
        if not self.llm_engine.args.enable_sleep_mode:
            raise ValueError("Sleep mode is not enabled in the model config")
        self.llm_engine.sleep(level)

    def wake_up(self, tags: list[str] | None = None) -> None:
        self.llm_engine.wake_up()
