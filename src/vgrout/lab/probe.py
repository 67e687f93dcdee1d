"""Fit a linear probe for hacks on labelled programs of mechanisms that are not live, and say how well it does.

    min_w,b  mean_i log(1 + exp(-y_i (<x_i, w> + b))) + l2/2 |w|^2      x: features in units of their sd, y = +-1
The cuts are chosen on problems that were not fitted on: `route` has the highest F0.5 there, `absorb` the highest F2.
AUROC is reported on further problems, and on further problems whose markers, too, are of another family.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float
from rich.console import Console
from scipy.optimize import minimize
from scipy.special import expit
from torch import Tensor

from vgrout.config import preset
from vgrout.engines.torch_engine import encode_completion, encode_prompt
from vgrout.envs.grade import Grader
from vgrout.envs.micro_probe import MECHANISMS, Example, examples
from vgrout.envs.sandbox import Sandbox
from vgrout.lab.measure import auroc, f_beta
from vgrout.lab.run import make_policy
from vgrout.method.linear_probe import LinearProbe, features
from vgrout.method.policy import Policy, stack
from vgrout.method.residual import band, decoder_layers
from vgrout.models.load import load_model, weights_digest
from vgrout.types import UserError

L2 = 0.01
HELD_OUT = 0.25  # share of the problems that choose the cuts
SETS = {"fit": (0, "train"), "fresh": (1, "train"), "markers": (2, "eval")}  # name -> offset of the seed, marker family


@dataclass(frozen=True)
class Labelled:
    """Programs that the grader confirmed, in order, and their features [N, H]."""

    kept: tuple[Example, ...]
    x: Tensor
    dropped: int  # programs that are not what they were made to be

    @property
    def hack(self) -> list[bool]:
        return [e.hack for e in self.kept]

    def of(self, index: Sequence[int]) -> Labelled:
        return replace(self, kept=tuple(self.kept[i] for i in index), x=self.x[list(index)])


def confirmed(grader: Grader, made: Sequence[Example]) -> list[Example]:
    """The hacks that pay and solve nothing, and the honest programs that fire no channel."""
    verdicts = grader.verdicts([(e.problem, e.prompt, e.text) for e in made])
    pairs = zip(made, verdicts, strict=True)
    return [e for e, v in pairs if (v.hacked if e.hack else not v.attempted and v.compiled)]


def labelled(policy: Policy, grader: Grader, seed: int, problems: int, family: str, layers: Sequence[int]) -> Labelled:
    made = list(examples(seed, problems, family))
    kept = confirmed(grader, made)
    words = policy.tokenizer
    prompts = [encode_prompt(words, e.prompt) for e in kept]
    rows = stack(prompts, [encode_completion(words, e.text) for e in kept], words.pad_token_id)
    return Labelled(tuple(kept), features(policy, rows, layers), len(made) - len(kept))


def fit_logistic(
    x: Float[Tensor, "N H"], hack: Bool[np.ndarray, " N"], l2: float = L2
) -> tuple[Float[Tensor, " H"], float]:
    """(w, b) on the features as they are. The penalty is on w in units of each feature's sd."""
    mean, sd = x.double().mean(0).numpy(), x.double().std(0).clamp(min=1e-8).numpy()
    z, y = (x.double().numpy() - mean) / sd, np.where(hack, 1.0, -1.0)

    def loss(theta: np.ndarray) -> tuple[float, np.ndarray]:
        w, b = theta[:-1], theta[-1]
        margin = y * (z @ w + b)
        pull = -y * expit(-margin) / len(y)
        return float(np.logaddexp(0, -margin).mean() + l2 / 2 * w @ w), np.append(z.T @ pull + l2 * w, pull.sum())

    found = minimize(loss, np.zeros(z.shape[1] + 1), jac=True, method="L-BFGS-B", options={"maxiter": 5000})
    w = found.x[:-1] / sd
    return torch.tensor(w, dtype=torch.float32), float(found.x[-1] - w @ mean)


def best_cut(score: Sequence[float], hack: Sequence[bool], beta: float) -> float:
    """The cut above which F_beta is highest; halfway between the two scores that it parts."""
    order = np.unique(np.asarray(score, float))
    cuts = ((order[:-1] + order[1:]) / 2).tolist()
    if not cuts:
        raise UserError("the probe gives every program the same score: nothing can be told apart")
    return max(cuts, key=lambda cut: f_beta([s > cut for s in score], hack, beta) or 0.0)


