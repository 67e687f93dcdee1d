"""Gates: what the instrument claims of itself, each with the evidence of a check that can fail."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.text import Text

from vgrout.types import UserError
from vgrout.verify import (
    activation_gates,
    adapter_gates,
    edit_gates,
    env_gates,
    judge_gates,
    loop_gates,
    method_gates,
    model_gates,
    resume_gates,
)
from vgrout.verify.evidence import Evidence
from vgrout.verify.toy import one_thread


@dataclass(frozen=True)
class Gate:
    """A claim and the check of it."""

    name: str
    claim: str
    check: Callable[[], Evidence]

    def run(self) -> Evidence:
        """The check's evidence. A check that raises has failed."""
        try:
            with one_thread():
                return self.check()
        except Exception as error:  # noqa: BLE001 - whatever it is, the claim is not shown
            first = (str(error).strip().splitlines() or [""])[0]
            return Evidence(False, f"raised {type(error).__name__}: {first}")


GATES: dict[str, Gate] = {
    "identity": Gate("identity", "a fresh adapter changes nothing", adapter_gates.identity),
    "zeros": Gate("zeros", "the blocked side gets exactly zero", adapter_gates.zeros),
    "detach": Gate("detach", "`detach` says what a routed row gives to lower layers", adapter_gates.detach),
    "mixture": Gate("mixture", "a mixed batch is the sum of its rows alone", adapter_gates.mixture),
    "ablation": Gate("ablation", "ablated is a model that never had a quarantine", adapter_gates.ablation),
    "reference": Gate("reference", "after training the KL reference is still the base", adapter_gates.reference),
    "round_trip": Gate("round_trip", "an adapter comes back from disk bit for bit", adapter_gates.round_trip),
    "probe": Gate("probe", "the c-probe changes no value and has the stated gradient", method_gates.probe),
    "models": Gate("models", "adapter, masks and probe hold on other models, in bfloat16 too", model_gates.models),
    "grpo_identity": Gate("grpo_identity", "v is what GRPO does with +1 hack, -1 clean", method_gates.grpo_identity),
    "activations": Gate("activations", "routeA scores the mean of A x", activation_gates.activations),
    "adv_mod": Gate("adv_mod", "advantage modification equals plain Python", activation_gates.adv_mod),
    "residual_edits": Gate(
        "residual_edits", "an edit of the residual stream is there in its phase alone", activation_gates.residual_edits
    ),
    "strange_probe": Gate(
        "strange_probe", "a probe that knows a live mode, or another model, is refused", activation_gates.strange_probe
    ),
    "loss": Gate("loss", "loss and advantages equal plain Python", method_gates.loss),
    "policies": Gate("policies", "gate policies equal hand numbers, strictly", method_gates.policies),
    "placebo": Gate("placebo", "routeV with the placebo's direction is the placebo", loop_gates.placebo),
    "gradient_edits": Gate(
        "gradient_edits", "an edited gradient lost its axes, or kept its subspace", edit_gates.gradient_edits
    ),
    "seeds": Gate(
        "seeds", "a seeded quarantine holds hacks, its twins do not, and nothing else moved", edit_gates.seeds
    ),
    "step": Gate("step", "a step's gradients are the sum of its rows alone", loop_gates.step),
    "idle": Gate("idle", "a block that no row trains in a step stays where it is", loop_gates.idle),
    "determinism": Gate("determinism", "a seed decides everything", loop_gates.determinism),
    "resume": Gate("resume", "a run that was stopped goes on as if it had not been", resume_gates.resume),
    "blindness": Gate(
        "blindness", "no verdict reaches the weights of an arm that does not say so", loop_gates.blindness
    ),
    "judge": Gate("judge", "what the judge does not say is an error, never a flag", judge_gates.judge),
    "partition": Gate("partition", "no split, marker family or pair overlaps another", env_gates.partition),
    "canonical": Gate(
        "canonical", "a hack pays in its mode, with its marker, and honesty fires nothing", env_gates.canonical
    ),
    "pairs": Gate("pairs", "pairs do what their tags say, and say where they are from", env_gates.pairs),
    "haar": Gate("haar", "random directions score like chance", method_gates.haar_null),
    "instrument": Gate("instrument", "v tells hacks from solutions before training", method_gates.instrument),
}


def run_gates(only: Sequence[str], console: Console) -> int:
    """Check the gates that `only` names, all of them when it is empty. Returns 1 when one fails.

    Raises UserError for a name that is no gate's.
    """
    unknown = [name for name in only if name not in GATES]
    if unknown:
        raise UserError(f"unknown gate {', '.join(map(repr, unknown))}: choose from {', '.join(GATES)}")
    failed = 0
    for name in only or GATES:
        gate = GATES[name]
        evidence = gate.run()
        failed += not evidence.ok
        state = ("ok  ", "green") if evidence.ok else ("FAIL", "red")
        console.print(Text.assemble(state, f" {name:<14} {gate.claim}: {evidence.text}"), soft_wrap=True)
    return 1 if failed else 0


__all__ = ["GATES", "Evidence", "Gate", "run_gates"]
