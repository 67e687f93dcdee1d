"""The command line. A user's mistake is one line and exit code 2; a command that a signal ended leaves with 128 and the
signal's number."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console

from vgrout.config import Config, preset
from vgrout.dist import RankLost, leave, place
from vgrout.signals import Interrupted, listening
from vgrout.types import RunFailed, UserError

console = Console(soft_wrap=False)
Settings = Annotated[Config, tyro.conf.arg(name="")]
NoPair = tyro.conf.FlagCreatePairsOff[bool]
Tracker = Literal["trackio", "wandb"]
# Commands `vgrout lab NAME` that measure runs: from their records, and on their weights.
READ = {
    "restore": "what comes back with the quarantine",
    "shrinkage": "how far arms lie off the line of a model that only learns less",
    "onset": "when hacking begins: delay or prevention",
    "left-out": "suppression in loopholes that were taken out of the pairs",
    "leakage": "how much hacking an arm let through, by routing true labels of a part",
    "separation": "which adapter separates, at which accuracy of labels",
    "gate-windows": "the gate as a classifier over training",
}
MADE = {
    "gradients": "which block learns from hacks, and absorption, at checkpoints",
    "relearn": "how fast hacking comes back by fine-tuning and by GRPO",
    "elicit": "what brings hacking out of what ships: invitation, a shown hack, more samples",
}
QUEUE, JOURNAL = Path("runs/queue"), Path("RESEARCH_JOURNAL.md")
DEFAULT_ARMS = ("none", "absorb", "coin_flip", "placebo", "routeV", "oracle_route", "rl_baseline")


def _given(args: list[str], flag: str) -> str | None:
    """The value of a flag before the real parsing: defaults of the other flags depend on it."""
    for i, arg in enumerate(args):
        if arg == flag and i + 1 < len(args):
            return args[i + 1]
        if arg.startswith(flag + "="):
            return arg.split("=", 1)[1]
    return None


def commands(base: Config, queued: Sequence[str] = ()) -> dict:
    """Every command with `base` as its default configuration; `queued` is what stands behind the -- of `queue add`."""

    def decide(
        out: Path = Path("runs/decision"),
        cfg: Settings = base,
        arms: tuple[str, ...] = DEFAULT_ARMS,
        seeds: tuple[int, ...] = (0,),
        workers: int = 2,
        force: bool = False,
        plan: bool = False,
        config: Path | None = None,
        decision: Path | None = None,
        records: Path | None = None,
        track: Tracker | None = None,
        track_project: str = "vgrout",
    ) -> int:
        """The decision experiment: train every arm, evaluate every arm alike, show who hacks and who solves.

        The same command goes on with an experiment that was interrupted.

        Args:
            out: Folder of the experiment.
            cfg: Settings of every run.
            arms: Interventions and variants, see `vgrout arms --variants`; or all, or all-variants.
            seeds: Training seeds.
            workers: Runs at the same time, one CPU thread each.
            force: Replace an experiment that is in the folder.
            plan: Only print runs, minutes and disk.
            config: Take the settings from this config.json.
            decision: Preregistered decision, which names preset, arms and seeds (docs/statistics.md).
            records: Folder for a compact record of each run, written as it ends; runs that have one are not made again.
            track: Send numbers of each run to this tracker, by a process beside the runs; see `vgrout track`.
            track_project: The tracker's project.
        """
        from vgrout.lab.decide import decide as work
        from vgrout.lab.prereg import read as read_decision
        from vgrout.lab.track import beside

        written = None if decision is None else read_decision(decision)
        named = {"arms": arms, "seeds": seeds} if written is None else {"arms": written.arms, "seeds": written.seeds}
        kept = {"prereg": written, "records": records}
        goes_on = not force and os.path.isfile(out / "plan.json")
        with listening(), beside(None if plan else track, out, track_project, goes_on=goes_on):
            return work(cfg, **named, out=out, workers=workers, force=force, plan=plan, console=console, **kept)

    def sweep(
        out: Path = Path("runs/sweep"),
        cfg: Settings = base,
        arms: tuple[str, ...] = ("none", "routeV"),
        seeds: tuple[int, ...] = (0,),
        over: tuple[str, ...] = (),
        pool: str = "local",
        workers: int = 2,
        address: str = "auto",
        retries: int = 1,
        only_print: Annotated[NoPair, tyro.conf.arg(name="print")] = False,
        config: Path | None = None,
        track: Tracker | None = None,
        track_project: str = "vgrout",
    ) -> int:
        """Arms x seeds x settings as runs of their own: here, on a Ray cluster, or as a list of commands.

        The same command goes on with a sweep that was interrupted: finished runs are skipped.

        Args:
            out: Folder of the sweep; on a cluster one that every machine sees under this path.
            cfg: Settings of every run.
            arms: Interventions and variants, see `vgrout arms --variants`; or a set of them.
            seeds: Training seeds.
            over: Settings to vary, each NAME=VALUE,VALUE: every combination is run.
            pool: Where runs go: local, or ray.
            workers: Runs at the same time on this machine.
            address: Of the Ray cluster; auto: the one that this machine belongs to.
            retries: Further tries of a run that failed, unless its settings are at fault.
            only_print: Run nothing: print the command of each run that is left, for a scheduler of your own.
            config: Take the settings from this config.json.
            track: Send numbers of each run to this tracker, by a process beside the runs; see `vgrout track`.
            track_project: The tracker's project.
        """
        from vgrout.lab.sweep import RECORD
        from vgrout.lab.sweep import sweep as work
        from vgrout.lab.track import beside

        if only_print and track is not None:
            raise UserError("--print runs nothing to track: drop --track, and follow the runs with `vgrout track`")
        how = {"pool": pool, "workers": workers, "address": address, "retries": retries, "only_print": only_print}
        with listening(), beside(track, out, track_project, goes_on=os.path.isfile(out / RECORD)):
            return work(cfg, arms, seeds, over, out, console, **how)

    def show(out: tyro.conf.Positional[Path], seeds: tuple[int, ...] = (), markdown: bool = False) -> int:
        """Print the table of a finished experiment again.

        Args:
            out: Folder of the experiment.
            seeds: Only these seeds.
            markdown: As Markdown.
        """
        from vgrout.lab.decide import show as work

        work(out, seeds, markdown, console)
        return 0

    def train(
        out: Path | None = None,
        cfg: Settings = base,
        force: bool = False,
        config: Path | None = None,
        resume: Path | None = None,
        allow_drift: bool = False,
        track: Tracker | None = None,
        track_project: str = "vgrout",
    ) -> int:
        """Train one arm and evaluate it, or go on with a run that was interrupted.

        Args:
            out: Folder of a new run.
            cfg: Settings of the run.
            force: Replace a run that is in the folder.
            config: Take the settings from this config.json.
            resume: Folder of an interrupted run, which has its settings.
            allow_drift: With --resume: go on although settings, code or data have changed.
            track: Send the run's numbers to this tracker, by a process beside it; see `vgrout track`.
            track_project: The tracker's project.
        """
        from vgrout.lab import run as work
        from vgrout.lab.track import beside

        check_target(out, resume)
        if allow_drift and resume is None:
            raise UserError("--allow-drift goes with --resume")
        first = place()[0] == 0  # of several processes, the one that writes and speaks
        tracker = track if first else None
        with listening(), beside(tracker, out or resume, track_project, goes_on=resume is not None):
            if resume is None:
                work.run(cfg, out, force=force, console=console)
            else:
                work.resume(resume, allow_drift=allow_drift, console=console)
        if first:
            console.print(f"{(out or resume) / 'eval.json'}")
        return 0

    def track(
        runs: tyro.conf.Positional[tuple[Path, ...]],
        tracker: Tracker = "trackio",
        project: str = "vgrout",
        follow: NoPair = False,
    ) -> int:
        """Send what runs recorded to a tracker: numbers and settings, never a rollout's text; what went is not sent
        again.

        Args:
            runs: Folders of runs or experiments, finished or not.
            tracker: Where to: trackio (extra `track`), or wandb.
            project: The tracker's project. Runs of an experiment are one group in it.
            follow: Also send what comes, until the runs are finished.
        """
        from vgrout.lab.track import track as work

        if not runs:
            raise UserError("give folders of runs")
        with listening():
            work(runs, tracker, project, console, live=follow)
        return 0

    def evaluate(
        run: tyro.conf.Positional[Path],
        split: str = "test",
        rollouts: int | None = None,
        device: str | None = None,
    ) -> int:
        """Evaluate a finished run again: every cell of the deploy evaluation, as a table.

        Args:
            run: Folder of the run.
            split: Problems: val or test.
            rollouts: Rollouts per cell; the run's own setting when not given.
            device: Where the model runs: cpu, cuda or cuda:N; the run's own setting when not given.
        """
        from vgrout.lab.reeval import reevaluate

        reevaluate(run, split, rollouts, console, device)
        return 0

    def export(
        run: tyro.conf.Positional[Path],
        out: tyro.conf.Positional[Path],
        full: bool = False,
        merged: bool = False,
        dtype: Literal["float32", "bfloat16"] = "float32",
        base: str = "",
        force: bool = False,
    ) -> int:
        """Write what a finished run ships as a PEFT LoRA folder or a plain checkpoint, with a model card.

        Args:
            run: Folder of the run.
            out: Folder to write.
            full: With the quarantine live, which is not what ships.
            merged: A plain checkpoint, the only form of adapters that are as wide as the model's weights.
            dtype: Numbers of the written weights.
            base: Name of the base model for those who load it, as on a hub. Its folder when not given; the bundled
                model goes along as a copy.
            force: Replace an export that is in the folder.
        """
        from vgrout.lab.export import export as work

        work(run, out, console, full=full, merged=merged, dtype=dtype, base=base, force=force)
        return 0

    def model_check(model: tyro.conf.Positional[str], cfg: Settings = base, out: Path | None = None) -> int:
        """Does the method hold on a model: adapter, masks, probe, sampling, template and memory, in a minute.

        The settings are those of the run that is planned: `--preset leetcode-4b`, `--dtype bfloat16`, ...

        Args:
            model: Folder of a causal language model, or the name of one that was downloaded.
            cfg: Settings of the run.
            out: File for the findings as JSON.
        """
        from vgrout.lab.model_check import check_model

        return check_model(replace(cfg, model=model), console, out)

    def model_download(name: tyro.conf.Positional[str], out: Path | None = None, revision: str | None = None) -> int:
        """Fetch a model from the Hugging Face hub, so that `--model NAME` finds it. Nothing else fetches anything.

        Args:
            name: Name on the hub, as in Qwen/Qwen3-4B.
            out: Folder to put it in instead of the hub's cache; then `--model FOLDER`.
            revision: Branch, tag or commit.
        """
        from vgrout.models.download import download

        print(download(name, out, revision))
        return 0

    def make_report(
        runs: tyro.conf.Positional[tuple[Path, ...]], out: Path = Path("report.html"), figures: Path | None = None
    ) -> int:
        """One page about runs that opens from disk: verdict, arms, figures, what they were made with.

        Args:
            runs: Folders of experiments, runs or records.
            out: File of the page, which is replaced.
            figures: Also write each figure as SVG and PNG into this folder.
        """
        from vgrout.lab.report import report as work

        return work(runs, out, figures, console)

    def view(runs: tyro.conf.Positional[tuple[Path, ...]], port: int = 0) -> int:
        """The page of `vgrout report` with every rollout, served to this machine alone until Ctrl-C.

        Args:
            runs: Folders of experiments, runs or records.
            port: Port to serve on; any free one for 0.
        """
        from vgrout.lab.view import view as work

        work(runs, port, console)
        return 0

    def sql(runs_and_query: tyro.conf.Positional[tuple[str, ...]], out: Path | None = None) -> int:
        """Ask runs: the tables are `runs`, `steps` and `rollouts`, their columns stand in docs/metrics.md.

        Args:
            runs_and_query: Folders of experiments, runs or records, and at the end a query, as duckdb has it.
            out: Write the answer to this .csv, .json or .parquet file instead.
        """
        from vgrout.lab.tabular import ask

        if len(runs_and_query) < 2:
            raise UserError('give folders and a query: vgrout sql RUNS "SELECT ..."')
        *folders, query = runs_and_query
        return ask([Path(folder) for folder in folders], query, out, console)

    def publish(runs: tyro.conf.Positional[tuple[Path, ...]], out: Path, force: bool = False) -> int:
        """A data set of runs: Parquet of every step and rollout with scores and verdicts, a card, hashes.

        Args:
            runs: Folders of experiments, runs or records.
            out: Folder of the data set.
            force: Replace one that is in the folder.
        """
        from vgrout.lab.tabular import publish as work

        return work(runs, out, console, force=force)

    def lab_metrics(markdown: bool = False) -> int:
        """What each field of a run's records means.

        Args:
            markdown: As docs/metrics.md.
        """
        from vgrout.lab.fields import TABLES
        from vgrout.lab.fields import markdown as page

        if markdown:
            print(page(), end="")
            return 0
        for name, (what, known) in TABLES.items():
            console.print(f"[bold]{name}[/bold]: {what}", soft_wrap=True)
            for field, meaning in known.items():
                console.print(f"  {field:<24} {meaning}", markup=False, highlight=False, soft_wrap=True)
        return 0

    def arms(variants: bool = False) -> int:
        """List the interventions: what tells rollouts apart, what follows from it, which hooks of the loop it takes.

        Args:
            variants: Also arms with other settings, which `vgrout decide --arms` takes by name.
        """
        from vgrout.lab.grid import arms_table
        from vgrout.lab.tables import print_wide

        for table in arms_table(variants):
            print_wide(table, console)
        return 0

    def modes(markdown: bool = False, allow_weak_sandbox: bool = False) -> int:
        """Every loophole: its hint, what the grader looks at, and what a hack and a solution earn.

        Args:
            markdown: As the page docs/modes.md, with prompts and programs.
            allow_weak_sandbox: Run programs even where the machine gives them too little isolation.
        """
        from vgrout.lab.modes_page import show as work

        work(markdown, console, allow_weak=allow_weak_sandbox)
        return 0

    def grade(
        problems: tyro.conf.Positional[Path],
        submissions: tyro.conf.Positional[Path],
        mode: str | None = None,
        workers: int = 1,
        allow_weak_sandbox: bool = False,
    ) -> int:
        """Grade programs: one JSON line per submission, in its order; exit code 1 when a line cannot be graded.

        Args:
            problems: Problems, one JSON object a line, see docs/grading.md.
            submissions: Lines with problem_id and code, or completion, whose fences are stripped as in training.
            mode: Give every problem this loophole, see `vgrout modes`.
            workers: Programs at the same time.
            allow_weak_sandbox: Run untrusted programs even where the machine gives them too little isolation.
        """
        from vgrout.lab.grading import grade_file

        return grade_file(problems, submissions, mode=mode, workers=workers, allow_weak=allow_weak_sandbox)

    def data_leetcode(
        out: Path,
        source: Annotated[Path | None, tyro.conf.arg(name="from")] = None,
        modes: tuple[str, ...] = (),
        seed: int = 0,
        workers: int = 1,
        force: bool = False,
        allow_weak_sandbox: bool = False,
    ) -> int:
        """Prepare LeetCode problems from the JSONL of Ariahw, Engels and Nanda, and print base facts.

        Args:
            out: Folder of the problems: train.jsonl, val.jsonl, test.jsonl and report.json.
            source: Folder with both files of the public release, or one file; a single file of another name is split.
                The working folder when not given.
            modes: Loopholes to deal out; all when not given, see `vgrout modes`.
            seed: Of splits and modes.
            workers: Programs at the same time.
            force: Replace what is in the folder.
            allow_weak_sandbox: Run untrusted programs even where the machine gives them too little isolation.
        """
        from vgrout.lab.data import prepare_leetcode

        return prepare_leetcode(
            source, out, console, modes=modes, seed=seed, force=force, workers=workers, allow_weak=allow_weak_sandbox
        )

    def env_audit(
        problems: tyro.conf.Positional[Path],
        out: Path | None = None,
        workers: int = 1,
        allow_weak_sandbox: bool = False,
    ) -> int:
        """Check what the tests of problems are worth; exit code 1 when a problem misses.

        Args:
            problems: Problems, one JSON object a line, see docs/grading.md.
            out: Also write one JSON line per problem to this file.
            workers: Programs at the same time.
            allow_weak_sandbox: Run untrusted programs even where the machine gives them too little isolation.
        """
        from vgrout.lab.audit import audit

        return audit(problems, console, out=out, workers=workers, allow_weak=allow_weak_sandbox)

    def verify(only: tuple[str, ...] = ()) -> int:
        """Check the instrument's invariants: one line per gate with its evidence.

        Args:
            only: Names of gates; all when not given.
        """
        from vgrout.verify import run_gates

        return run_gates(only, console)

    def smoke(out: Path | None = None) -> int:
        """The real pipeline on tiny sizes with all zones forced to train, then every gate.

        Args:
            out: Keep the run here; a temporary folder otherwise.
        """
        from vgrout.verify.smoke import smoke as work

        with tempfile.TemporaryDirectory() as temporary:
            return work(out or Path(temporary) / "smoke", console)

    def micro_build(out: Path, seed: int = 0, documents: int | None = None) -> int:
        """Pretrain the organism of the micro world; an interrupted build goes on where it was.

        Args:
            out: Folder of the checkpoint.
            seed: Seed of documents, init and order.
            documents: Size of the corpus; the shipped organism's when not given.
        """
        from vgrout.lab.organism import build

        console.print_json(json.dumps(build(out, seed, documents)))
        return 0

    def micro_pools(out: Path) -> int:
        """Make the teacher pool: demonstrations of training problems, confirmed by the grader.

        Args:
            out: The file to write.
        """
        from vgrout.envs.micro_env import make_pool
        from vgrout.envs.sandbox import Sandbox

        if out.exists():
            raise UserError(f"{out} exists: give another name")
        with Sandbox() as sandbox:
            console.print(f"{make_pool(sandbox, out)} demonstrations in {out}")
        return 0

    def micro_calibrate(
        cfg: Settings = base,
        train: bool = False,
        seeds: tuple[int, ...] = (0,),
        out: Path = Path("runs/calibration"),
        runs: Path | None = None,
        record: Path | None = None,
    ) -> int:
        """Check that the micro world can answer the question; exit code 1 when a bar is missed.

        Args:
            cfg: Settings of every run.
            train: Also measure the trained bars, in new runs (four per seed).
            seeds: Seeds of the trained bars.
            out: Folder of those runs.
            runs: Take the trained bars from the runs of this experiment instead.
            record: Also write the bars to this JSON file.
        """
        from vgrout.lab.calibrate import calibrate

        return calibrate(cfg, train, seeds, out, runs, record, console)

    def probe_fit(
        out: Path, model: str = "micro", seed: int = 0, problems: int = 512, allow_weak_sandbox: bool = False
    ) -> int:
        """Fit a linear probe on programs of mechanisms that are not live, confirmed by the grader.

        Args:
            out: The file to write.
            model: `micro`, or the folder of a causal language model.
            seed: Of problems and programs.
            problems: Problems in each of three sets (fit, held out, held-out markers); two programs each.
            allow_weak_sandbox: Run programs even where the machine gives them too little isolation.
        """
        from vgrout.lab.probe import fit_probe

        return fit_probe(out, model, seed, problems, console, allow_weak=allow_weak_sandbox)

    def pairs_lint(
        selector: tyro.conf.Positional[str] = "micro", model: str | None = None, no_model: NoPair = False
    ) -> int:
        """Check pairs, and what each does to the direction; exit code 1 when there is a problem.

        Args:
            selector: micro, leetcode or path.md; then #section or #*, /prefix of a heading, @tags (see docs/pairs.md).
            model: Score the pairs on this model: micro, or a folder. The micro pairs are scored on micro anyway.
            no_model: Score nothing.
        """
        from vgrout.lab.pairs_report import lint_pairs

        return lint_pairs(selector, console, model=model, no_model=no_model)

    def pairs_audit() -> int:
        """Quality, confounds and use of the bundled pairs, as the page docs/pairset_audit.md."""
        from vgrout.lab.pairs_audit import show as work

        work()
        return 0

    def direction_export(run: tyro.conf.Positional[Path], out: Path | None = None) -> int:
        """Write the gate of a run, finished or interrupted, as a file of its own.

        Args:
            run: Folder of the run.
            out: The file to write; gate.safetensors in the run's folder when not given.
        """
        from vgrout.lab.direction import export

        console.print(f"{export(run, out)}")
        return 0

    def direction_check(
        gate: tyro.conf.Positional[Path],
        trace: tyro.conf.Positional[Path],
        draws: int = 1000,
        window: int = 30,
        out: Path | None = None,
    ) -> int:
        """Judge a gate on a stored trace without training: AUROC, AP and F0.5 against random directions.

        Args:
            gate: A gate.safetensors.
            trace: Folder of the run whose rollouts were traced (--trace-every).
            draws: Random directions.
            window: Steps that are judged together; 0: all of them only.
            out: Also write the table to this JSON file.
        """
        from vgrout.lab.direction import show_check

        show_check(gate, trace, draws, window, out, console)
        return 0

    def lab_ceiling(run: tyro.conf.Positional[Path]) -> int:
        """What a direction fitted with the oracle's labels would score on a trace, beside v: a ceiling, not a method.

        Args:
            run: Folder of the run whose rollouts were traced (--trace-every).
        """
        from vgrout.lab.ceiling import show_ceiling

        show_ceiling(run, console)
        return 0

    def lab_claims(experiment: tyro.conf.Positional[Path], out: Path | None = None) -> int:
        """What the runs of a preregistered decision show: each test, and the conclusions that were written down.

        Args:
            experiment: Folder of `vgrout decide --decision`.
            out: Also write the tests to this JSON file.
        """
        from vgrout.lab.claims import show_claims

        show_claims(experiment, out, console)
        return 0

    def lab_results(
        experiment: tyro.conf.Positional[Path],
        out: Path = Path("docs/results.md"),
        figures: Path = Path("docs/figures/results"),
    ) -> int:
        """A preregistered decision as a page of Markdown: conclusion, claims, figures, measures, links to every run.

        Args:
            experiment: Folder of `vgrout decide --decision`, or of its records.
            out: The page, which is replaced.
            figures: Folder of its figures.
        """
        from vgrout.lab.results import results

        return results(experiment, out, figures, console)

    def lab_gates(runs: tyro.conf.Positional[tuple[Path, ...]], draws: int = 200, out: Path | None = None) -> int:
        """What the gates of finished runs flagged: precision, recall, AUROC, before and after saturation; with a trace,
        what other gate policies would have flagged.

        Args:
            runs: Folders of finished runs.
            draws: Random directions that the AUROC is compared with.
            out: Also write the table to this JSON file.
        """
        from vgrout.lab.gates import show_gates

        show_gates(runs, draws, out, console)
        return 0

    def lab_frontier(
        run: tyro.conf.Positional[Path],
        scales: tuple[float, ...] = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0),
        rollouts: int | None = None,
        out: Path | None = None,
    ) -> int:
        """What a run ships when its deployed block shrinks, and at its checkpoints: the null of learning less.

        Args:
            run: Folder of a finished run, of vanilla GRPO for the null.
            scales: Numbers that the deployed block is multiplied with.
            rollouts: Rollouts per point; the run's own setting when not given.
            out: Also write the points to this JSON file.
        """
        from vgrout.lab.frontier import show_frontier

        show_frontier(run, scales, rollouts, out, console)
        return 0

    def lab_choose(runs: tyro.conf.Positional[tuple[Path, ...]], rollouts: int = 256, out: Path | None = None) -> int:
        """Rank settings by what their runs ship on validation problems of the modes that the pairs show.

        Args:
            runs: Folders of finished runs, named SETTINGS-sSEED as vgrout decide names them.
            rollouts: Rollouts per run.
            out: Also write the ranking to this JSON file.
        """
        from vgrout.lab.choose import show_choice

        show_choice(runs, rollouts, out, console)
        return 0

    def queue_add(why: str = "", resolve: str = "", queue: Path = QUEUE) -> int:
        """Queue a command that says what it asks and how its outcome will be judged: ... -- COMMAND.

        Args:
            why: The question, or hypothesis, that the command answers.
            resolve: The rule by which its outcome will be judged.
            queue: Folder of the queue.
        """
        from vgrout.lab.queue import add

        if queued[:1] == ["vgrout"]:
            check_command(queued[1:])
        job = add(queue, why, resolve, queued)
        console.print(f"job {job} waits in {queue}: `vgrout queue run` runs what waits", soft_wrap=True)
        return 0

    def queue_run(queue: Path = QUEUE, local: bool = False, job: int | None = None) -> int:
        """Run what waits, one job after another; where pueue is installed, hand it over to that.

        Args:
            queue: Folder of the queue.
            local: Run it here although pueue is installed.
            job: Run this job alone, here, as soon as no other one runs.
        """
        from vgrout.lab.queue import run as work

        return work(queue, console, local=local, job=job)

    def queue_list(queue: Path = QUEUE) -> int:
        """Every job with its state.

        Args:
            queue: Folder of the queue.
        """
        from vgrout.lab.queue import show_list

        show_list(queue, console)
        return 0

    def queue_show(job: tyro.conf.Positional[int], queue: Path = QUEUE) -> int:
        """One job: what it asks, the rule, and what came out.

        Args:
            job: Its number.
            queue: Folder of the queue.
        """
        from vgrout.lab.queue import show_one

        show_one(queue, job, console)
        return 0

    def queue_again(job: tyro.conf.Positional[int], queue: Path = QUEUE) -> int:
        """Let a job wait once more that failed, was interrupted, or is with pueue no longer.

        Args:
            job: Its number.
            queue: Folder of the queue.
        """
        from vgrout.lab.queue import change

        change(queue, job, "again")
        console.print(f"job {job} waits again")
        return 0

    def queue_cancel(job: tyro.conf.Positional[int], queue: Path = QUEUE) -> int:
        """Take a job out that waits, or will not be tried again; its record stays.

        Args:
            job: Its number.
            queue: Folder of the queue.
        """
        from vgrout.lab.queue import change

        change(queue, job, "cancelled")
        console.print(f"job {job} is cancelled")
        return 0

    def journal_add(
        title: str = "",
        finding: str = "",
        hypotheses: tuple[str, ...] = (),
        runs: tuple[Path, ...] = (),
        figures: tuple[Path, ...] = (),
        file: Path = JOURNAL,
    ) -> int:
        """Put an entry on top of the research journal; on a terminal, what is missing is asked for.

        Args:
            title: One line.
            finding: What was seen, as Markdown.
            hypotheses: At least three that could explain it.
            runs: Folders of runs, or of experiments, that it rests on.
            figures: Files of figures.
            file: The journal.
        """
        from vgrout.lab.journal import add_entry

        return add_entry(file, console, title, finding, hypotheses, runs, figures)

    def journal_check(file: Path = JOURNAL) -> int:
        """Name entries that are not as they were written, and links that lead nowhere; exit code 1 for the former.

        Args:
            file: The journal.
        """
        from vgrout.lab.journal import check

        return check(file, console)

    def play(
        problem: str | None = None,
        mode: str | None = None,
        file: Path | None = None,
        edit: bool = False,
        family: Literal["train", "eval"] = "train",
        hint_free: bool = False,
        seed: int | None = None,
        allow_weak_sandbox: bool = False,
    ) -> int:
        """Solve or hack a problem of the micro world yourself, and see what each grader says.

        Args:
            problem: Its id, such as train-007; one drawn by chance when not given.
            mode: Give it this loophole, see `vgrout modes`.
            file: Grade the program in this file (- for the standard input) and end.
            edit: Write the program in the editor that VISUAL or EDITOR names.
            family: Family of the marker that the hint names: eval is held out from training.
            hint_free: Close the loophole, and do not mention it.
            seed: Of the draw.
            allow_weak_sandbox: Run programs even where the machine gives them too little isolation.
        """
        from vgrout.lab.play import play as work

        how: dict[str, Any] = {"file": file, "edit": edit, "seed": seed, "allow_weak": allow_weak_sandbox}
        return work(console, problem, mode=mode, family=family, hinted=not hint_free, **how)

    def read_measure(name: str, what: str):
        def command(runs: tyro.conf.Positional[tuple[Path, ...]], out: Path | None = None) -> int:
            from vgrout.lab.measuring import show_measure

            show_measure(name, runs, out, console)
            return 0

        command.__doc__ = f"""Measure {what}.

        Args:
            runs: Folders of experiments, runs or records.
            out: Also write the table to this JSON file.
        """
        return command

    def made_measure(name: str, what: str):
        def command(runs: tyro.conf.Positional[tuple[Path, ...]], again: bool = False, out: Path | None = None) -> int:
            from vgrout.lab.measuring import show_measure

            with listening():
                show_measure(name, runs, out, console, again=again)
            return 0

        command.__doc__ = f"""Measure {what}; each run once, its result is kept beside it.

        Args:
            runs: Folders of experiments, runs or records. Only runs with their weights can be measured anew.
            again: Measure runs that have a result once more.
            out: Also write the table to this JSON file.
        """
        return command

    return {
        "decide": decide,
        "sweep": sweep,
        "show": show,
        "train": train,
        "track": track,
        "eval": evaluate,
        "export": export,
        "arms": arms,
        "modes": modes,
        "grade": grade,
        "verify": verify,
        "smoke": smoke,
        "data leetcode": data_leetcode,
        "env audit": env_audit,
        "model check": model_check,
        "model download": model_download,
        "micro build": micro_build,
        "micro pools": micro_pools,
        "micro calibrate": micro_calibrate,
        "probe fit": probe_fit,
        "pairs lint": pairs_lint,
        "pairs audit": pairs_audit,
        "direction export": direction_export,
        "direction check": direction_check,
        "lab ceiling": lab_ceiling,
        "report": make_report,
        "view": view,
        "sql": sql,
        "publish": publish,
        "queue add": queue_add,
        "queue run": queue_run,
        "queue list": queue_list,
        "queue show": queue_show,
        "queue again": queue_again,
        "queue cancel": queue_cancel,
        "journal add": journal_add,
        "journal check": journal_check,
        "play": play,
        "lab metrics": lab_metrics,
        "lab choose": lab_choose,
        "lab claims": lab_claims,
        "lab frontier": lab_frontier,
        "lab gates": lab_gates,
        "lab results": lab_results,
        **{f"lab {name}": read_measure(name, what) for name, what in READ.items()},
        **{f"lab {name}": made_measure(name, what) for name, what in MADE.items()},
    }


PLURAL = {
    "decide": ("arm", "seed"),
    "sweep": ("arm", "seed"),
    "micro calibrate": ("arm", "seed"),
}  # settings that their other flags decide


def _base(args: list[str]) -> Config:
    """The settings that a command starts from, before its other flags."""
    file, name = _given(args, "--config"), _given(args, "--preset")
    if file is not None and name is not None:
        raise UserError("--config and --preset exclude each other: a configuration holds every setting")
    if args[:1] == ["decide"] and (decision := _given(args, "--decision")) is not None:
        for flag in ("--arms", "--seeds", "--preset", "--config"):
            if _given(args, flag) is not None:
                raise UserError(f"--decision names preset, arms and seeds: drop {flag}")
        from vgrout.lab.prereg import read as read_decision

        return read_decision(Path(decision)).base()
    return preset(name or "micro") if file is None else Config.read(Path(file))


def _command(args: list[str], known: dict) -> list[str]:
    """`args` with a command of two words as one. Raises UserError for a group without one of its commands."""
    group = [name for name in known if args and name.startswith(f"{args[0]} ")]
    if not group:
        return args
    if args[1:2] in (["-h"], ["--help"]):
        for name in group:
            print(f"vgrout {name:<16} {known[name].__doc__.splitlines()[0]}")
        sys.exit(0)
    if " ".join(args[:2]) not in group:
        raise UserError(f"`{args[0]}` goes with one of its commands: {', '.join(f'vgrout {name}' for name in group)}")
    return [" ".join(args[:2]), *args[2:]]


def _refuse_singular(args: list[str]) -> None:
    """Raises UserError for a setting of one run where a command's own flag decides it for all."""
    for name in PLURAL.get(args[0], ()) if args else ():
        if _given(args, f"--{name}") is not None:
            flag = f"--{name}s" if args[0] in ("decide", "sweep") or name == "seed" else "the bars' own arms"
            raise UserError(f"`vgrout {args[0]}` takes {flag}, not --{name}")


