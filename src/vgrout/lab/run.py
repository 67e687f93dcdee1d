"""One run from its configuration: build everything, train, evaluate, record."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console

from vgrout import __version__
from vgrout.adapters import check_kind
from vgrout.arms import ARMS, Given
from vgrout.arms.base import EMPTY
from vgrout.arms.monitors import ActivationScore
from vgrout.arms.steering import Steering
from vgrout.config import Config
from vgrout.dist import ALONE, RankLost, Ranks, broken, joined, place
from vgrout.engines import ENGINES, make_engine
from vgrout.envs.micro_env import check_modes
from vgrout.envs.problem_env import TEACHER, ProblemEnv, check_held, demonstrated, files_digest, read_splits
from vgrout.envs.sandbox import Sandbox
from vgrout.envs.selftest import self_test
from vgrout.envs.task import load_task
from vgrout.envs.worlds import WORLDS
from vgrout.faults import OutOfMemory, is_out_of_memory, warn
from vgrout.lab.checkpoint import FOLDER, Checkpoint, differences, discard_after, whole
from vgrout.lab.evaluate import World
from vgrout.lab.given import access, check_given, keeping, make_given
from vgrout.lab.record import Companion, Recorder, check_folder, claim_folder, disown, finished, one_writer
from vgrout.lab.source import code_digest
from vgrout.loop import Training, adapted
from vgrout.method.judge import JudgeFailed
from vgrout.method.policy import Policy
from vgrout.method.shard import join
from vgrout.models.chat import chat_facts, encode_prompt
from vgrout.models.load import check_device, load_model, model_path, weights_digest
from vgrout.pairs import digest, unclean
from vgrout.pairs import load as load_pairs
from vgrout.signals import Interrupted, heard, held
from vgrout.types import UserError

MICRO = "micro"


@dataclass(frozen=True)
class Workshop:
    """What a run works with, and what it ran on as JSON-ready facts: no clock, no path."""

    policy: Policy
    env: World
    provenance: Mapping[str, Any]
    given: Given = EMPTY


def check(cfg: Config, *, trains: bool = True) -> None:
    """What can be wrong with the names in a configuration, for what `trains` with it or only evaluates. Raises
    UserError. `workshop` finds the rest: it builds."""
    if cfg.arm not in ARMS:
        raise UserError(f"unknown arm {cfg.arm!r}: choose one of {', '.join(ARMS)}")
    check_kind(cfg.adapter, cfg.init)
    if cfg.oracle:
        check_problems(cfg)
    else:
        check_task(cfg)
    watches = getattr(ARMS[cfg.arm], "monitor", None)
    if cfg.score_loss == "grpo" and watches is not None and issubclass(watches, ActivationScore):
        raise UserError(f"{cfg.arm} scores activations, which no loss has a part in: drop --score-loss")
    check_pairs(cfg)
    check_engine(cfg)
    model_path(cfg.model)
    check_device(cfg.device)
    if trains:
        check_given(cfg)
        check_shard(cfg)


def check_shard(cfg: Config) -> None:
    """Raises UserError for a model that is to be in parts where there is one process, or none that can be."""
    if cfg.shard and place()[1] == 1:
        raise UserError("shard = true: start several processes, see docs/gpu.md, or drop --shard")
    if cfg.shard and cfg.score_dtype != "model":
        raise UserError("score_dtype is that of merged weights, which a model in parts has not: drop it, or --shard")


def check_engine(cfg: Config) -> None:
    """Raises UserError where the engine is not installed, or cannot sample as the settings or the arm ask."""
    engine, arm = ENGINES[cfg.engine], ARMS[cfg.arm]
    engine.check(cfg)
    if issubclass(arm, Steering) and arm.phase == "sample" and not engine.runs_hooks:
        raise UserError(f"{cfg.arm} edits activations while it samples, which the engine {cfg.engine} cannot: drop one")


def check_pairs(cfg: Config) -> None:
    """Raises UserError for pairs that are not for the arm: one that needs tagged pairs gets them alone, and no other
    arm that reads pairs gets any of them."""
    pairs, arm = load_pairs(cfg.pairs), ARMS[cfg.arm]
    if arm.pairs_tag and (bare := [p.name for p in pairs if arm.pairs_tag not in p.tags]):
        raise UserError(
            f"{cfg.arm} needs pairs that all have the tag {arm.pairs_tag}; in {cfg.pairs} {len(bare)} have not, "
            f"{bare[0]!r} first"
        )
    tags = {other.pairs_tag for other in ARMS.values()} - {"", arm.pairs_tag}
    reads = arm.scores or access(cfg) == "L1"
    if reads and (foreign := [p.name for p in pairs if not tags.isdisjoint(p.tags)]):
        raise UserError(f"{cfg.pairs}: {foreign[0]!r} holds no hack (tag {', '.join(tags)}): it is not for {cfg.arm}")


def check_problems(cfg: Config) -> None:
    """What an environment of problems cannot be asked for. Raises UserError."""
    teaches = cfg.teacher_n and cfg.teacher_off_step
    if cfg.env == MICRO:
        check_modes(cfg.modes)
        check_modes(cfg.label_modes)
    elif cfg.env in WORLDS:
        check_held((*cfg.modes, *cfg.label_modes), WORLDS[cfg.env].problems("train"))
        if teaches and WORLDS[cfg.env].pool is None:
            raise UserError(f"{cfg.env} has no demonstrations: set --teacher-n 0")
    else:
        check_held((*cfg.modes, *cfg.label_modes), read_splits(cfg.env)["train"])
        if teaches and demonstrated(cfg.env) is None:
            raise UserError(f"{cfg.env} has no demonstrations (no {TEACHER}): set --teacher-n 0")
    if cfg.modes and not set(cfg.label_modes) <= set(cfg.modes):
        raise UserError(f"label_modes = {' '.join(cfg.label_modes)}: not all of them are among the run's modes")


def check_task(cfg: Config) -> None:
    """What a task without an oracle cannot be asked for. Raises UserError."""
    if ARMS[cfg.arm].reads_oracle:
        raise UserError(f"{cfg.arm} reads the oracle: {cfg.env} has no oracle")
    if not ARMS[cfg.arm].loophole:
        raise UserError(f"{cfg.arm} trains without loopholes: {cfg.env} has none to close")
    if cfg.modes:
        raise UserError(f"{cfg.env} has no modes: drop --modes")
    if cfg.max_prompt:
        raise UserError(f"{cfg.env} gives its prompts as they are: drop --max-prompt")
    if cfg.teacher_n and cfg.teacher_off_step:
        raise UserError(f"{cfg.env} has no demonstrations: set --teacher-n 0")
    load_task(Path(cfg.env))


def make_policy(cfg: Config) -> Policy:
    return _policy(cfg)[0]


def _policy(cfg: Config, ranks: Ranks = ALONE, *, shard: bool = False) -> tuple[Policy, str]:
    """The policy, and the digest of the weights under its adapter. What is to be in parts is on the CPU until then."""
    own = ranks.device(cfg.device)
    check_device(own)
    device = "cpu" if shard else own
    how = {"dtype": cfg.dtype, "device": device, "attn": cfg.attn, "template": cfg.chat_template}
    model, tokenizer = load_model(cfg.model, **how)
    weights = weights_digest(model)
    return adapted(cfg, model, tokenizer, load_pairs(cfg.pairs)), weights


def pairs_facts(cfg: Config) -> dict[str, Any]:
    """What provenance.json says of the pairs: their digest, and whether results on them may be a headline."""
    pairs = load_pairs(cfg.pairs)
    why = unclean(pairs)
    return {
        "pairs_sha256": digest(pairs),
        "headline_clean": not why,
        **({"not_headline_clean": why} if why else {}),
    }


@contextmanager
def workshop(cfg: Config, *, trains: bool = True, ranks: Ranks = ALONE) -> Iterator[Workshop]:
    """Everything that a run needs; the sandbox closes with it. Each of several processes has its own, and talks to no
    other here. Raises UserError where something does not load, and SandboxError where the sandbox fails its self-test.
    """
    check(cfg, trains=trains)
    torch.set_num_threads(cfg.threads)
    policy, weights = _policy(cfg, ranks, shard=cfg.shard and trains)
    engine = make_engine(cfg, policy.model, policy.tokenizer, policy.adapter, ranks)
    engine.start()
    given, own = make_given(cfg, weights) if trains else (EMPTY, {})
    facts = {
        "vgrout": __version__,
        "code_sha256": code_digest(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "model_sha256": weights,
        **chat_facts(policy.tokenizer, policy.model),
        **engine.facts(),
        **pairs_facts(cfg),
        **own,
        **({"processes": ranks.world} if ranks.world > 1 else {}),
    }
    if not cfg.oracle:
        file = Path(cfg.env)
        task = {"task_sha256": sha256(file.read_bytes()).hexdigest(), "sandbox": "none: the reward is the user's own"}
        yield Workshop(policy, load_task(file), facts | task, given)
        return
    with Sandbox(allow_weak=cfg.allow_weak_sandbox) as sandbox:
        self_test(sandbox)
        env, of_problems = _problems(cfg, sandbox, policy)
        provenance = (
            facts
            | of_problems
            | {
                "sandbox": sandbox.tier,
                "weak_sandbox": sandbox.weak,
                "allow_weak_sandbox": cfg.allow_weak_sandbox,
            }
        )
        yield Workshop(policy, env, provenance, given)


def _problems(cfg: Config, sandbox: Sandbox, policy: Policy) -> tuple[ProblemEnv, dict[str, Any]]:
    """The environment of problems, and what provenance.json says of it."""
    loophole = ARMS[cfg.arm].loophole
    if cfg.env in WORLDS:
        env, facts = WORLDS[cfg.env].env(sandbox, loophole=loophole, modes=cfg.modes), {}
    else:
        pool = demonstrated(cfg.env) if cfg.teacher_n and cfg.teacher_off_step else None
        env = ProblemEnv(sandbox, read_splits(cfg.env), loophole=loophole, pool=pool, modes=cfg.modes)
        facts = {"task_sha256": files_digest(cfg.env)}
    if cfg.max_prompt:
        facts["too_long"] = env.keep(
            lambda prompt: len(encode_prompt(policy.tokenizer, prompt)) <= cfg.max_prompt,
            f"has prompts of {cfg.max_prompt} tokens at most: raise --max-prompt",
        )
    if cfg.env not in WORLDS and cfg.teacher_n and cfg.teacher_off_step and not env.covered():
        raise UserError(f"{demonstrated(cfg.env)} demonstrates none of the training problems: set --teacher-n 0")
    return env, facts


def header(provenance: Mapping[str, Any]) -> str:
    """What a run says of itself before it starts."""
    known = [what for what in ("model", "pairs", "task") if f"{what}_sha256" in provenance]
    hashes = ", ".join(f"{what} {provenance[f'{what}_sha256'][:12]}" for what in known)
    return f"vgrout {provenance['vgrout']}, {hashes}, sandbox {provenance['sandbox']}"


def pairs_note(provenance: Mapping[str, Any]) -> str:
    """What a table must say of pairs that nobody wrote; empty where they are authored."""
    why = provenance.get("not_headline_clean")
    return f"NOT HEADLINE-CLEAN: {why}." if why else ""


def sandbox_note(provenance: Mapping[str, Any]) -> str:
    """What a table must say of a weak sandbox; empty where it was none."""
    return f"WEAK SANDBOX ({provenance['sandbox']})." if provenance.get("weak_sandbox") else ""


def run(cfg: Config, out: Path, *, force: bool = False, console: Console | None = None) -> dict:
    """Train one arm and evaluate it into `out`. Returns the evaluation's cells.

    Raises UserError, RunFailed, and Interrupted where somebody listens to signals: then its state is kept.
    """
    with joined() as ranks, ExitStack() as open_:
        ranks.first(lambda: check_folder(out, force=force))
        shop = shared(cfg, ranks, open_)
        ranks.first(lambda: claim_folder(out, force=force))  # only now: what does not load leaves nothing
        try:
            with ExitStack() as lock:
                ranks.first(lambda: lock.enter_context(one_writer(out)))
                return _run(cfg, out, shop, shop.provenance, None, console)
        except UserError:  # settings that the arm cannot be made from, for one
            if ranks.leads:
                disown(out)
            raise


def shared(cfg: Config, ranks: Ranks, open_: ExitStack) -> Workshop:
    """The workshop of a run that has one process, or of each of its processes. `open_` closes it."""
    shop = ranks.agree(lambda: open_.enter_context(workshop(cfg, ranks=ranks)))
    join(shop.policy, ranks, ranks.device(cfg.device), shard=cfg.shard)
    return shop


def resume(out: Path, *, allow_drift: bool = False, console: Console | None = None) -> dict:
    """Go on with the run in `out` where its newest whole checkpoint is, or from the start; what is finished stays.

    Returns the evaluation's cells. Raises what `run` raises, and UserError where configuration, code, model, pairs,
    task or versions are not what the checkpoint was made with, unless `allow_drift`: then provenance.json says so.
    """
    with joined() as ranks, ExitStack() as open_:
        ranks.first(lambda: check_there(out))
        ranks.first(lambda: open_.enter_context(one_writer(out)))
        cfg = ranks.first(lambda: Config.read(out / "config.json"))
        if cells := ranks.first(lambda: results_of(out)):
            return cells
        shop = shared(cfg, ranks, open_)
        start, provenance = ranks.first(lambda: continued(out, cfg, shop, allow_drift=allow_drift))
        return _run(cfg, out, shop, provenance, start, console)


def check_there(out: Path) -> None:
    """Raises UserError where there is no run to go on with."""
    if not os.path.isdir(out):  # False, too, where it cannot be looked up
        raise UserError(f"no run at {out}")


def results_of(out: Path) -> dict | None:
    """The cells of a run that is finished."""
    return json.loads((out / "eval.json").read_text())["cells"] if finished(out) else None


def continued(
    out: Path, cfg: Config, shop: Workshop, *, allow_drift: bool
) -> tuple[Checkpoint | None, Mapping[str, Any]]:
    """Where a run goes on, and its provenance from there. Raises UserError as `resume` does."""
    start = newest(out)
    drifts = _drifts(out) if start else []
    changed = differences(start.stamp, stamp(cfg, shop.provenance)) if start else []
    if changed and not allow_drift:
        raise UserError(f"{out} was made with other {', '.join(changed)}; --allow-drift goes on all the same")
    if changed:
        drifts.append({"step": start.step, "changed": changed})
    return start, {**shop.provenance, **({"drift": drifts} if drifts else {})}


def stamp(cfg: Config, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint and the run that goes on from it must share."""
    return {**{f"config.{key}": value for key, value in asdict(cfg).items()}, **provenance}


