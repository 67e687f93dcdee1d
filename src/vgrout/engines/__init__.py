"""Rollout engines by name. Adding one: a file with an Engine, an entry here and in `Config.engine`."""

from __future__ import annotations

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from vgrout.adapters.base import Adapter
from vgrout.config import Config
from vgrout.dist import ALONE, Ranks
from vgrout.engines.base import Engine, Sample
from vgrout.engines.torch_engine import TorchEngine
from vgrout.engines.vllm_engine import VLLMEngine

ENGINES: dict[str, type[Engine]] = {
    "torch": TorchEngine,  # the training model itself
    "vllm": VLLMEngine,  # a copy of the model in vLLM, which gets the blocks as LoRAs
}


def make_engine(
    cfg: Config,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    adapter: Adapter,
    ranks: Ranks = ALONE,
) -> Engine:
    """The engine that `cfg` names, for a model with its adapter. Raises UserError where it cannot sample from it."""
    return ENGINES[cfg.engine].of(cfg, model, tokenizer, adapter, ranks)


__all__ = ["ENGINES", "Engine", "Sample", "make_engine"]