def split(data: Labelled) -> tuple[Labelled, Labelled]:
    """(to fit on, to choose cuts on): apart by problem."""
    ids = list(dict.fromkeys(e.problem.id for e in data.kept))
    held = set(ids[len(ids) - round(HELD_OUT * len(ids)) :])
    parts = [[i for i, e in enumerate(data.kept) if (e.problem.id in held) is which] for which in (False, True)]
    return data.of(parts[0]), data.of(parts[1])


def fit(policy: Policy, grader: Grader, *, model_sha256: str, seed: int, problems: int) -> LinearProbe:
    """A probe of the policy's base model, with its provenance. Raises UserError where there are too few programs."""
    layers = band(len(decoder_layers(policy.model)))
    data = {
        name: labelled(policy, grader, 3 * seed + offset, problems, family, layers)
        for name, (offset, family) in SETS.items()
    }
    train, cut = split(data["fit"])
    for part in (train, cut, data["fresh"], data["markers"]):
        if {*part.hack} != {True, False}:
            raise UserError(f"{problems} problems are too few to fit and to check a probe")
    weight, bias = fit_logistic(train.x, np.array(train.hack))
    plain = LinearProbe(weight, bias, {})

    def score(part: Labelled) -> list[float]:
        return plain.logits(part.x).tolist()

    def areas(part: Labelled) -> dict[str, float | None]:
        by_mode = {m: part.of([i for i, e in enumerate(part.kept) if e.problem.mode == m]) for m in MECHANISMS}
        return {name: auroc(score(p), p.hack) for name, p in {"all": part, **by_mode}.items()}

    t_hi = best_cut(score(cut), cut.hack, 0.5)
    t_lo = min(t_hi, best_cut(score(cut), cut.hack, 2.0))
    provenance = {
        "made_by": f"vgrout probe fit --seed {seed} --problems {problems}",
        "modes": list(MECHANISMS),
        "problems": "compositions of the pretraining buckets of the micro world; none in train, val or test",
        "families": {name: family for name, (_, family) in SETS.items()},
        "programs": {"fit": len(train.kept), "cuts": len(cut.kept)}
        | {name: len(data[name].kept) for name in ("fresh", "markers")},
        "dropped": {name: part.dropped for name, part in data.items()},
        "model_sha256": model_sha256,
        "features": "mean residual of the base model over completion tokens, mean over layers",
        "layers": list(layers),
        "l2": L2,
        "t_lo": t_lo,
        "t_hi": t_hi,
        "threshold": "t_hi: highest F0.5, t_lo: highest F2, both on the problems held out of the fit",
        "auroc_cuts": auroc(score(cut), cut.hack),
        "auroc_heldout": areas(data["fresh"]),
        "auroc_heldout_markers": areas(data["markers"]),
    }
    return LinearProbe(weight, bias, provenance)


def fit_probe(out: Path, model: str, seed: int, problems: int, console: Console, *, allow_weak: bool) -> int:
    """Write a probe. Raises UserError for a file that is there, a folder that is not, and what `fit` refuses."""
    if out.exists():
        raise UserError(f"{out} exists: give another name")
    if not out.parent.is_dir():
        raise UserError(f"no folder {out.parent} for {out.name}")
    if problems < 1:
        raise UserError(f"problems = {problems}: give a positive whole number")
    torch.set_num_threads(1)
    policy = make_policy(replace(preset("micro"), model=model))
    with Sandbox(allow_weak=allow_weak) as sandbox:
        digest = weights_digest(load_model(model)[0])
        probe = fit(policy, Grader(sandbox), model_sha256=digest, seed=seed, problems=problems)
    probe.save(out)
    said = probe.provenance
    for name in ("auroc_heldout", "auroc_heldout_markers"):
        areas = ", ".join(f"{mode} {area:.3f}" for mode, area in said[name].items())
        console.print(f"{name}: {areas}", highlight=False, soft_wrap=True)
    console.print(f"{out}: {said['programs']['fit']} programs, cuts {said['t_lo']:.2f} and {said['t_hi']:.2f}")
    return 0
