"""Which run directory and which recipe a `run` command means: a new run, or one that exists."""

import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from lora_rlhf.errors import CheckpointError, ConfigError
from lora_rlhf.recipe import STAGES, Data, Recipe, Source, is_store
from lora_rlhf.recipe_io import differences, load_recipe
from lora_rlhf.runs import Run

Tell = Callable[[str], None]


def open_run(
    recipe_name: str,
    overrides: Sequence[str],
    runs_dir: Path,
    *,
    name: str | None,
    resume: bool,
    again: str | None,
    alone: bool,
    force: bool,
    tell: Tell,
) -> tuple[Recipe, Run]:
    """The recipe and the run directory of a `run` command.

    A run that exists keeps the recipe it was started with (its recipe.yaml); overrides change
    stages that are still to come. A new run never writes into one that exists: without `name` a
    finished one makes the new one numbered, and an unfinished one is refused.

    Args:
        recipe_name: of a shipped recipe, or a path.
        overrides: `key=value`.
        runs_dir: where runs lie.
        name: of the run; None: the recipe's.
        resume: go on with a stopped run.
        again: a stage to run again (--only or --from); None: none.
        alone: whether `again` is run without the stages after it.
        force: go on although another process seems to hold the run.
        tell: says a line to the user.

    Raises:
        ConfigError: the run exists, does not exist, or cannot be continued so.
        CheckpointError: another process is at work in it.
    """
    if not (resume or again):
        return _new(recipe_name, overrides, runs_dir, name, tell)
    path = runs_dir / (name or _name_of(recipe_name))
    if not (path / "recipe.yaml").is_file():
        if resume:
            raise ConfigError(
                f"{path} is not a run that can be resumed. Start it: leave --resume away."
            )
        return _new(recipe_name, overrides, runs_dir, name, tell)
    run = Run(path)
    refuse_if_running(run, force)
    return _continued(recipe_name, overrides, run, again, alone, tell), run


def next_free_name(runs_dir: Path, name: str) -> str:
    """The name, or the name with the lowest number from 2 that no run has."""
    if not (runs_dir / name).exists():
        return name
    number = 2
    while (runs_dir / f"{name}-{number}").exists():
        number += 1
    return f"{name}-{number}"


def _new(
    recipe_name: str, overrides: Sequence[str], runs_dir: Path, name: str | None, tell: Tell
) -> tuple[Recipe, Run]:
    recipe = load_recipe(recipe_name, overrides)
    chosen = name or recipe.name
    if chosen in (".", "..") or Path(chosen).name != chosen:
        raise ConfigError(f"--name is {chosen!r}. Allowed: a name without a slash.")
    path = runs_dir / chosen
    if path.exists() and any(path.iterdir()):
        other = next_free_name(runs_dir, chosen)
        state = Run(path).status()
        if name is not None or state.get("state") != "finished":
            raise ConfigError(
                f"{path} exists ({_told(state)}). {_ways_on(recipe_name, path, state, other)}"
            )
        tell(f"{path} is finished; this run is {runs_dir / other}.")
        path = runs_dir / other
    run = Run(path)
    return _pinned(recipe, run, tell), run


def _pinned(recipe: Recipe, run: Run, tell: Tell) -> Recipe:
    """The recipe with a copy of each store it reads, so that votes to come change no run."""
    sources: dict[str, Source] = {}
    copies: dict[str, str] = {}
    for field in Data.model_fields:
        source = getattr(recipe.data, field)
        if isinstance(source, Source) and source.path and is_store(source.path):
            if source.path not in copies:
                copies[source.path] = _copy_of(source.path, run.path / f"{field}.db", field, tell)
            sources[field] = source.model_copy(update={"path": copies[source.path]})
    if not sources:
        return recipe
    return recipe.model_copy(update={"data": recipe.data.model_copy(update=sources)})


def _copy_of(location: str, path: Path, field: str, tell: Tell) -> str:
    from lora_rlhf.preferences.store import Store

    with Store.open(location, create=False, read_only=True) as store:
        sha256 = store.snapshot(path)
        tell(f"data.{field}: {path} is a copy of {store.location} as it is now ({sha256[:12]}).")
    return str(path)


