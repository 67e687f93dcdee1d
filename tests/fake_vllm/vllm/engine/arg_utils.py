"""vllm.engine.arg_utils, what vgrout uses of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from ..config.lora import MaxLoRARanks
from ..config.model import LogprobsMode, ModelDType


@dataclass
class EngineArgs:
    model: str = "Qwen/Qwen3-0.6B"
    dtype: ModelDType = "auto"
    seed: int = 0
    max_model_len: int = None
    logprobs_mode: LogprobsMode = "raw_logprobs"
    gpu_memory_utilization: float = 0.92
    disable_log_stats: bool = False
    enable_lora: bool = False
    max_loras: int = 1
    max_lora_rank: MaxLoRARanks = 16
    generation_config: str = "auto"
    enable_sleep_mode: bool = False

    def __post_init__(self) -> None:
        options = {"dtype": ModelDType, "logprobs_mode": LogprobsMode, "max_lora_rank": MaxLoRARanks}
        for name, among in options.items():
            if getattr(self, name) not in get_args(among):
                raise ValueError(f"{name}: Input should be one of {get_args(among)}")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ValueError("gpu_memory_utilization: Input should be in (0, 1]")
