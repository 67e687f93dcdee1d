"""Measures by name, in the report's order. Adding one: a class with `of`, and `make` where it needs weights, and an
entry here."""

from __future__ import annotations

from vgrout.lab.measures.attacks import Elicit, Relearn
from vgrout.lab.measures.base import Measure
from vgrout.lab.measures.ceilings import Leakage, Separation
from vgrout.lab.measures.gate_windows import GateWindows
from vgrout.lab.measures.gradients import Gradients
from vgrout.lab.measures.left_out import LeftOut
from vgrout.lab.measures.onset import Onset
from vgrout.lab.measures.scales import Restore, Shrinkage

MEASURES: dict[str, Measure] = {
    measure.name: measure()
    for measure in (
        Restore,
        Shrinkage,
        Onset,
        LeftOut,
        Leakage,
        Separation,
        GateWindows,
        Gradients,
        Relearn,
        Elicit,
    )
}
