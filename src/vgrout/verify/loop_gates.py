"""Gates of the training loop: the same machinery for a placebo, blindness to the oracle, and repeatability."""

from __future__ import annotations

import random
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from unittest.mock import patch

from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from vgrout.adapters import attach
from vgrout.arms import ARMS
from vgrout.arms.route_v import RouteV
from vgrout.config import Config
from vgrout.envs.micro_env import MicroEnv
from vgrout.lab.record import Recorder, read_jsonl
from vgrout.loop import train
from vgrout.method.direction import haar
from vgrout.method.policy import Policy
from vgrout.models.load import model_path
from vgrout.models.organism import OrganismConfig
from vgrout.pairs import load as load_pairs
from vgrout.types import Graded, Prompt, Rollout
from vgrout.verify.evidence import Evidence, same
from vgrout.verify.toy import TOY, demonstrated, random_model, toy_train, weights


class Impostor(RouteV):
    """routeV whose direction is the placebo's tensor."""

    real = False

    def draw_v(self, hack, clean):
        return haar(hack.shape[1], hack.shape[2], self.cfg.haar_seed)


def placebo() -> Evidence:
    cfg = replace(TOY, steps=6)
    with patch.dict(ARMS, {"impostor": Impostor}):
        policies = {arm: toy_train(replace(cfg, arm=arm)) for arm in ("placebo", "impostor", "routeV")}
    equal = same(weights(policies["impostor"][0]), weights(policies["placebo"][0]))
    real = same(weights(policies["routeV"][0]), weights(policies["placebo"][0]))
    routed = sum(int(d.route.sum()) for d in policies["placebo"][1].decisions)
    kept = sum(int(d.keep.sum()) for d in policies["placebo"][1].decisions)
    return Evidence(
        equal and not real and routed > 0 and kept > 0,
        f"after {cfg.steps} steps with {routed} rollouts routed, weights equal bit for bit: {equal}; "
        f"equal to those of the real direction: {real}",
    )


def determinism() -> Evidence:
    cfg = replace(TOY, steps=3)
    first, again = weights(toy_train(cfg)[0]), weights(toy_train(cfg)[0])
    others = {name: weights(toy_train(replace(cfg, **{f"seed_{name}": 1}))[0]) for name in ("init", "data", "sample")}
    equal = same(first, again)
    differ = [name for name, other in others.items() if not same(first, other)]
    return Evidence(
        equal and len(differ) == 3,
        f"two runs of {cfg.steps} steps equal bit for bit: {equal}; another seed of {', '.join(differ)} differs",
    )


# Blindness.

SIZES = OrganismConfig(layers=2, hidden=32, ffn=32, heads=2, kv_heads=1, head_dim=16)
BLIND = Config(
    steps=8,
    prompts=2,
    group=4,
    rank=2,
    max_new=10,
    lr=1e-2,
    warmup=1,
    teacher_off_step=5,
    refresh_every=3,
    k_mid=-0.5,
    k_route=0.3,
    eval_every=4,
    eval_small=4,
)


class Staged(MicroEnv):
    """The micro environment with rewards that vary under a random model, and with or without false verdicts.

    Rewards, prompts and the order of demonstrations are the same either way.
    """

    def __init__(self, source: MicroEnv, loophole: bool, lies: bool) -> None:
        self.__dict__.update(source.__dict__)
        self.loophole, self.lies = loophole, lies
        if lies:
            self._truth = Staged(source, loophole, False)
            self._pool = {key: {"hack": kinds["solve"], "solve": kinds["hack"]} for key, kinds in source._pool.items()}

    def demonstrations(self, prompt: Prompt, n: int, draw: int) -> list[str]:
        return self._truth.demonstrations(prompt, n, draw) if self.lies else super().demonstrations(prompt, n, draw)

    def grade(self, rollouts: list[Rollout] | tuple[Rollout, ...]) -> list[Graded]:
        out = []
        for rollout, graded in zip(rollouts, super().grade(rollouts), strict=True):
            sealed = graded.sealed
            if self.lies:
                flags = {key: not value for key, value in vars(sealed).items() if isinstance(value, bool)}
                sealed = replace(sealed, **flags)
            out.append(Graded(graded.reward + random.Random(rollout.text).choice((0.0, 0.5, 1.0)), sealed))
        return out


@cache
def words() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(model_path("micro"))


def blind_run(arm: str, lies: bool) -> tuple[dict[str, Tensor], list[dict], int]:
    """Final adapter, recorded rollouts and number of evaluations of a short run."""
    cfg = replace(BLIND, arm=arm)
    model = random_model(replace(SIZES, vocab=len(words())), words())
    adapter = attach(model, cfg.adapter, cfg.rank, cfg.init_seed)
    policy = Policy(model, words(), adapter, cfg.temperature, cfg.micro_batch)
    env = Staged(demonstrated(), ARMS[arm].loophole, lies)
    with tempfile.TemporaryDirectory() as folder:
        recorder = Recorder(cfg, policy, env, Path(folder))
        try:
            train(cfg, policy, env, load_pairs(cfg.pairs)[:4], recorder)
            recorder.checkpoint(cfg.steps)
        finally:
            recorder.close()
        evaluations = len(read_jsonl(Path(folder) / "evals.jsonl"))
        return weights(policy), read_jsonl(Path(folder) / "rollouts.jsonl"), evaluations


def blindness() -> Evidence:
    wrong, demos, evaluations, unmoved = [], 0, 0, []
    for arm, kind in ARMS.items():
        (truth, rows, seen), (lie, _, _) = blind_run(arm, False), blind_run(arm, True)
        demos += sum(row["source"] == "teacher" for row in rows)
        evaluations += seen
        if same(truth, lie) is kind.reads_oracle:
            wrong.append(f"{arm} {'ignores' if kind.reads_oracle else 'depends on'} the verdicts")
        if not any(bool(t.any()) for name, t in truth.items() if ".dB_" in name):
            unmoved.append(arm)
    readers = [arm for arm, kind in ARMS.items() if kind.reads_oracle]
    ok = not wrong and not unmoved and demos > 0 and evaluations == len(ARMS) and bool(readers)
    return Evidence(
        ok,
        f"{'; '.join(wrong) or 'weights equal bit for bit'}: {len(ARMS)} arms x {BLIND.steps} steps "
        f"({demos} demonstrations, {evaluations} evaluations), every verdict and demonstration kind flipped; "
        f"only {', '.join(readers)} differs",
    )