def newest(out: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole and whose logs are all there. Raises UserError for one of another format."""
    for checkpoint in whole(out / FOLDER):
        files = {name: out / f"{name}.jsonl" for name in checkpoint.logs}
        short = [n for n, file in files.items() if not file.is_file() or file.stat().st_size < checkpoint.logs[n]]
        if not short:
            return checkpoint
        warn(f"{out}: {', '.join(short)} are shorter than at step {checkpoint.step}: going back to an earlier one")
    return None


def _drifts(out: Path) -> list[dict]:
    """What had changed when the run went on earlier."""
    try:
        return json.loads((out / "provenance.json").read_text()).get("drift", [])
    except (OSError, ValueError) as error:
        raise UserError(f"{out}: cannot read provenance.json: {error}") from None


def _run(
    cfg: Config,
    out: Path,
    shop: Workshop,
    provenance: Mapping[str, Any],
    start: Checkpoint | None,
    console: Console | None,
) -> dict:
    leads = shop.policy.ranks.leads
    console = console if leads else None
    if console is not None:
        console.print(header(shop.provenance), markup=False, highlight=False, soft_wrap=True)
    with keeping(shop.given, cfg, out) if leads else nullcontext(shop.given) as given:
        return _train(cfg, out, shop, given, provenance, start, console)


def _train(
    cfg: Config,
    out: Path,
    shop: Workshop,
    given: Given,
    provenance: Mapping[str, Any],
    start: Checkpoint | None,
    console: Console | None,
) -> dict:
    training = Training(cfg, shop.policy, shop.env, load_pairs(cfg.pairs), given)
    if start is not None:
        training.restore(start.state)
        if console is not None:
            console.print(f"going on after step {start.step}", highlight=False)
    try:
        if shop.policy.ranks.leads:
            discard_after(out / FOLDER, start.step if start else -1)
            kept = {"state": training.state, "stamp": stamp(cfg, shop.provenance), "start": start}
            recorder = Recorder(cfg, shop.policy, shop.env, out, provenance, **kept)
        else:
            recorder = Companion(cfg, shop.policy, shop.env)
    except OSError as error:
        raise UserError(f"cannot write in {out}: {error.strerror}") from None

    def goes_on() -> str:
        kept = f"{recorder.saved or 0} of {cfg.steps} steps are kept"
        return f"{kept}; go on with `vgrout train --resume {out}`"

    def gone(lost: RankLost) -> RankLost:
        """What is said of another process that ended. A signal that comes meanwhile does not keep it from being said:
        whoever started the processes ends them all."""
        with held():
            if training.begun:
                recorder.checkpoint(training.step)
            said = lost.said or not shop.policy.ranks.leads
            raise RankLost(f"step {training.step}: {lost}: {goes_on()}", said=said)

    try:
        training.run(recorder)
        return recorder.finish()
    except Interrupted as signal:
        heard()
        recorder.checkpoint(training.step)
        raise Interrupted(signal.number, f"{signal}: {goes_on()}") from None
    except OutOfMemory as short:
        if training.begun:  # what an arm does before the first step is whole, or starts anew
            recorder.checkpoint(training.step)
        raise OutOfMemory(f"step {training.step}: {short}: {goes_on()}") from None
    except RankLost as lost:
        raise gone(lost) from None
    except JudgeFailed as silent:  # it is asked before a step changes anything
        recorder.checkpoint(training.step)
        raise JudgeFailed(f"step {training.step}: {silent}: {goes_on()}") from None
    except (MemoryError, RuntimeError) as error:
        if broken(error) and shop.policy.ranks.world > 1:
            raise gone(RankLost("another process of the run has ended or does not answer")) from error
        if not is_out_of_memory(error):
            raise
        # Perhaps in the midst of an update: no state to save.
        raise OutOfMemory(f"step {training.step}: not enough memory: {goes_on()}") from error
    finally:
        recorder.close()
