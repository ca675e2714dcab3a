"""Run a recipe's stages in order over one backbone."""

import os
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from rich.console import Console

from lora_rlhf import display
from lora_rlhf.continuing import ways_on
from lora_rlhf.data.problems import describe
from lora_rlhf.data.sources import check_data
from lora_rlhf.errors import CheckpointError, ConfigError, DataError, TrainingError
from lora_rlhf.evaluation import contest
from lora_rlhf.model.backbone import Backbone, pick_device
from lora_rlhf.model.memory import (
    MemoryPlan,
    forget_measurements,
    measure_phase,
    memory_report,
    plan,
)
from lora_rlhf.preferences.judges import find_judge
from lora_rlhf.quiet import hush
from lora_rlhf.recipe import STAGES, Recipe
from lora_rlhf.recipe_io import dump_recipe
from lora_rlhf.report import write_report
from lora_rlhf.runs import Json, Run, write_atomically
from lora_rlhf.stages import evaluate, ppo, rank, reward, sft
from lora_rlhf.training.material import heldout_prompts
from lora_rlhf.training.metrics import start_tracker
from lora_rlhf.training.session import Session

_RUN: dict[str, Callable[[Session], None]] = {
    "sft": sft.run,
    "rank": rank.run,
    "reward": reward.run,
    "ppo": ppo.run,
    "evaluate": evaluate.run,
}
# Roles that later stages need in place, and the stage that makes each.
_STAGE_OF = {"sft": "sft", "reward": "reward", "policy": "ppo"}
_PACKAGES = ("lora-rlhf", "torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets")


def run_pipeline(
    recipe: Recipe,
    run: Run,
    *,
    resume: bool,
    only: str | None = None,
    start_from: str | None = None,
    force: bool = False,
    console: Console,
) -> None:
    """Run the recipe's stages; complete ones are passed over, their adapters loaded.

    Args:
        recipe: resolved.
        run: its directory; may hold earlier stages.
        resume: go on from checkpoints; without it, an unfinished stage starts again.
        only: run this stage alone, again if it is complete.
        start_from: run this stage and all later ones again.
        force: go on where a stage would refuse.
        console: where progress is drawn.

    Raises:
        UserError: whatever a stage or a check has to say.
    """
    hush()
    todo = stages_to_run(recipe, run, only, start_from, console)
    if not resume:
        run.forget_from([s for s in todo if not run.is_complete(s)])
    write_atomically(run.path / "recipe.yaml", dump_recipe(recipe))
    _write_environment(recipe, run)
    try:
        _run_stages(recipe, run, todo, force, console)
    except KeyboardInterrupt:
        run.set_status("stopped", run.status().get("stage", ""))
        raise
    except BaseException as error:
        run.set_status("failed", run.status().get("stage", ""), error=str(error))
        raise


def stages_to_run(
    recipe: Recipe, run: Run, only: str | None, start_from: str | None, console: Console
) -> list[str]:
    """Names of the stages to run; those that run again are dropped from the summary first.

    Raises:
        ConfigError: a stage that the recipe has no section for.
    """
    for wanted in (only, start_from):
        if wanted is not None and wanted not in recipe.stages:
            raise ConfigError(
                f"{wanted} is not a stage of recipe {recipe.name}. It has: "
                f"{', '.join(recipe.stages)} (of {', '.join(STAGES)})."
            )
    if only is not None:
        run.forget_from([only] if run.is_complete(only) else [])
        after = recipe.stages[recipe.stages.index(only) + 1 :]
        stale = [s for s in after if run.is_complete(s)]
        if stale:
            console.print(
                f"{', '.join(stale)} in {run.path} came from the old {only}; "
                f"--from {stale[0]} runs what follows again."
            )
        return [only]
    if start_from is not None:
        later = list(recipe.stages[recipe.stages.index(start_from) :])
        run.forget_from(later)
    return [s for s in recipe.stages if not run.is_complete(s)]


def _run_stages(recipe: Recipe, run: Run, todo: list[str], force: bool, console: Console) -> None:
    memory = plan(recipe)
    forget_measurements()
    with measure_phase("load", pick_device(recipe.base.device)):
        backbone = Backbone.load(recipe.base)
    tracker = start_tracker(recipe, run)
    session = Session.planned(recipe, run, backbone, console, memory, force=force, tracker=tracker)
    load_finished_adapters(session, todo)
    check_before_training(session, todo)
    display.stage_table(console, stage_rows(recipe, run, memory, todo))
    for stage in todo:
        _RUN[stage](session)
        run.write_json("summary.json", run.summary() | {"memory": _memory(run, memory)})
    if session.tracker is not None:
        session.tracker.end_training()
    complete = all(run.is_complete(s) for s in recipe.stages)
    run.set_status("finished" if complete else "stopped")
    write_report(run)
    display.samples_panel(console, run)
    display.result_table(console, run.summary())
    display.next_steps(console, run)
    check_expectation(recipe, run.summary())


