"""Leave one mode out: does a direction suppress a loophole that its pairs no longer show?"""

from __future__ import annotations

from collections.abc import Sequence

from vgrout.lab.evaluate import HEADLINE
from vgrout.lab.labels import modes_in_pairs
from vgrout.lab.measures.base import Cells, Measure, Shown, average, comparable, listed
from vgrout.lab.measures.scales import VANILLA
from vgrout.lab.runs import Run


def _hack(run: Run, mode: str) -> float | None:
    rates = run.cells[HEADLINE]["modes"].get(mode) if run.oracle else None
    return rates["hack"]["mean"] if rates else None


class LeftOut(Measure):
    name = "left-out"
    title = "Loopholes that were taken out of the pairs"
    what = (
        "Deploy hack in one loophole, %, means over seeds: of vanilla, of routeV with all pairs, and of routeV with "
        "pairs of all mechanisms but that one. Suppression S = 1 - hack without its pairs / hack of vanilla."
    )
    needs = "finished runs of `none`, `routeV` and routeV_without_MODE (vgrout decide --arms left-out)"

    def of(self, runs: Sequence[Run], base: Cells | None) -> Shown | None:
        done = {(run.label, run.seed): run for run in runs if run.oracle}
        rows, data = [], []
        for label in sorted({label for label, _ in done if label.startswith("routeV_without_")}):
            mode = label.removeprefix("routeV_without_")
            seeds = [seed for name, seed in sorted(done) if name == label and (VANILLA, seed) in done]
            seeds = [seed for seed in seeds if comparable(done[label, seed], done[VANILLA, seed])]
            if not seeds or mode in modes_in_pairs(done[label, seeds[0]].cfg.pairs):
                continue
            hack = {
                name: [_hack(done[name, seed], mode) if (name, seed) in done else None for seed in seeds]
                for name in (VANILLA, "routeV", label)
            }
            pairs = zip(hack[label], hack[VANILLA], strict=True)
            kept = [1 - own / vanilla if vanilla and own is not None else None for own, vanilla in pairs]
            means = [average(values) for values in hack.values()]
            shown = ["-" if m is None else f"{100 * m:.0f}" for m in means]
            s = average(kept)
            rows.append([mode, str(len(seeds)), *shown, "-" if s is None else f"{s:.2f}", listed(kept, 1.0, 2)])
            data.append({"mode": mode, "seeds": seeds, "hack": dict(hack), "suppression": kept})
        if not rows:
            return None
        return Shown(("mode", "seeds", "none", "routeV, all pairs", "without its pairs", "S", "by seed"), rows, data)
