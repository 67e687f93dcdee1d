"""What `vgrout pairs lint` prints: what the text of the pairs says, and what they do to the direction of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from jaxtyping import Float
from rich.console import Console
from rich.table import Table
from torch import Tensor

from vgrout.config import Config
from vgrout.envs.micro import LIVE
from vgrout.envs.modes import MODES
from vgrout.lab.run import MICRO, make_policy
from vgrout.loop import rows_of_pairs
from vgrout.method.influence import influence
from vgrout.method.policy import Policy
from vgrout.pairs import LintReport, digest, lint, load, unclean
from vgrout.types import Pair, UserError

Sides = Float[Tensor, "C M R"]  # c-gradients of one side of the pairs


def checked(pairs: Sequence[Pair]) -> LintReport:
    """The linter's report, with the markers of the micro world's live modes."""
    return lint(pairs, [m for mode in LIVE for family in ("train", "eval") for m in MODES[mode].markers[family]])


def side_gradients(policy: Policy, pairs: Sequence[Pair]) -> tuple[Sides, Sides]:
    """c-gradients of the hack and of the clean sides, as training extracts them. Raises UserError for a pair that is
    longer than the model reads."""
    sides = [rows_of_pairs(policy, pairs, side) for side in ("hack", "clean")]
    most = getattr(policy.model.config, "max_position_embeddings", None)
    for rows in sides:
        longest = int(rows.length.argmax())
        if most is not None and int(rows.length[longest]) > most:
            size = f"has {int(rows.length[longest])} tokens, the model reads {most}"
            raise UserError(f"pair {pairs[longest].name!r} {size}: choose another model, or --no-model")
    hack, clean = (policy.c_gradients(rows, "deployed") for rows in sides)
    return hack, clean


def score_table(pairs: Sequence[Pair], policy: Policy) -> Table:
    """Margin, influence and left-out margin of every pair, and their sums below."""
    found = influence(*side_gradients(policy, pairs))
    table = Table(
        title="what each pair does to v",
        caption=f"paired accuracy {found.accuracy:.2f}; of each pair under v of the others "
        f"{found.left_out_accuracy:.2f}",
    )
    for column in ("line", "pair", "margin", "cosine of v without it", "margin under v of the others"):
        table.add_column(column, justify="left" if column == "pair" else "right")
    values = zip(pairs, found.margin.tolist(), found.cosine.tolist(), found.left_out.tolist(), strict=True)
    for p, margin, cosine, left_out in values:
        style = "red" if left_out <= 0 else None
        table.add_row(str(p.line), p.name, f"{margin:.2f}", f"{cosine:.3f}", f"{left_out:.2f}", style=style)
    return table


def lint_pairs(selector: str, console: Console, *, model: str | None = None, no_model: bool = False) -> int:
    """Problems and notes of pairs, and the scores of each: of `model`, which for the bundled micro pairs is the
    organism unless `no_model`. Returns 1 when there is a problem.

    Raises UserError for a model together with `no_model`, and for a single pair with a model.
    """
    if model and no_model:
        raise UserError("give --model or --no-model, not both")
    pairs = load(selector)
    if model is None and not no_model and selector.split("#")[0] == MICRO and len(pairs) > 1:
        model = MICRO
    if model and len(pairs) < 2:
        raise UserError("scores take two pairs or more: select more, or --no-model")
    table = score_table(pairs, make_policy(replace(Config(), model=model))) if model else None
    report = checked(pairs)
    console.print(f"{len(pairs)} pairs, sha256 {digest(pairs)[:16]}")
    for problem in report.problems:
        console.print(f"problem: {problem}", style="red", markup=False)
    notes = [*report.notes, *(f"not headline-clean: {why}" for why in [unclean(pairs)] if why)]
    for note in notes:
        console.print(f"note: {note}", markup=False)
    if table is not None:
        console.print(table)
    return 0 if report.ok else 1