def check_before_training(session: Session, todo: list[str]) -> None:
    """Find what would stop a later stage, before an earlier one has taken hours.

    Raises:
        DataError: rows that cannot be used, held-out prompts that are trained on, too few prompts.
        CheckpointError: no adapter to start from.
        ConfigError: a judge that cannot be imported.
        JudgeError: an endpoint that does not answer.
    """
    recipe, chat_format = session.recipe, session.backbone.format
    found, _ = check_data(recipe, session.backbone.tokenizer, chat_format.stop_ids)
    # Held-out prompts that are trained on are left out and counted when they are read.
    problems = [p for p in found if p.kind != "leak"]
    if problems:
        raise DataError(describe(problems))
    for stage, section in (("reward", recipe.reward), ("ppo", recipe.ppo)):
        if section is not None and section.start_from is not None and stage in todo:
            require_adapter(Path(section.start_from).expanduser(), f"{stage}.start_from")
    for settings in (recipe.rank, recipe.ppo):
        if settings is not None and settings.judge is not None:
            find_judge(settings.judge)
    if recipe.evaluate is not None:
        contest.check(recipe.evaluate, session.run if "evaluate" in todo else None)
    if recipe.evaluate is not None and "evaluate" in todo:
        heldout_prompts(session, recipe.evaluate.prompts)


def require_adapter(path: Path, where: str) -> None:
    """Refuse a directory that no adapter lies in.

    Raises:
        CheckpointError: it does not.
    """
    if not (path / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{where}: there is no adapter in {path}. Give the directory of one, such as "
            f"runs/quickstart/reward/adapter."
        )


def check_expectation(recipe: Recipe, summary: Json) -> None:
    """Hold the run against what its recipe promises.

    Raises:
        TrainingError: the policy beats `sft` less often than `evaluate.expect_win_rate`.
    """
    expected = recipe.evaluate.expect_win_rate if recipe.evaluate is not None else None
    for found in summary.get("win_rates", []):
        if expected is None or (found["a"], found["b"]) != ("policy", "sft"):
            continue
        if found["win_rate"] < expected:
            low, high = found["ci"]
            raise TrainingError(
                f"the policy beats sft on {found['win_rate']:.1%} of {found['prompts']} prompts "
                f"(95 % interval {low:.1%} to {high:.1%}), and recipe {recipe.name} expects "
                f"{expected:.0%} or more. All results are kept; look at the report, or try "
                f"another seed."
            )


def _memory(run: Run, memory: MemoryPlan) -> Json:
    """Predicted and measured GiB of each phase; a resumed run keeps the higher peak."""
    report: Json = memory_report(memory)
    for phase, before in run.summary().get("memory", {}).items():
        now = report.setdefault(phase, {})
        if "measured_gib" in before:
            now["measured_gib"] = max(now.get("measured_gib", 0.0), before["measured_gib"])
    return report


def load_finished_adapters(session: Session, todo: list[str]) -> None:
    """Put the adapters of stages that will not run in their place.

    Raises:
        CheckpointError: a later stage needs one that is not there.
    """
    run, adapters = session.run, session.backbone.adapters
    for role, stage in _STAGE_OF.items():
        if stage in todo:
            continue
        if role in run.adapters():
            adapters.load(role, run.adapter(role))
            adapters.freeze(role)
    if "sft" not in todo and "sft" not in adapters.names:
        if session.recipe.sft is not None:
            raise CheckpointError(f"{run.path} has no adapter sft yet. {ways_on(run)}")
        raise CheckpointError(
            f"{run.path} has no adapter at sft/adapter, and the recipe has no sft stage to run. "
            f"Add an sft section, or put a finished adapter there."
        )


def stage_rows(
    recipe: Recipe, run: Run, memory: MemoryPlan, todo: list[str]
) -> list[display.StageRow]:
    """The table before the start: role, adapter, from where, trainable parameters, memory.

    Of the stages that do not run now, those that are complete.
    """
    trainable, gib = memory.adapter_parameters, memory.stages
    value, double = "", 1
    if recipe.ppo is not None and recipe.ppo.value == "adapter":
        value, double = " + value from reward", 2
    start, policy = "copy of sft + head", "copy of sft"
    if recipe.reward is not None and recipe.reward.start_from is not None:
        start = "an earlier reward"
    if recipe.ppo is not None and recipe.ppo.start_from is not None:
        policy = "an earlier policy"
    reads = "rank" if recipe.rank is not None else "rankings"
    of = {
        "sft": ("sft", "fresh LoRA", trainable),
        "rank": ("", "answers of sft", 0),
        "reward": ("reward", f"{start}; {reads}", trainable),
        "ppo": ("policy", f"{policy}{value}", double * trainable),
        "evaluate": ("", "held-out prompts", 0),
    }
    rows = {s: display.StageRow(s, *of[s], memory_gib=gib.get(s)) for s in recipe.stages}
    shown = [s for s in recipe.stages if s in todo or run.is_complete(s)]
    return [replace(rows[s], done=s not in todo) for s in shown]


def _write_environment(recipe: Recipe, run: Run) -> None:
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    device = pick_device(recipe.base.device)
    on_gpu = device.type == "cuda"
    environment = {
        "versions": versions,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "commit": _commit(),
        "seed": recipe.seed,
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    run.write_json("environment.json", environment)


def _commit() -> str:
    """The commit of the checkout this runs from; "" for an installed package."""
    if not (Path(__file__).parents[1] / ".git").exists():
        return ""
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return ""
    return found.stdout.strip()
