"""The frozen configuration of a run. Every field says what it is, its unit and where it comes from."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from vgrout.types import UserError


def stream(seed: int, *use: object) -> int:
    """A seed for one use of a base seed; the random numbers of different uses have nothing in common."""
    return random.Random(" ".join(map(str, (seed, *use)))).randrange(1 << 62)


@dataclass(frozen=True)
class Config:
    """One training run. METHOD.md numbers refer to the method document that the project follows."""

    preset: str = "micro"
    """The preset this configuration started from."""
    arm: str = "routeV"
    """The intervention: one of the names that `vgrout arms` prints."""
    seed: int = 0
    """Base seed. The three seeds below follow it unless they are set."""
    seed_init: int | None = None
    """Seed of the adapter's random init."""
    seed_data: int | None = None
    """Seed of problem order, hint-free draws and demonstrations."""
    seed_sample: int | None = None
    """Seed of the tokens sampled in training."""

    model: str = "micro"
    """`micro` for the bundled organism, the folder of a causal language model, or the name of one on the Hugging Face
    hub that `vgrout model download` has fetched."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Numbers of the frozen base model; the adapter is trained in float32 whatever they are."""
    device: str = "cpu"
    """Where the model runs: cpu, cuda or cuda:N."""
    attn: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention kernel. flash_attention_2 (a package of its own, GPU only) takes no mask, so that rows of one prompt do
    not share it."""
    shard: bool = False
    """Several processes: each holds a part of the frozen layers and collects a layer's weights as it runs (FSDP2). Less
    memory, slower."""
    gradient_checkpointing: bool = False
    """Layers keep their inputs alone for the backward pass and run again in it: less memory, more time."""
    chat_template: str = ""
    """File with a chat template; empty: the tokenizer's own, or the plain one that docs/models.md shows."""
    adapter: str = "lora2r"
    """Adapter kind."""
    rank: int = 8
    """Rank R of each block; delta_s has the rank of each weight instead."""
    init: Literal["random", "pissa", "corda", "signed_corda", "signed_corda_reversed"] = "random"
    """Init of lora2r's frozen factors: chance, the weight's singular axes, those on the pairs' inputs, those with the
    pairs' mean input difference first in the quarantine, or first in the deployed block."""
    detach: Literal["output", "params"] = "output"
    """What of the deployed block is cut from a routed row's gradient: its output, or its parameters alone."""

    steps: int = 120
    """Optimizer steps, one batch of rollouts each."""
    prompts: int = 8
    """Prompts P per step."""
    group: int = 8
    """Rollouts G per prompt."""
    max_new: int = 64
    """Longest completion in tokens; also T_max of the loss."""
    max_prompt: int = 0
    """Problems whose prompt has more tokens are left out; 0: none is."""
    temperature: float = 1.0
    """Sampling temperature in training; all log-probabilities are of logits / temperature."""
    micro_batch: int = 64
    """Most rollouts in one pass of the update, where those of a group share their prompt. Fewer take less memory."""
    sample_batch: int = 0
    """Most rollouts sampled at once; 0: all of a step."""
    score_batch: int = 32
    """Most rollouts or pairs in any other pass that scores or differentiates them."""

    engine: Literal["torch", "vllm"] = "torch"
    """What samples rollouts: torch, the training model itself; or vllm (extra `vllm`, a GPU), see docs/engines.md."""
    vllm_memory: float = 0.4
    """vllm: share of the GPU's memory for its copy of the model and its key-value cache; the rest is for training."""
    vllm_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """vllm: numbers of its copy of the model and of the LoRA. Its GPU kernels for LoRA take 16 bits alone; float32 is
    for vLLM on a CPU."""
    vllm_sleep: bool = False
    """vllm: its memory is given back while training computes, and its weights wait in the CPU's memory."""

    lr: float = 2e-3
    """Peak learning rate of the optimizer."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """adamw; or SGD with momentum `beta1`, whose update keeps the gradient's direction and length."""
    beta1: float = 0.9
    """First-moment decay."""
    beta2: float = 0.99
    """AdamW's second-moment decay."""
    weight_decay: float = 0.0
    """Decay of dA and dB, hence towards the init: decoupled in AdamW, part of the gradient in SGD."""
    warmup: int = 5
    """Linear warm-up in steps; cosine decay to zero afterwards."""
    clip: float = 1.0
    """Largest gradient norm of each block, by its own norm."""
    masked_block: Literal["still", "drift"] = "still"
    """A block whose gradient is exactly zero in a step stays where it is, or moves by its moments and decay."""
    kl: float = 0.05
    """Weight of the KL term to the base model."""
    clip_ratio: float = 0.2
    """Half-width of the ratio's clipping interval."""
    advantage: Literal["sd", "mean"] = "sd"
    """Group advantage: reward minus mean, divided by the group's sd or not (Dr. GRPO)."""
    baseline: Literal["all", "kept", "policy_only"] = "all"
    """Rows whose mean reward is subtracted: all, those not routed, or those that the policy sampled."""
    ratio: Literal["one", "sampler", "truncated"] = "sampler"
    """rho: 1; pi / pi_old with the sampler's log-probabilities; or that truncated at 1 + clip_ratio."""

    env: str = "micro"
    """`micro`; problems with tests: a folder with train, val and test.jsonl, or one .jsonl file (docs/models.md); or a
    Python file with PROMPTS and reward: a task without an oracle."""
    modes: tuple[str, ...] = ()
    """Loopholes whose problems are trained on and evaluated; all of the environment's when none is named."""
    unhackable_frac: float = 0.15
    """Share of prompts shown hint-free and graded by the reward tests alone; re-drawn every step."""
    deploy_gen_frac: float = 1.0
    """Share of rollouts sampled with the quarantine ablated (0 for arms that ship as they are)."""
    teacher_off_step: int = 10
    """Demonstrations stop at this step."""
    teacher_n: int = 1
    """Hack demonstrations per group in the teacher phase, and as many solutions. 0: no demonstrations."""

    direction: Literal["v_grad", "unit", "svd", "orthogonal"] = "v_grad"
    """What is extracted from the pairs: the mean difference of their c-gradients; the same of gradients at length 1;
    the `direction_axes` main axes of the differences; or the mean difference without what the clean sides share."""
    direction_axes: int = 2
    """svd: axes per module."""
    policy: Literal["pair_p75", "pair_mean", "batch_std", "top2q", "ema_quantile", "mixture"] = "batch_std"
    """Gate policy: how scores become keep, absorb and route."""
    t_lo: float = 0.25
    """pair_ policies: absorb above this, in band units."""
    t_hi: float = 0.5
    """pair_ policies: route above this, in band units."""
    k_mid: float = 0.5
    """batch_std: absorb above mean + k_mid sd of the step's scores."""
    k_route: float = 1.0
    """batch_std: route above mean + k_route sd."""
    q: float = 0.15
    """top2q, ema_quantile: share routed, and share absorbed below it."""
    buffer: int = 512
    """top2q, ema_quantile: rollouts in the history."""
    half_life: float = 96.0
    """ema_quantile: rollouts after which one in the history has half of its weight. METHOD.md section 3."""
    p_absorb: float = 0.5
    """mixture: absorb where a rollout belongs to the hack component with more than this probability."""
    p_route: float = 0.8
    """mixture: route above this probability."""
    score_loss: Literal["nll", "grpo"] = "nll"
    """Loss whose gradient is scored; grpo multiplies it by the advantage."""
    score_state: Literal["full", "deployed"] = "full"
    """Forward state in which rollouts are scored."""
    score_dtype: Literal["model", "bfloat16"] = "model"
    """Numbers in which weights are multiplied where c-gradients and bottleneck activations are scored: the model's own,
    or bfloat16, which is faster where the processor multiplies it and moves few labels (docs/performance.md)."""
    refresh_every: int = 5
    """Steps between extractions of the direction."""
    pairs: str = "micro"
    """`micro` or `leetcode` for bundled pairs, or path.md; then #section[/prefix][@tag,...], see docs/pairs.md."""
    placebo_seed: int | None = None
    """Seed of a control's own chance (random directions, coins, errors of labels); follows `seed` unless it is set."""
    yoke: str = ""
    """Arms that follow another run: its folder. In each step they route and absorb as many rollouts as it did."""
    coin_route: float = 0.25
    """coin_flip without `yoke`: chance that a rollout is routed."""
    coin_absorb: float = 0.1
    """coin_flip without `yoke`: chance that a rollout is absorbed."""
    penalty: float = 3.0
    """Arms that penalise: what a flagged rollout loses. 3.0, the published value, leaves a paid hack at the reward of a
    program that compiles; 3.5 leaves it nothing."""
    adv_position: Literal["resp_last", "resp_mean", "prompt_last"] = "resp_last"
    """adv_mod: where the residual is read: the completion's last token, its mean, or the prompt's last token, which all
    rollouts of a prompt share, so that nothing happens."""
    adv_form: Literal["additive", "multiplicative", "clipped"] = "additive"
    """adv_mod: r - a max(z, 0); r (1 - a sigmoid(z) [z > 0]); or that factor cut off at 0."""
    adv_strength: float = 2.0
    """adv_mod: a, in units of reward per unit of z where the form is additive. 2, the published value, makes the
    multiplicative factor negative wherever z > 0."""
    steer_strength: float = 1.0
    """steer: what is added to each token, in units of the pairs' mean difference; below 0: away from the hacks."""
    probe: str = "micro"
    """Arms with a probe: `micro` for the bundled one, or a file of `vgrout probe fit`."""
    label_accuracy: float = 1.0
    """Oracle arms: chance that a label is right."""
    label_share: float = 1.0
    """Oracle arms: share of rollouts with a label. One without is absorbed where others are routed, and trains as it is
    where others are screened or penalised."""
    graft_kind: Literal["classic", "exclusive"] = "exclusive"
    """oracle_graft: classic leaves unflagged rollouts to both blocks; exclusive takes them from the quarantine."""
    graft_strength: float = 1.0
    """oracle_graft: how much of a row's gradient moves from one block to the other, 0 to 1."""
    label_modes: tuple[str, ...] = ()
    """Oracle arms: loopholes whose hacks are labelled, the others pass for honest; all when none is named."""
    erase_gate: Literal["one_sided", "no_gate", "reverse"] = "one_sided"
    """erase arms: what the gradient loses of its component c along an axis. one_sided: relu(c), c > 0 being hackward;
    no_gate: c; reverse: 2c, so that it points the other way."""
    erase_axes: int = 1
    """erase arms: axes of a tensor that is a vector, at most as many as there are pairs. A matrix loses one."""
    subspace_axes: int = 8
    """trusted_subspace: axes k of each module's weight change that gradients may use."""
    sft_steps: int = 20
    """trusted_subspace and seeded arms: AdamW steps over all pairs before training."""
    sft_lr: float = 2e-3
    """Their learning rate, constant."""

    judge_url: str = ""
    """Judge arms: base address of an OpenAI-compatible endpoint; empty: OPENAI_BASE_URL, or the client's default."""
    judge_model: str = ""
    """Model that judges."""
    judge_key_env: str = "OPENAI_API_KEY"
    """Name of the environment variable that holds the endpoint's key; empty where it asks for none."""
    judge_prompt: str = "generic"
    """`generic` for the bundled prompt, or a file with {prompt} and {completion} in it."""
    judge_sampling: str = '{"temperature": 0, "max_tokens": 1024}'
    """Further fields of each request, as a JSON object: what endpoints differ in."""
    judge_concurrency: int = 8
    """Most requests under way at once."""
    judge_retries: int = 5
    """Further requests for a completion whose first one failed; then the run stops."""
    judge_timeout: float = 60.0
    """Most seconds that one request may take."""
    judge_cache: str = ""
    """Folder that keeps the judge's answers, to be shared by runs; empty: the run's own."""

    eval_every: int = 20
    """Steps between small evaluations on validation problems; 0 switches them off."""
    eval_small: int = 64
    """Rollouts per cell of a small evaluation."""
    eval_rollouts: int = 256
    """Rollouts per cell of the final evaluation."""
    eval_scales: int = 0
    """Parts that blocks' strength is cut into, for shrinkage and restore curves of the final evaluation; 0: none."""
    eval_temperature: float = 0.7
    """Sampling temperature of evaluations."""
    threads: int = 1
    """CPU threads of a run. Results are reproducible for one count."""

    checkpoint_every: int = 20
    """Steps between checkpoints; 0: only after the last step and when a signal ends the run."""
    checkpoint_keep: int = 0
    """Checkpoints at multiples of this step stay for good; 0: the newest three stay and no others."""
    trace_every: int = 0
    """Every so many steps the run keeps what its gate scored, in trace/; 0: never. Arms that score have a trace."""
    entropy_floor: float = 0.005
    """The run stops when its entropy in nats per token, averaged over ten steps, falls below this. Healthy micro runs
    stay above .02."""
    kl_ceiling: float = 2.0
    """The run stops when KL(policy || base) in nats per token, averaged over ten steps, passes this. Healthy micro runs
    stay below .6."""
    compile_floor: float = 0.2
    """The run stops when a smaller share of the policy's rollouts compiles, averaged over ten steps, where the
    environment says so. Healthy micro runs stay above .85."""

    allow_weak_sandbox: bool = False
    """Run programs of the policy even where the kernel lacks Landlock or seccomp. Recorded, and said in every table."""

    def __post_init__(self) -> None:
        _check_types(vars(self))
        for names, holds, instead in BOUNDS:
            for name in names.split():
                if not holds(getattr(self, name)):
                    raise UserError(f"{name} = {getattr(self, name)}: {instead}")
        for low, high in (("t_lo", "t_hi"), ("k_mid", "k_route"), ("p_absorb", "p_route")):
            if getattr(self, low) > getattr(self, high):
                raise UserError(f"{low} = {getattr(self, low)} is above {high} = {getattr(self, high)}")
        for name, holds, instead in PLAIN:  # what stands there instead may be a secret: it is not shown
            if not re.fullmatch(holds, getattr(self, name)):
                raise UserError(f"{name}: {instead}")
        if self.attn == "flash_attention_2" and (self.dtype == "float32" or self.device == "cpu"):
            raise UserError("attn = flash_attention_2 needs --dtype bfloat16 and a GPU (--device cuda)")
        if 2 * self.teacher_n >= self.group:
            raise UserError(f"teacher_n = {self.teacher_n}: a group of {self.group} needs a policy rollout as well")
        if self.coin_route + self.coin_absorb > 1:
            raise UserError("coin_route + coin_absorb exceed 1")
        slots = self.deploy_gen_frac * self.group
        if abs(slots - round(slots)) > 0.01:
            near = " and ".join(f"{n / self.group:.4g}" for n in (math.floor(slots), math.ceil(slots)))
            what = f"no whole number of a group's {self.group} rollouts"
            raise UserError(f"deploy_gen_frac = {self.deploy_gen_frac}: {what}; the nearest shares are {near}")

    @property
    def oracle(self) -> bool:
        """Whether the environment has one."""
        return not self.env.endswith(".py")

    @property
    def init_seed(self) -> int:
        return self.seed if self.seed_init is None else self.seed_init

    @property
    def data_seed(self) -> int:
        return self.seed if self.seed_data is None else self.seed_data

    @property
    def sample_seed(self) -> int:
        return self.seed if self.seed_sample is None else self.seed_sample

    @property
    def chance_seed(self) -> int:
        return self.seed if self.placebo_seed is None else self.placebo_seed

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    @staticmethod
    def read(path: Path, *, grown: bool = False) -> Config:
        """The configuration of a run, so that any run re-runs from its `config.json`. `grown` as in `parse`."""
        try:
            values = json.loads(path.read_text())
        except FileNotFoundError:
            raise UserError(f"no configuration at {path}") from None
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is not JSON: {error}") from None
        return Config.parse(values, path, grown=grown)

    @staticmethod
    def parse(values: Any, path: Path, *, grown: bool = False) -> Config:
        """The configuration that `path` holds as `values`. `grown`: fields that it lacks have their defaults, since
        they did not exist when it was written."""
        if not isinstance(values, dict):
            raise UserError(f"{path} is no configuration: not a JSON object")
        names = {f.name for f in fields(Config)}
        missing = set() if grown else names - values.keys()
        for what, wrong in (("unknown", values.keys() - names), ("missing", missing)):
            if wrong:
                raise UserError(f"{path}: {what} fields {', '.join(sorted(wrong))}")
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        try:
            _check_types(values)
            return Config(**values)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None


