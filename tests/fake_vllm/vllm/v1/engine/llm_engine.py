"""vllm.v1.engine.llm_engine: the model, its LoRAs, and the sampling of requests."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM, AutoTokenizer

from ...engine.arg_utils import EngineArgs
from ...logprobs import Logprob
from ...lora.request import LoRARequest
from ...outputs import CompletionOutput, RequestOutput
from ...sampling_params import SamplingParams

LoRA = dict[str, tuple[Tensor, Tensor]]  # (A, B times alpha / r) of each module, by its name


class LLMEngine:
    def __init__(self, engine_args: EngineArgs) -> None:
        self.args = engine_args
        dtype = {"auto": "auto", "half": "float16", "float": "float32"}.get(engine_args.dtype, engine_args.dtype)
        self.model = AutoModelForCausalLM.from_pretrained(engine_args.model, dtype=dtype).eval()
        self.model.requires_grad_(False)
        limit = self.model.config.max_position_embeddings
        self.max_model_len = limit if engine_args.max_model_len in (None, -1) else engine_args.max_model_len
        self.ends = {AutoTokenizer.from_pretrained(engine_args.model).eos_token_id}
        named = self.model.generation_config.eos_token_id if engine_args.generation_config == "auto" else None
        self.ends |= set(named if isinstance(named, list) else [] if named is None else [named])
        self.loaded: OrderedDict[int, LoRA] = OrderedDict()
        self.prefixes: dict[tuple[str, str], LoRA] = {}  # what a prompt's keys and values were computed with
        self.asleep = False
        self.batches: list[set[int]] = []  # ids of the LoRAs of each call
        self.removed: list[int] = []

    def add_lora(self, lora_request: LoRARequest) -> bool:
        self._lora(lora_request)
        return True

    def remove_lora(self, lora_id: int) -> bool:
        self.removed.append(lora_id)
        return self.loaded.pop(lora_id, None) is not None

    def list_loras(self) -> set[int]:
        return set(self.loaded)

    def sleep(self, level: int) -> None:
        self.asleep = True
        self.prefixes.clear()

    def wake_up(self) -> None:
        self.asleep = False

    def _lora(self, request: LoRARequest) -> LoRA:
        """The LoRA of an id, which nothing but the id decides."""
        if not self.args.enable_lora:
            raise ValueError(f"Got lora_request {request} but LoRA is not enabled!")
        if request.lora_int_id not in self.loaded:
            lora = self._read(Path(request.lora_path))
            if len(self.loaded) == self.args.max_loras:
                self.loaded.popitem(last=False)
            self.loaded[request.lora_int_id] = lora
        self.loaded.move_to_end(request.lora_int_id)
        return self.loaded[request.lora_int_id]

    def _read(self, folder: Path) -> LoRA:
        said = json.loads((folder / "adapter_config.json").read_text())
        if said["r"] > self.args.max_lora_rank:
            raise ValueError(f"LoRA rank {said['r']} is greater than max_lora_rank {self.args.max_lora_rank}.")
        if said["bias"] != "none" or said["modules_to_save"] or said["use_dora"]:
            raise ValueError("Unsupported LoRA features.")
        lora: LoRA = {}
        tensors = load_file(folder / "adapter_model.safetensors")
        for name in {key.rpartition(".lora_")[0] for key in tensors}:
            a, b = (tensors.pop(f"{name}.lora_{part}.weight").to(self.model.dtype) for part in "AB")
            module = name.removeprefix("base_model.model.")
            o, i = self.model.get_submodule(module).weight.shape
            if (a.shape, b.shape) != ((said["r"], i), (o, said["r"])):
                raise ValueError(f"{name}: a LoRA of another shape than its weight's")
            lora[module] = a, b * (said["lora_alpha"] / said["r"])
        if tensors:
            raise ValueError(f"{min(tensors)} is unsupported LoRA weight")
        return lora

    @contextmanager
    def _with(self, lora: LoRA | None) -> Iterator[None]:
        def add(a: Tensor, b: Tensor, module, args, y: Tensor) -> Tensor:
            return y + linear(linear(args[0], a), b)

        with ExitStack() as hooks:
            for name, factors in (lora or {}).items():
                module = self.model.get_submodule(name)
                hooks.callback(module.register_forward_hook(partial(add, *factors)).remove)
            yield

    @torch.inference_mode()
    def run(
        self, prompts: Sequence[dict], params: Sequence[SamplingParams], loras: Sequence[LoRARequest | None]
    ) -> list[RequestOutput]:
        if self.asleep:
            raise RuntimeError("The engine is asleep.")
        for prompt in prompts:
            if len(prompt["prompt_token_ids"]) >= self.max_model_len:
                raise ValueError(f"The prompt is longer than the maximum model length of {self.max_model_len}.")
        ids = [None if lora is None else lora.lora_int_id for lora in loras]
        self.batches.append(set(ids))
        out: list[RequestOutput | None] = [None] * len(prompts)
        for id in dict.fromkeys(ids):
            rows = [k for k, own in enumerate(ids) if own == id]
            asked = [prompts[k]["prompt_token_ids"] for k in rows]
            found = self._group(asked, [params[k] for k in rows], loras[rows[0]])
            for k, output in zip(rows, found, strict=True):
                output.lora_request = loras[k]
                out[k] = RequestOutput(str(k), None, prompts[k]["prompt_token_ids"], None, [output], True)
        return out

    def _group(self, prompts, params, request) -> list[CompletionOutput]:
        """Requests of one LoRA, side by side, padded on the left."""
        lora = None if request is None else self._lora(request)
        first = lora if request is None else self.prefixes.setdefault((request.lora_name, request.lora_path), lora)
        width, n = max(map(len, prompts)), len(prompts)
        ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        generators = [torch.Generator() for _ in params]
        for generator, own in zip(generators, params, strict=True):
            generator.seed() if own.seed is None else generator.manual_seed(own.seed)
        tokens: list[list[int]] = [[] for _ in params]
        logprobs: list[list[dict[int, Logprob]]] = [[] for _ in params]
        why: list[str | None] = [None] * n
        with self._with(first):  # all of the prompt but its last token
            place = (mask.cumsum(1) - 1).clamp(min=0)
            out = self.model(
                input_ids=ids[:, :-1], attention_mask=mask[:, :-1], position_ids=place[:, :-1], use_cache=True
            )
        last, place = ids[:, -1:], place[:, -1:]
        with self._with(lora):
            while None in why:
                out = self.model(
                    input_ids=last,
                    attention_mask=mask,
                    position_ids=place,
                    past_key_values=out.past_key_values,
                    use_cache=True,
                )
                logits = out.logits[:, -1].float()
                processed = logits / torch.tensor([own.temperature for own in params])[:, None]
                said = processed if self.args.logprobs_mode.startswith("processed") else logits
                said = said.log_softmax(-1) if self.args.logprobs_mode.endswith("logprobs") else said
                drawn = [0] * n
                for k, own in enumerate(params):
                    if why[k] is not None:
                        continue
                    drawn[k] = token = int(torch.multinomial(processed[k].softmax(-1), 1, generator=generators[k]))
                    tokens[k].append(token)
                    logprobs[k].append(self._at(token, said[k], own.logprobs))
                    if token in own.stop_token_ids or (not own.ignore_eos and token in self.ends):
                        why[k] = "stop"
                    elif len(tokens[k]) == own.max_tokens or len(prompts[k]) + len(tokens[k]) == self.max_model_len:
                        why[k] = "length"
                last, place = torch.tensor(drawn)[:, None], place + 1
                mask = torch.cat((mask, mask.new_ones(n, 1)), 1)
        return [
            CompletionOutput(0, "", row, sum(at[t].logprob for t, at in zip(row, own, strict=True)), own, reason)
            for row, own, reason in zip(tokens, logprobs, why, strict=True)
        ]

    @staticmethod
    def _at(token: int, said: Tensor, most: int | None) -> dict[int, Logprob]:
        """The sampled token's, and those of the `most` likely tokens; ranks count from 1."""
        at = {token: Logprob(float(said[token]), int((said > said[token]).sum()) + 1)}
        if most:
            values, ids = said.topk(most)
            for rank, (value, id) in enumerate(zip(values.tolist(), ids.tolist(), strict=True), 1):
                at.setdefault(id, Logprob(value, rank))
        return at