def _name_of(recipe_name: str) -> str:
    return load_recipe(recipe_name, finished=STAGES).name


def _told(status: dict[str, object]) -> str:
    if status.get("state") == "finished":
        return "finished"
    if not status:
        return "holds files, but no run has begun in it"
    return f"{status['state']} in {status['stage'] or 'its beginning'}"


def _ways_on(recipe: str, path: Path, status: dict[str, object], other: str) -> str:
    named = ["--name", path.name] if path.name != recipe else []
    there = ["--runs-dir", str(path.parent)] if path.parent != Path("runs") else []
    line = shlex.join(["lora-rlhf", "run", recipe, *named, *there, "--resume"])
    anew = f"Start anew: --name {other}."
    if status.get("state") == "finished":
        return f"{anew} Run a stage and all later ones again: --from STAGE."
    return f"Go on with it: {line}. {anew}" if status else anew


def refuse_if_running(run: Run, force: bool) -> None:
    """Refuse a run that another process seems to hold.

    Raises:
        CheckpointError: it does, and nothing forces it.
    """
    status = run.status()
    pid = status.get("pid")
    if status.get("state") != "running" or pid == os.getpid() or force or not _is_alive(pid):
        return
    raise CheckpointError(
        f"{run.path} is at work in process {pid}. Wait for it or end it; if that process is "
        f"something else, add --force."
    )


def ways_on(run: Run) -> str:
    """How far a run is that lacks something, and what to do about it."""
    status = run.status()
    state, stage = status.get("state"), status.get("stage") or "its beginning"
    if state == "running" and _is_alive(status.get("pid")):
        return f"It is at work in {stage}. Wait for it."
    line = ["lora-rlhf", "run", str(run.path / "recipe.yaml"), "--name", run.name]
    line += ["--runs-dir", str(run.path.parent)] if run.path.parent != Path("runs") else []
    if state == "finished":
        return "It is finished. Its recipe has no stage that makes one."
    return f"It stopped in {stage}. Go on with it: {shlex.join([*line, '--resume'])}"


def _is_alive(pid: object) -> bool:
    if not isinstance(pid, int) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _continued(
    recipe_name: str, overrides: Sequence[str], run: Run, again: str | None, alone: bool, tell: Tell
) -> Recipe:
    """The run's own recipe with the overrides; nothing that is already done may change."""
    own = str(run.path / "recipe.yaml")
    finished = [s for s in STAGES if run.is_complete(s)]
    before = load_recipe(own, finished=finished)
    recipe = load_recipe(own, overrides, finished)
    repeated = _repeated(again, alone)
    fixed = {s for s in finished if s not in repeated}
    if fixed or not again:
        fixed |= {"lora", "seed", "base"}
        # What was trained on must stay what it was, or held-out prompts would not be held out.
        fixed |= {"data.heldout_fraction", "data.demonstrations", "data.rankings", "data.prompts"}
    for field, old, new in differences(before, recipe):
        if field.partition(".")[0] in fixed or ".".join(field.split(".")[:2]) in fixed:
            raise ConfigError(
                f"{field}={new} comes too late: {run.path} was made with {old}. Start anew with "
                f"--name, or run its stage again with --from."
            )
        tell(f"changed in {run.path}: {field} {old} -> {new}")
    _tell_of_the_file(recipe_name, own, before, finished, tell)
    return recipe


def _repeated(again: str | None, alone: bool) -> tuple[str, ...]:
    if again not in STAGES:
        return ()
    return (again,) if alone else STAGES[STAGES.index(again) :]


def _tell_of_the_file(
    recipe_name: str, own: str, before: Recipe, finished: list[str], tell: Tell
) -> None:
    """Say where the recipe file has come to differ from the run's, which is what counts."""
    now = load_recipe(recipe_name, finished=STAGES)
    apart = [
        f"{f} is {old} (file: {new})" for f, old, new in differences(before, now) if f != "name"
    ]
    if apart:
        more = f" and {len(apart) - 5} more" if len(apart) > 5 else ""
        tell(f"going on with {own}, where {', '.join(apart[:5])}{more}")