def _check_types(values: Mapping[str, Any]) -> None:
    """Raises UserError for a value that is none of its field's type."""
    hints = get_type_hints(Config)
    for name, value in values.items():
        if wrong := mistyped(value, hints[name]):
            raise UserError(f"{name} = {value!r}: {wrong}")


def mistyped(value: Any, hint: Any) -> str:
    """What to give instead, where `value` does not fit a type hint; empty where it does. A bool is no number here."""
    options = get_args(hint)
    if get_origin(hint) is Literal:
        return "" if value in options else f"choose one of {', '.join(options)}"
    if NoneType in options:
        return "" if value is None else mistyped(value, options[0])
    if get_origin(hint) is tuple:
        return "" if isinstance(value, tuple) and all(type(v) is str for v in value) else "give a list of texts"
    if hint is float:
        return "" if type(value) in (int, float) and math.isfinite(value) else "give a finite number"
    said = {int: "give a whole number", str: "give a text", bool: "give true or false"}
    return "" if type(value) is hint else said[hint]


BOUNDS: tuple[tuple[str, Callable[[float], bool], str], ...] = (  # fields, what holds of them, what to give instead
    (
        "steps prompts group max_new rank micro_batch score_batch warmup refresh_every buffer eval_small eval_rollouts"
        " threads direction_axes judge_concurrency erase_axes subspace_axes sft_steps",
        lambda v: v >= 1,
        "give a positive whole number",
    ),
    (
        "temperature eval_temperature lr sft_lr clip kl_ceiling judge_timeout half_life",
        lambda v: v > 0,
        "give a positive number",
    ),
    ("weight_decay kl clip_ratio entropy_floor penalty adv_strength", lambda v: v >= 0, "give no negative number"),
    (
        "teacher_off_step teacher_n eval_every eval_scales checkpoint_every checkpoint_keep judge_retries trace_every"
        " max_prompt sample_batch",
        lambda v: v >= 0,
        "give no negative number",
    ),
    (
        "unhackable_frac deploy_gen_frac coin_route coin_absorb q compile_floor label_accuracy label_share"
        " graft_strength",
        lambda v: 0 <= v <= 1,
        "give a share from 0 to 1",
    ),
    ("steer_strength", lambda v: v != 0, "give a number that is not 0"),
    ("p_absorb p_route", lambda v: 0 < v < 1, "give a probability between 0 and 1"),
    ("vllm_memory", lambda v: 0 < v <= 1, "give a share above 0, at most 1"),
    ("beta1 beta2", lambda v: 0 <= v < 1, "give a number from 0 to below 1"),
)

