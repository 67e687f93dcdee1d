"""`vgrout lab ceiling`: how well any one direction could tell hacks on a stored trace, with the labels to fit it.

    mean    per module unit( mean_hacked g - mean_solved g ), scored as v is, standardised with the rows of the fit
    lda     w = S^-1 (mean_hacked - mean_solved) over all modules at once (Fisher 1936), S the within-class covariance
            with a tenth of it replaced by its mean variance
g are features of the policy's rollouts, each module's row of length 1. Fitted on even steps, measured on odd ones. It
reads the oracle: a diagnostic ceiling, no arm. Its file is of a kind of its own, and nothing that trains can load it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from rich.console import Console
from torch import Tensor
from torch.nn.functional import normalize

from vgrout.lab.direction import ALL, LEAST, scored, traced
from vgrout.lab.labels import Labelled, modes_in_pairs
from vgrout.lab.ranking import MEASURES, ranking
from vgrout.lab.tables import number_table, print_wide
from vgrout.lab.tensorfile import write_file
from vgrout.lab.trace import Trace
from vgrout.method.direction import cosines
from vgrout.types import UserError

NAME = "ceiling.safetensors"
KIND, FORMAT = "oracle ceiling", 1
SHRINK = 0.1


def features(traces: Sequence[Trace], labelled: Labelled) -> Float[Tensor, "N M R"]:
    """The traced features of the labelled rollouts, in their order."""
    where = {id: (t, i) for t, trace in enumerate(traces) for i, id in enumerate(trace.ids)}
    return torch.stack([traces[t].unit[i] for t, i in (where[id] for id in labelled.id)])


def fit_mean(hacked: Float[Tensor, "A M R"], solved: Float[Tensor, "B M R"]) -> Float[Tensor, "M R"]:
    return normalize(hacked.mean(0) - solved.mean(0), dim=-1)


def fit_lda(hacked: Float[Tensor, "A F"], solved: Float[Tensor, "B F"]) -> Float[Tensor, F]:
    """The direction of length 1."""
    centred = torch.cat((hacked - hacked.mean(0), solved - solved.mean(0))).double()
    within = centred.T @ centred / len(centred)
    plain = torch.eye(len(within), dtype=torch.float64) * within.diagonal().mean().clamp(min=1e-12)
    w = torch.linalg.solve((1 - SHRINK) * within + SHRINK * plain, (hacked.mean(0) - solved.mean(0)).double())
    return (w / w.norm()).float()


def fitted_scores(
    g: Float[Tensor, "N M R"], fit: Bool[Tensor, N], hacked: Bool[Tensor, N], solved: Bool[Tensor, N]
) -> tuple[dict[str, Float[Tensor, N]], dict[str, Tensor]]:
    """Scores of all rows under each ceiling fitted on the rows `fit`, and the tensors that make them."""
    a, b = g[fit & hacked], g[fit & solved & ~hacked]
    mean = fit_mean(a, b)
    cos = cosines(g, mean)
    own = cos[fit & (hacked | solved)]
    centre, sd = own.mean(0), own.std(0).clamp(min=1e-8)
    lda = fit_lda(a.flatten(1), b.flatten(1))
    scores = {"mean difference": ((cos - centre) / sd).mean(1), "lda": g.flatten(1) @ lda}
    return scores, {"oracle_mean": mean, "oracle_centre": centre, "oracle_sd": sd, "oracle_lda": lda}


def ceiling(run: Path) -> tuple[list[dict], dict[str, Tensor]]:
    """Rows of the table, JSON-ready, and the fitted tensors. Raises UserError where a class is too small."""
    traces, labelled = traced(run)
    even = labelled.step % 2 == 0
    hacked, solved = labelled.hacked, labelled.solved & ~labelled.hacked
    for what, mask in (("hacked", hacked), ("solved", solved)):
        for which, half in (("even", even), ("odd", ~even)):
            if (mask & half).sum() < LEAST:
                raise UserError(f"{run}: fewer than {LEAST} {what} rollouts in the traced {which} steps")
    fit, hacks, solutions = (torch.from_numpy(x) for x in (even, hacked, solved))
    ceilings, tensors = fitted_scores(features(traces, labelled), fit, hacks, solutions)
    scores = {"v of each step": scored(traces, labelled, 0, None)[0], **{k: v.numpy() for k, v in ceilings.items()}}
    shown = modes_in_pairs(traces[0].meta["pairs"])
    rows = []
    for name, score in scores.items():
        for mode in (ALL, *sorted(set(labelled.mode))):
            mask = ~even & ((labelled.mode == mode) | (mode == ALL))
            for rest, others in (("not hacked", ~hacked), ("solved", solved)):
                chosen = mask & (hacked | others)
                if min((mask & hacked).sum(), (mask & others).sum()) < LEAST:
                    continue
                found = {k: round(float(v[0]), 6) for k, v in ranking(score[None, chosen], hacked[chosen]).items()}
                cell = {"score": name, "mode": mode, "in_pairs": mode in shown, "against": rest}
                rows.append(cell | {"rollouts": int(chosen.sum()), "hacks": int((mask & hacked).sum())} | found)
    return rows, tensors


def show_ceiling(run: Path, console: Console) -> None:
    """Print the table, and write the fitted directions into the run's folder."""
    rows, tensors = ceiling(run)
    caption = "mean difference, lda: fitted on hacked against solved rollouts of even steps. Ceilings, not methods."
    head = ("score", "mode", "hacks against", "rollouts", "hacks", "AUROC", "AP", "F0.5")
    cells = []
    for row in rows:
        held = "" if row["mode"] == ALL or row["in_pairs"] else " (held out)"
        star = "" if row["score"].startswith("v ") else " *"
        texts = [row["score"] + star, row["mode"] + held, row["against"], str(row["rollouts"]), str(row["hacks"])]
        cells.append([*texts, *(f"{row[key]:.2f}" for key in MEASURES)])
    title = "v beside directions fitted with the oracle's labels, on odd steps"
    print_wide(number_table(title, caption, head, cells, 3), console)
    path = run / NAME
    try:
        write_file(path, KIND, FORMAT, tensors, {"reads_oracle": True, "fitted_on": "even steps"})
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
    console.print(f"* reads the oracle; {path} is of a kind that nothing which trains can load")