def _refuse_settings(args: list[str]) -> None:
    """Raises UserError for a setting of a run that goes on: its folder has them all."""
    if args[:1] == ["train"] and _given(args, "--resume") is not None:
        flags = {arg.split("=")[0].replace("_", "-") for arg in args if arg.startswith("--")}
        if other := sorted(flags - {"--resume", "--allow-drift", "--track", "--track-project", "--help"}):
            raise UserError(f"--resume takes every setting from the run's folder: drop {', '.join(other)}")


def _prepared(args: list[str], queued: Sequence[str] = ()) -> tuple[dict, list[str]]:
    """The commands, and `args` as their parser takes them. Raises UserError."""
    if args[:2] == ["queue", "add"] and not queued and not {"-h", "--help"} & {*args}:
        raise UserError('give the command behind a --: vgrout queue add --why "..." --resolve "..." -- COMMAND')
    known = commands(_base(args), queued)
    args = _command(args, known)
    _refuse_singular(args)
    _refuse_settings(args)
    return known, args


def check_target(out: Path | None, resume: Path | None) -> None:
    """Raises UserError where a run has no folder, or two."""
    if (out is None) == (resume is None):
        raise UserError("give --out for a new run, or --resume for an interrupted one")


def check_command(args: Sequence[str]) -> None:
    """Parse a command of vgrout without running it, so that a slip shows before its turn comes. Raises UserError;
    SystemExit, once the mistake is on stderr, where the parser objects."""

    def hollow(function):
        return functools.wraps(function)(lambda *given, **named: (function, named))

    own, rest = _split(list(args))
    known, own = _prepared(own, rest)
    hollowed = {name: hollow(function) for name, function in known.items()}
    function, named = tyro.extras.subcommand_cli_from_dict(hollowed, args=own, prog="vgrout")
    if function is known["train"]:
        from vgrout.lab.run import check

        check_target(named["out"], named["resume"])
        if named["resume"] is None:
            check(named["cfg"])
    if function is known["decide"]:
        from vgrout.lab.grid import named as variants

        variants(named["arms"])
    if function is known["sweep"]:
        from vgrout.lab.sweep import sweep_jobs

        sweep_jobs(*(named[name] for name in ("cfg", "arms", "seeds", "over", "out")))


