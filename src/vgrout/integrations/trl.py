"""TRL's GRPO with routing: two blocks on the model, and each rollout trains those that its zone says.

    trainer = RoutedGRPOTrainer(model=..., args=..., reward_funcs=..., routing=Routing(pairs="my.md"))

What TRL does stays TRL's: prompts, rewards, advantages, the loss and its normaliser, optimizer, schedule, logging. What
is added, in the order of a step:
    sampling    from the deployed block in merged weights (`deploy_gen_frac`)
    zones       of each rollout, by an arm that routes (`router.Router`); they stay with their rows when TRL shuffles
    ratio       `sampler`: against the log-probabilities of the block state that sampled the row; `one`: as TRL has it
    reference   of the KL term: this model with its adapter skipped, where TRL would load a second copy
    masks       around forward and backward: gradient checkpointing runs the forward once more in the backward
    clipping    of each block by its own norm
    stillness   of a block that no row trained: no moments move it
    saving      of both blocks and what the arm remembers, without the base model
With dr_grpo, scale_rewards none or group, one update per generation and use_bias_correction_kl off, the gradients are
those of `vgrout.loop` on the same rollouts, but for two things: in TRL a group without reward variance keeps its KL
term, and its sd is the unbiased one. Evaluations are of what ships.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer import TRAINING_ARGS_NAME

try:
    from trl import GRPOConfig, GRPOTrainer, is_conversational
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"{error}: install the extra, pip install 'vgrout[trl]'") from error

from vgrout.adapters.base import BLOCKS, Adapter
from vgrout.integrations.router import Router, Routing, evaluating
from vgrout.loop import untrained
from vgrout.types import ZONES, Decision, UserError

__all__ = ["RoutedGRPOTrainer", "Routing"]


class RoutedGRPOTrainer(GRPOTrainer):
    """`GRPOTrainer` and all its arguments, and `routing`. Raises UserError for what routing cannot go along with.

    `router` has the adapter and its contexts; outside of them the model runs with its quarantine live.
    """

    def __init__(self, *args: Any, routing: Routing, **kwargs: Any) -> None:
        given = inspect.signature(GRPOTrainer.__init__).bind(self, *args, **kwargs).arguments
        _check_given(given)
        if "args" in given:
            check_args(given["args"], routing)
        with _no_reference(given.get("args")):
            super().__init__(*args, **kwargs)
        check_args(self.args, routing)
        if self._is_vlm:
            raise UserError("routing scores text alone: give a language model and its tokenizer")
        if routing.ratio == "sampler" and (dropout := active_dropout(self.model)):
            raise UserError(f"rows are not sampled with {dropout}: set it to 0 as the model is loaded, or ratio='one'")
        self.router = Router(
            self.model,
            self._tokenizer,
            routing,
            group=self.num_generations,
            temperature=self.temperature,
            encode=self._encode,
        )
        self.beta = self.args.beta
        if self.beta:
            self.ref_model = Reference(self.model, self.router.adapter)
        self.add_callback(_Still(self.router.adapter))
        self._masks = ExitStack()

    def _encode(self, prompts: Sequence[str]) -> list[list[int]]:
        """Token ids of the pairs' prompts, in the form of the training prompts."""
        if is_conversational({"prompt": next(iter(self.train_dataset))["prompt"]}):
            prompts = [[{"role": "user", "content": text}] for text in prompts]
        return self._tokenize_prompts(list(prompts))[0]

    # Sampling.

    def _from_full(self, n: int) -> Tensor:
        """Which of n rollouts [n] are sampled with the quarantine live: the last ones of each group."""
        if not self.model.training:
            return torch.zeros(n, dtype=torch.bool)
        group = self.num_generations
        return torch.arange(n) % group >= round(self.router.cfg.deploy_gen_frac * group)

    def _generate_single_turn(self, prompt_ids: list, *args: Any, **kwargs: Any) -> tuple[list, None]:
        full = self._from_full(len(prompt_ids))
        out: list[Any] = [None] * len(prompt_ids)
        for state, rows in (("deployed", ~full), ("full", full)):
            index = rows.nonzero()[:, 0].tolist()
            if index:
                with self.router.sampling(state):
                    found, _ = super()._generate_single_turn([prompt_ids[i] for i in index], *args, **kwargs)
                for i, tokens in zip(index, found, strict=True):
                    out[i] = tokens
        return out, None

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        if self.model.training:
            output["route_m"], output["route_d"] = self._decide(output)
            if self.router.cfg.ratio == "sampler":
                output["old_per_token_logps"] = self._sampler_logps(output)
        return output

    @torch.no_grad()
    def _sampler_logps(self, output: Mapping[str, Tensor]) -> Tensor:
        """Log-probabilities [N, T] of completion tokens in the block state that sampled each row."""
        ids, on = (torch.cat([output[f"prompt_{x}"], output[f"completion_{x}"]], dim=1) for x in ("ids", "mask"))
        width, size = output["completion_ids"].shape[1], self.args.per_device_train_batch_size
        m = self._from_full(len(ids)).to(ids.device, torch.float32)
        parts = []
        with evaluating(self.model):
            for some in torch.arange(len(ids)).split(size):
                with self.router.masked(m[some], torch.zeros_like(m[some])):
                    found = self._get_per_token_logps_and_entropies(self.model, ids[some], on[some], width)
                parts.append(found[0])
        return torch.cat(parts)

    # Zones.

    def _decide(self, output: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The masks (m, d) of a generation batch. A truncated completion that TRL masks is kept: it trains nothing."""
        prompts, completions = (
            [row[on].tolist() for row, on in zip(output[f"{x}_ids"], output[f"{x}_mask"].bool(), strict=True)]
            for x in ("prompt", "completion")
        )
        some = [i for i, tokens in enumerate(completions) if tokens]
        m, d = torch.zeros(2, len(completions), device=output["completion_ids"].device)
        if len(some) == 1 and not self.router.decides_alone:
            self._log_routing({"undecided": 1.0})  # kept: all others were cut off, one has no thresholds
        elif some:
            step = self.state.global_step
            decision = self.router.decide(step, [prompts[i] for i in some], [completions[i] for i in some])
            m[some], d[some] = decision.m.to(m), decision.d.to(d)
            self._note(decision)
        return m, d

    def _note(self, decision: Decision) -> None:
        said = {zone: float(getattr(decision, zone).float().mean()) for zone in ZONES} | dict(decision.note)
        if decision.threshold is not None:
            said |= zip(("t_lo", "t_hi"), decision.threshold, strict=True)
        if decision.score is not None:
            said["score"] = float(decision.score.mean())
        self._log_routing(said)

    def _log_routing(self, said: Mapping[str, float]) -> None:
        for name, value in said.items():
            if math.isfinite(value):
                self._metrics["train"][f"routing/{name}"].append(value)

    # The update.

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        with self._masks:  # to the end of the backward pass: gradient checkpointing runs the forward again in it
            return super().training_step(*args, **kwargs)

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        if self.model.training:
            self._masks.enter_context(self.router.masked(inputs["route_m"], inputs["route_d"]))
        return super()._compute_loss(model, inputs)

    def prediction_step(self, *args: Any, **kwargs: Any) -> tuple:
        with self.router.adapter.deployed():
            return super().prediction_step(*args, **kwargs)

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """Clip each block by its own norm; the norm of both before clipping comes back."""
        limit, adapter = self.args.max_grad_norm, self.router.adapter
        norms = {which: self.accelerator.clip_grad_norm_(adapter.parameters(which), limit) for which in BLOCKS}
        total = float(sum(norms.values()))
        self._log_routing({f"norm_{which}": float(norm) for which, norm in norms.items()})
        self._log_routing({"qmass": float(norms["quarantine"]) / total if total else 0.0})
        return torch.stack([torch.as_tensor(norm) for norm in norms.values()]).norm()

    # Files.

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Both blocks, what the arm remembers, tokenizer and arguments; not the base model."""
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.router.save(folder)
        self.processing_class.save_pretrained(folder)
        torch.save(self.args, folder / TRAINING_ARGS_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.router.load(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        self.router.load(Path(self.state.best_model_checkpoint))


class Reference:
    """The base model as the callable that TRL asks for the reference's log-probabilities."""

    def __init__(self, model: nn.Module, adapter: Adapter) -> None:
        self.model, self.adapter = model, adapter

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with evaluating(self.model), self.adapter.reference():
            return self.model(*args, **kwargs)


class _Still(TrainerCallback):
    """Leaves a block that no row of the step trained to no optimizer: no update, no moments, no decay."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for which in BLOCKS:
            for p in untrained(self.adapter.parameters(which)):
                p.grad = None


@contextmanager
def _no_reference(args: GRPOConfig | None) -> Iterator[None]:
    """TRL loads no reference model of its own: it would be a copy of the base model that is there already."""
    beta = args.beta if args is not None else 0.0
    try:
        if args is not None:
            args.beta = 0.0
        yield
    finally:
        if args is not None:
            args.beta = beta


UNFIT = {  # arguments of the trainer that nobody may give, and why
    "peft_config": "the adapter is routing's own, it has two blocks",
    "quantization_config": "deltas are merged into the weights to sample, which needs them in float32",
    "tools": "tokens of tools would be scored as the policy's",
    "rollout_func": "it would not sample from the deployed block",
    "environment_factory": "tokens of environments would be scored as the policy's",
}


def _check_given(given: Mapping[str, Any]) -> None:
    for name, why in UNFIT.items():
        if given.get(name):
            raise UserError(f"routing takes no {name}: {why}")
    if given.get("optimizers", (None, None))[0] is not None:
        raise UserError("routing takes no optimizer made beforehand, it would not hold the adapter: use args.optim")


def active_dropout(model: nn.Module) -> str:
    """A setting of the model that drops something in training; '' where none does."""
    found = model.config.get_text_config().to_dict()
    return next((k for k, value in found.items() if "dropout" in k and isinstance(value, float) and value > 0), "")


def check_args(args: GRPOConfig, routing: Routing) -> None:
    """Raises UserError for arguments that routing cannot honour."""
    unfit = {
        "use_vllm": "rollouts come from the block that ships, in merged weights: use_vllm=False",
        "use_transformers_continuous_batching": "it has not been tried with merged weights: set it False",
        "use_liger_kernel": "its loss has not been tried with masks: use_liger_kernel=False",
        "fp16": "its gradients would be unscaled once for each block: use bf16, or neither",
        "bf16_full_eval": "it would round both blocks in place: bf16_full_eval=False",
        "fp16_full_eval": "it would round both blocks in place: fp16_full_eval=False",
        "neftune_noise_alpha": "rows would be trained on noise that they were not sampled with: leave it out",
        "torch_compile": "masks change from pass to pass: torch_compile=False",
        "sync_ref_model": "the reference is the base model: sync_ref_model=False",
        "deepspeed": "one process on one device trains: drop deepspeed",
        "fsdp": "one process on one device trains: drop fsdp",
    }
    for name, why in unfit.items():
        if getattr(args, name):
            raise UserError(f"routing does not go with {name}: {why}")
    if args.world_size > 1 or args.n_gpu > 1:
        raise UserError("routing needs the scores of all rollouts in one process: train with one process and one GPU")
    if args.gradient_checkpointing and (args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
        raise UserError("reentrant checkpointing gives a frozen base no gradient: use_reentrant=False")
    if routing.ratio == "truncated":
        raise UserError("ratio truncated is none of TRL's: sampler or one")
    if args.steps_per_generation < args.gradient_accumulation_steps:
        raise UserError(
            "thresholds are of an update's rollouts: steps_per_generation must be gradient_accumulation_steps or more"
        )
    every = args.steps_per_generation * args.num_iterations
    if routing.ratio == "one" and args.gradient_accumulation_steps % every:
        raise UserError("several updates per generation need a ratio: Routing(ratio='sampler')")