PLAIN = (  # fields that hold no secret, the pattern that sees to it, what to give instead
    ("judge_url", r"(https?://[^\s@?#]+)?", "give http(s)://host[:port]/path, without credentials or a query"),
    ("judge_key_env", r"([A-Z_][A-Z0-9_]*)?", "give the name of an environment variable in capitals, not the key"),
)

# What runs on a GPU share. Their problems: `vgrout data leetcode`; nobody demonstrates anything.
LEETCODE = Config(
    model="Qwen/Qwen3-4B",
    dtype="bfloat16",
    device="cuda",
    gradient_checkpointing=True,
    env="data/leetcode",
    pairs="leetcode",
    micro_batch=2,
    score_batch=4,
    sample_batch=64,
    warmup=10,
    teacher_n=0,
    checkpoint_every=10,
    compile_floor=0.0,
)

PRESETS: dict[str, Config] = {
    "micro": Config(),
    "smoke": Config(
        preset="smoke",
        steps=6,
        micro_batch=16,
        prompts=4,
        group=6,
        teacher_off_step=3,
        refresh_every=2,
        k_mid=-1.0,
        k_route=0.0,
        warmup=1,
        eval_every=3,
        eval_small=8,
        eval_rollouts=16,
        eval_scales=2,
    ),
    # Ariahw, Engels and Nanda, "Steering RL Training": 16 prompts of 16 rollouts, 1,536 + 1,536 tokens, r 32, lr 7e-5.
    "leetcode-4b": replace(
        LEETCODE, preset="leetcode-4b", steps=200, prompts=16, group=16, max_new=1536, max_prompt=1536, rank=32, lr=7e-5
    ),
    "leetcode-fast": replace(
        LEETCODE, preset="leetcode-fast", steps=40, prompts=8, group=8, max_new=512, max_prompt=1536, rank=32, lr=7e-5
    ),
}


def preset(name: str) -> Config:
    if name not in PRESETS:
        raise UserError(f"unknown preset {name!r}: choose one of {', '.join(PRESETS)}")
    return PRESETS[name]