def _split(args: list[str]) -> tuple[list[str], list[str]]:
    """`args` of `queue add`, and the command behind their --."""
    if args[:2] != ["queue", "add"] or "--" not in args:
        return args, []
    at = args.index("--")
    return args[:at], args[at + 1 :]


def _refuse_processes(args: list[str]) -> None:
    """Raises UserError for a command that would do the same in each of several processes."""
    if place()[1] > 1 and args[:1] != ["train"]:
        raise UserError(f"`vgrout {' '.join(args[:1])}` runs in one process: only `vgrout train` goes with torchrun")


def _say(text: str) -> None:
    """One line on stderr, unless this process is none that speaks for all."""
    if place()[0] == 0:
        print(f"vgrout: {text}", file=sys.stderr)


def _failed(error: RunFailed) -> None:
    """What made a run fail. Where it failed in one of several processes, that one says so."""
    rank = place()[0]
    if rank == 0:
        _say(f"{type(error).__name__}: {error}")
    elif not isinstance(error, RankLost):
        print(f"vgrout: process {rank}: {type(error).__name__}: {error}", file=sys.stderr)


def main() -> None:
    """Entry point of `vgrout`."""
    args, queued = _split(sys.argv[1:])
    try:
        _refuse_processes(args)
        known, args = _prepared(args, queued)
        code = tyro.extras.subcommand_cli_from_dict(known, args=args, prog="vgrout")
    except UserError as error:
        _say(str(error))
        code = 2
    except RunFailed as error:
        _failed(error)
        code = 1
    except Interrupted as stop:
        with contextlib.suppress(OSError):  # after a hang-up nobody reads it
            _say(str(stop))
        code = 128 + stop.number
    except KeyboardInterrupt:
        print("vgrout: interrupted", file=sys.stderr)
        code = 130
    with contextlib.suppress(ValueError, io.UnsupportedOperation):
        try:
            sys.stdout.flush()
        except OSError:  # nobody reads it, or there is no room: the interpreter would try again at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    leave(code)
