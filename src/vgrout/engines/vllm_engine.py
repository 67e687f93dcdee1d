"""Rollouts with vLLM: a copy of the base model there, and each block state as a LoRA that a request names.

A LoRA is written by `adapters/peft.py`, once for each state and for each change of the weights. One call samples both
states in one batch. Written against vLLM 0.31; what of it matters here:
- vLLM keeps a LoRA by its integer id and a prompt's keys and values by the LoRA's name and path: neither looks at the
  weights. So every LoRA has an id, a name and a folder of its own for good, and one whose weights are gone is removed.
- `logprobs_mode = processed_logprobs` gives log-probabilities of logits / temperature; the default ignores temperature.
- A request's seed decides what is drawn from its probabilities, which batching can still move by rounding.
- `ignore_eos` with our end tokens as stop tokens ends samples where the torch engine ends them: other sampling settings
  of the model folder's generation configuration have no say.
"""

from __future__ import annotations

import importlib
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vgrout.adapters.base import Adapter
from vgrout.adapters.peft import lora, lora_config, lora_files, lora_rank, target_modules
from vgrout.config import Config
from vgrout.dist import ALONE, place
from vgrout.engines.base import Engine, Sample, states_of
from vgrout.faults import OutOfMemory, is_out_of_memory
from vgrout.models.load import model_path
from vgrout.types import RunFailed, State, UserError

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the largest LoRA rank is one of these
COLDEST = 0.01  # vLLM raises smaller temperatures to this one
STATES = 2  # LoRAs in one batch
SEEDS = 1 << 62


@dataclass(frozen=True)
class Settings:
    """What a server is started with; see vllm_... of `Config`."""

    model: str  # folder
    rank: int  # of the largest LoRA
    memory: float
    dtype: str
    sleep: bool


class Server:
    """The process's vLLM: it samples, and knows the LoRAs of the present weights."""

    def __init__(self, settings: Settings) -> None:
        """Raises UserError for a model or a machine that vLLM cannot take, OutOfMemory where it does not fit."""
        # In this process, so that the order in which requests run is always the same.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        self.sleeps = settings.sleep
        try:
            vllm = importlib.import_module("vllm")
            self.request = importlib.import_module("vllm.lora.request").LoRARequest
            self.parameters = vllm.SamplingParams
            self.llm = vllm.LLM(
                settings.model,
                dtype=settings.dtype,
                gpu_memory_utilization=settings.memory,
                max_model_len=-1,  # the model's own, or what fits
                enable_lora=True,
                max_loras=STATES,
                max_lora_rank=next(rank for rank in RANKS if rank >= settings.rank),
                logprobs_mode="processed_logprobs",
                generation_config="vllm",
                enable_sleep_mode=settings.sleep,
            )
        except Exception as error:  # noqa: BLE001 - vLLM raises whatever its parts raise
            if is_out_of_memory(error):
                said = f"vLLM does not fit into {settings.memory:g} of the GPU's memory, vllm_memory ({first(error)})"
                raise OutOfMemory(said) from None
            raise UserError(f"vLLM cannot serve {settings.model}: {first(error)}") from error
        self.folder = tempfile.TemporaryDirectory(prefix="vgrout-lora-")
        self.ids = count(1)
        self.weights = ""  # digest of the weights that `loras` are of
        self.loras: dict[State, Any] = {}
        self._rest()

    def generate(self, prompts: Sequence[dict], parameters: Sequence[Any], loras: Sequence[Any]) -> list[Any]:
        if self.sleeps:
            self.llm.wake_up()
        try:
            return self.llm.generate(list(prompts), list(parameters), use_tqdm=False, lora_request=list(loras))
        finally:
            self._rest()

    def load(self, lora: Any) -> None:
        """Let vLLM read a LoRA. Raises UserError where it cannot, which depends on the model's architecture."""
        if self.sleeps:
            self.llm.wake_up()
        try:
            self.llm.llm_engine.add_lora(lora)
        except Exception as error:  # noqa: BLE001 - vLLM raises whatever its parts raise
            raise UserError(f"vLLM cannot give this model the adapter's LoRA: {first(error)}") from error
        finally:
            self._rest()

    def _rest(self) -> None:
        if self.sleeps:
            self.llm.sleep(level=1)

    def lora(self, adapter: Adapter, state: State, settings: Settings) -> Any:
        """The request for the adapter's present weights in a state: the one there is, or a new one."""
        weights = digest(adapter)
        if weights != self.weights:
            self._forget()
            self.weights = weights
        if state not in self.loras:
            id = next(self.ids)
            name = f"{state}-{id}"
            path = Path(self.folder.name) / name
            self._write(path, adapter, state, settings)
            self.loras[state] = self.request(name, id, str(path))
        return self.loras[state]

    def _write(self, path: Path, adapter: Adapter, state: State, settings: Settings) -> None:
        rank = lora_rank(adapter, state, NO_LORA)
        tensors, _ = lora(adapter, state, rank, getattr(torch, settings.dtype))
        try:
            path.mkdir()
            for file, data in lora_files(tensors, lora_config(settings.model, rank, target_modules(adapter))).items():
                (path / file).write_bytes(data)
        except OSError as error:
            raise RunFailed(f"cannot write a LoRA into {path}: {error.strerror}") from None

    def _forget(self) -> None:
        """Remove the LoRAs of weights that are gone."""
        for old in self.loras.values():
            self.llm.llm_engine.remove_lora(old.lora_int_id)
            for file in Path(old.lora_path).iterdir():
                file.unlink()
            Path(old.lora_path).rmdir()
        self.loras = {}


