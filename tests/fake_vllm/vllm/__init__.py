"""A stand-in for vLLM that needs no GPU: a real sampler behind the part of vLLM's interface that vgrout uses.

It loads the base model with transformers, reads the LoRA folders that requests name, and samples with torch. Names,
parameters and defaults are those of vLLM 0.31.0 (tests/fake_vllm/signatures.json, checked by tests/test_engines.py).
So is what vLLM does without saying so, as far as a caller can get it wrong:
- a LoRA is kept by its integer id: an id that comes again with another path gives the old weights;
- a prompt's keys and values are kept by the LoRA's name and path: a pair that comes again gives the old ones;
- `raw_logprobs`, the default, are of logits without temperature;
- a generation configuration in the model's folder has a say in where samples end, unless it is switched off;
- generating while asleep, a LoRA above `max_lora_rank`, and a prompt beyond the context are errors.
"""

from ._version import __version__
from .entrypoints.llm import LLM
from .outputs import CompletionOutput, RequestOutput
from .sampling_params import SamplingParams

__all__ = ["LLM", "CompletionOutput", "RequestOutput", "SamplingParams", "__version__"]