NO_LORA = "vLLM needs a LoRA: give an adapter or a rank that is narrower, or --engine torch"
SERVERS: dict[Settings, Server] = {}  # of this process: one at most, since it holds its part of the GPU to the end


def served(settings: Settings) -> Server:
    """The process's server. Raises UserError where it has one with other settings."""
    if settings not in SERVERS:
        if SERVERS:
            (other,) = SERVERS
            raise UserError(f"this process has a vLLM with other settings ({other}): run {settings} in one of its own")
        SERVERS[settings] = Server(settings)
    return SERVERS[settings]


class VLLMEngine(Engine):
    """Samples come from vLLM, of the LoRAs of the adapter's present weights."""

    runs_hooks = False
    settings: Settings

    @classmethod
    def of(cls, cfg, model, tokenizer, adapter, ranks=ALONE) -> Engine:
        engine = cls(model, tokenizer, adapter)
        rank = lora_rank(adapter, "full", NO_LORA)
        if rank > RANKS[-1]:
            raise UserError(f"engine = vllm: both blocks are a LoRA of rank {rank}, vLLM takes {RANKS[-1]}: lower rank")
        engine.settings = Settings(str(model_path(cfg.model)), rank, cfg.vllm_memory, cfg.vllm_dtype, cfg.vllm_sleep)
        return engine

    @staticmethod
    def check(cfg: Config) -> None:
        if find_spec("vllm") is None:
            raise UserError("engine = vllm needs vLLM, on Linux with a GPU: pip install 'vgrout[vllm]'")
        if place()[1] > 1:
            raise UserError("engine = vllm samples for a run of one process: drop --engine, or torchrun")
        if cfg.device.startswith("cuda:") and cfg.device != "cuda:0":
            raise UserError("engine = vllm samples on the first GPU: give --device cuda, and CUDA_VISIBLE_DEVICES=N")
        for name in ("temperature", "eval_temperature"):
            if getattr(cfg, name) < COLDEST:
                raise UserError(f"{name} = {getattr(cfg, name)}: vLLM samples at {COLDEST} or above")

    def start(self) -> None:
        server = served(self.settings)
        server.load(server.lora(self.adapter, "full", self.settings))

    def facts(self) -> dict[str, Any]:
        return {"vllm": str(importlib.import_module("vllm").__version__)}

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
        """As `Engine.generate`; the seed of row i is a hash of uniforms[i]. Raises UserError where hooks edit the
        model, and RunFailed where vLLM refuses a request, cuts a sample or breaks."""
        owner = [p for p, count in enumerate(counts) for _ in range(count)]  # the prompt of each row
        if not owner:
            return []
        if edits(self.model):
            raise UserError("the model's activations are edited while it samples, which vLLM cannot: --engine torch")
        server, states = served(self.settings), states_of(state, len(prompts))
        loras = {live: server.lora(self.adapter, live, self.settings) for live in {states[p] for p in owner}}
        parameters = [
            server.parameters(
                temperature=temperature,
                seed=seed(u),
                max_tokens=max_new,
                ignore_eos=True,
                stop_token_ids=self.ends,
                logprobs=0,  # of the sampled token alone
                detokenize=False,
            )
            for u in uniforms
        ]
        asked = [{"prompt_token_ids": list(prompts[p])} for p in owner]
        try:
            outputs = server.generate(asked, parameters, [loras[states[p]] for p in owner])
        except Exception as error:  # noqa: BLE001 - vLLM raises whatever its parts raise
            if is_out_of_memory(error):
                raise OutOfMemory(f"not enough memory for sampling with vLLM ({first(error)})") from None
            raise RunFailed(f"vLLM cannot sample: {first(error)}") from error
        return [self._sample(output.outputs[0], max_new) for output in outputs]

    def _sample(self, output: Any, max_new: int) -> Sample:
        tokens = tuple(map(int, output.token_ids))
        if len(tokens) < max_new and (not tokens or tokens[-1] not in self.ends):
            raise RunFailed(
                f"vLLM cut a sample after {len(tokens)} of {max_new} tokens, where its context ends: "
                "raise vllm_memory, or lower max_new"
            )
        logp = tuple(float(at[token].logprob) for token, at in zip(tokens, output.logprobs, strict=True))
        text = self.tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return Sample(tokens, logp, text)


def seed(u: Float[Tensor, T]) -> int:
    """A request's seed: it depends on the row's uniforms alone."""
    return int.from_bytes(sha256(u.cpu().contiguous().numpy().tobytes()).digest()[:8]) % SEEDS


def digest(adapter: Adapter) -> str:
    """What merged weights depend on, beside the base model."""
    found = sha256(repr(adapter.scale).encode())
    for name, tensor in adapter.tensors().items():
        found.update(name.encode())
        found.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def edits(model: torch.nn.Module) -> bool:
    """Whether a module has a forward hook, but for those of transformers and adapters, which change nothing."""
    hooks = (hook for m in model.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values()))
    return any(not getattr(hook, "__module__", "").startswith(("transformers.", "vgrout.adapters.")) for hook in hooks)


def first(error: BaseException) -> str:
    """An error's kind and the first line of what it says."""
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0][:300]}" if said else type(error).__name__
