"""The command `lora-rlhf protocol`: all arms of the gold protocol, two at a time, and the table."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lora_rlhf.errors import ConfigError, TrainingError

if TYPE_CHECKING:
    from rich.console import Console

    from lora_rlhf.evaluation.gold_protocol import Row, SeedFacts
    from lora_rlhf.evaluation.protocol_arms import Job
    from lora_rlhf.recipe import Recipe

EPILOG = (
    "Try:\n\nlora-rlhf protocol\n\nlora-rlhf protocol --seeds 0,1,2,3\n\n"
    "lora-rlhf protocol --table --json"
)
_RECIPE = "gold-protocol"
_LOOK_SECONDS = 0.5


def protocol(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Of the runs; what is there goes on.")
    ] = Path("runs/gold-protocol"),
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Change its recipe.", show_default=False),
    ] = None,
    seeds: Annotated[
        str, typer.Option(help="Of the runs; at least three for a verdict.")
    ] = "0,1,2",
    at_once: Annotated[int, typer.Option("--jobs", min=1, help="Runs at once, a core each.")] = 2,
    reduced: Annotated[
        bool, typer.Option("--reduced", help="Minutes, not an hour: proves nothing.")
    ] = False,
    table: Annotated[
        bool, typer.Option("--table", help="Train nothing; show what is there.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the table as JSON.")] = False,
    job: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Run SFT, best-of-n, PPO and its controls for several seeds, and judge them by hidden gold.

    Every arm of every seed is a run in FOLDER. A command that was stopped, or killed, goes on with
    the arms that have not ended.
    """
    from lora_rlhf.evaluation.protocol_arms import Job, jobs_of

    console = _console(as_json)
    if job is not None:
        _leave_with_parent()
        run_job(folder, Job.parse(job), console)
        return
    numbers = _seeds(seeds)
    if "=" in folder.name:
        raise ConfigError(f"{folder} is no folder. Give one first, then KEY=VALUE.")
    whole = _recipe(folder, overrides or [], reduced, create=not table)
    if not table:
        with _alone(folder):
            run_all(folder, jobs_of(numbers), at_once, console)
    show(folder, whole, numbers, console, as_json)


def _console(as_json: bool) -> "Console":
    from rich.console import Console

    return Console(highlight=False, stderr=as_json)


def _seeds(text: str) -> list[int]:
    parts = text.replace(" ", "").split(",")
    if not all(p.isdecimal() for p in parts) or len(set(parts)) < len(parts):
        raise ConfigError(f"--seeds is {text}. Allowed: different whole numbers, such as 0,1,2.")
    return [int(p) for p in parts]


def _recipe(folder: Path, overrides: Sequence[str], reduced: bool, create: bool) -> "Recipe":
    """The recipe of a folder: kept at its first use, and the same ever after.

    Raises:
        ConfigError: it differs from the one that is there, or has no section that is needed.
    """
    from lora_rlhf.evaluation.protocol_arms import BEST_OF, REDUCED
    from lora_rlhf.recipe_io import differences, dump_recipe, load_recipe
    from lora_rlhf.runs import write_atomically

    file = folder / "recipe.yaml"
    known = load_recipe(str(file)) if file.is_file() else None
    if known is not None and not (overrides or reduced):
        return known
    recipe = load_recipe(_RECIPE, [*(REDUCED if reduced else ()), *overrides])
    if known is not None:
        changed = [f"{k} {a} -> {b}" for k, a, b in differences(known, recipe)]
        if changed:
            raise ConfigError(
                f"{folder} was begun with another recipe ({'; '.join(changed[:3])}). Leave the "
                f"settings away to go on with its own, or give another folder."
            )
        return known
    missing = [s for s in ("sft", "rank", "reward", "ppo", "evaluate") if s not in recipe.stages]
    if missing or recipe.evaluate is None or recipe.evaluate.judge is None:
        raise ConfigError(f"the protocol needs {', '.join(missing) or 'evaluate.judge'}.")
    if recipe.evaluate.best_of < max(BEST_OF):
        raise ConfigError(
            f"evaluate.best_of is {recipe.evaluate.best_of}, of which best-of-{max(BEST_OF)} "
            f"cannot be estimated. Allowed: {max(BEST_OF)}."
        )
    if not create:
        raise ConfigError(f"{folder} holds no protocol. Run it: lora-rlhf protocol {folder}")
    write_atomically(file, dump_recipe(recipe))
    return recipe


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder, so that no second command makes the same runs; a kill lets go of it.

    Raises:
        ConfigError: another one holds it.
    """
    import fcntl

    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"{folder} is being worked on by another lora-rlhf protocol. Wait for it, or give "
                f"another folder."
            ) from error
        yield


# -- one job ------------------------------------------------------------------------------------


def run_job(folder: Path, job: "Job", console: "Console") -> None:
    """Make one arm of one seed, or go on with it, and measure it."""
    import fcntl

    from lora_rlhf.evaluating import open_session
    from lora_rlhf.evaluation.protocol_arms import measure, prepare, recipe_of
    from lora_rlhf.pipeline import run_pipeline
    from lora_rlhf.recipe_io import load_recipe

    # Whoever made this run a moment ago, and was killed, may take a second to be gone.
    with (folder / f".{job.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        recipe, run = recipe_of(folder, job), prepare(folder, job)
        if not all(run.is_complete(stage) for stage in recipe.stages):
            # The table says how good the reward model is; a weak one stops no arm.
            run_pipeline(recipe, run, resume=True, force=True, console=console)
        session = open_session(recipe, run, console)
        measure(session, load_recipe(str(folder / "recipe.yaml")), job)
        run.set_status("finished")


def _leave_with_parent() -> None:
    """End this process when the one that started it is gone, however it went."""
    parent = os.getppid()

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK_SECONDS)
        os._exit(1)  # a checkpoint is on the disk, and whoever goes on finds it

    threading.Thread(target=look, name="leave-with-parent", daemon=True).start()


# -- all jobs -----------------------------------------------------------------------------------


def run_all(folder: Path, jobs: Sequence["Job"], at_once: int, console: "Console") -> None:
    """Run what has not ended, so many at once, each in a process of its own.

    Raises:
        TrainingError: one has failed; the others have been made all the same.
    """
    from lora_rlhf.display import short_time
    from lora_rlhf.evaluation.protocol_arms import is_done

    todo = [job for job in jobs if not is_done(folder, job)]
    failed: list[Job] = []
    running: dict[Job, tuple[subprocess.Popen[bytes], float]] = {}
    if len(todo) < len(jobs):
        console.print(f"{len(jobs) - len(todo)} of {len(jobs)} runs have ended already.")
    try:
        while todo or running:
            while len(running) < at_once and (job := _next(folder, todo, failed)) is not None:
                running[job] = _start(folder, job), time.monotonic()
                console.print(f"{job.name}: started", markup=False)
            time.sleep(_LOOK_SECONDS)
            for job, (process, began) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[job]
                good = process.returncode == 0 and is_done(folder, job)
                failed += [] if good else [job]
                took = short_time(time.monotonic() - began)
                left = len(todo) + len(running)
                said = f"{'done' if good else 'FAILED'} after {took}, {left} to go"
                console.print(f"{job.name}: {said}", markup=False)
    finally:
        for process, _ in running.values():
            process.send_signal(signal.SIGINT)
        for process, _ in running.values():
            process.wait()
    if failed:
        files = [folder / f"{job.name}.log" for job in failed]
        logs = ", ".join(str(file) for file in files if file.exists())
        raise TrainingError(
            f"{len(failed)} of {len(jobs)} runs failed. Their last words are in {logs}. The same "
            f"command tries them again."
        )


def _next(folder: Path, todo: list["Job"], failed: list["Job"]) -> "Job | None":
    """Take the first job whose base is there; those whose base failed are dropped."""
    from lora_rlhf.evaluation.protocol_arms import is_done

    for job in list(todo):
        if job.needs in failed:
            todo.remove(job)
            failed.append(job)
        elif job.needs is None or is_done(folder, job.needs):
            todo.remove(job)
            return job
    return None


def _start(folder: Path, job: "Job") -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "lora_rlhf", "protocol", str(folder), "--job", job.name]
    with (folder / f"{job.name}.log").open("ab") as log:
        # A core each; more threads would only get into each other's way.
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        # A session of its own: Ctrl-C reaches it through us, once, and it ends with a checkpoint.
        return subprocess.Popen(
            command, stdout=log, stderr=log, env=environment, start_new_session=True
        )


# -- the table ----------------------------------------------------------------------------------


def show(
    folder: Path, whole: "Recipe", seeds: Sequence[int], console: "Console", as_json: bool
) -> None:
    """Print the table of criteria and that of the arms, and keep both in protocol.json."""
    from lora_rlhf.evaluation.gold_protocol import judge, read_seed
    from lora_rlhf.runs import write_atomically

    found = [read_seed(folder, seed) for seed in seeds]
    rows = judge(found)
    content = {
        "seeds": list(seeds),
        "prompts": whole.evaluate.prompts if whole.evaluate is not None else 0,
        "criteria": [_row_as_json(row) for row in rows],
        "arms": [{} if f is None else _arms_as_json(f) for f in found],
        "seconds": _seconds(folder, seeds),
    }
    text = json.dumps(content, indent=1) + "\n"
    write_atomically(folder / "protocol.json", text)
    if as_json:
        typer.echo(text, nl=False)
        return
    _print_arms(found, console)
    _print_criteria(rows, seeds, console)


def _row_as_json(row: "Row") -> dict[str, Any]:
    return {
        "letter": row.letter,
        "what": row.what,
        "passed": row.passed,
        "figures": _finite(row.figures),
        "seeds": [{"passed": held, "figures": _finite(figures)} for held, figures in row.seeds],
    }


def _finite(figures: dict[str, float]) -> dict[str, float | None]:
    return {k: v if math.isfinite(v) else None for k, v in figures.items()}


def _arms_as_json(facts: "SeedFacts") -> dict[str, Any]:
    return {
        name: {
            "gold": float(arm.gold.mean()),
            "gain_sd": float(facts.gain(name).mean()),
            "proxy": float(arm.proxy.mean()),
            "win_rate": float(arm.win_rate.mean()),
            "kl": arm.kl,
            "eos_rate": arm.eos_rate,
            "tokens": arm.tokens,
            "perplexity": None if arm.nats is None else math.exp(arm.nats),
        }
        for name, arm in facts.arms.items()
    }


def _seconds(folder: Path, seeds: Sequence[int]) -> dict[str, float]:
    """Of training and measuring each run, as its summary has it."""
    from lora_rlhf.evaluation.protocol_arms import is_done, jobs_of, own_stages
    from lora_rlhf.runs import Run

    found = {}
    for job in jobs_of(seeds):
        if is_done(folder, job):
            summary = Run(folder / job.name).summary()
            spent = sum(summary["seconds"].get(stage, 0.0) for stage in own_stages(job))
            found[job.name] = round(spent + summary["protocol"]["measured_seconds"], 1)
    return found


def _print_arms(found: Sequence["SeedFacts | None"], console: "Console") -> None:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="dim")
    for heading in ("seed", "arm", "gold", "gain sd", "win", "proxy", "KL", "EOS", "tokens", "ppl"):
        table.add_column(heading, justify="left" if heading == "arm" else "right", no_wrap=True)
    for facts in found:
        for name, arm in (_arms_as_json(facts) if facts is not None else {}).items():
            perplexity = arm["perplexity"]
            table.add_row(
                str(facts.seed if facts is not None else ""),
                name,
                f"{arm['gold']:.2f}",
                f"{arm['gain_sd']:+.2f}",
                f"{arm['win_rate']:.0%}",
                f"{arm['proxy']:+.2f}",
                f"{arm['kl']:.1f}",
                f"{arm['eos_rate']:.0%}",
                f"{arm['tokens']:.0f}",
                "" if perplexity is None else f"{perplexity:.2f}",
            )
    console.print(table)


def _print_criteria(rows: Sequence["Row"], seeds: Sequence[int], console: "Console") -> None:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="dim", show_lines=True)
    table.add_column("criterion", overflow="fold", ratio=3)
    for heading in (*(f"seed {seed}" for seed in seeds), "all"):
        table.add_column(heading, overflow="fold", ratio=2)
    for row in rows:
        cells = [_cell(held, figures) for held, figures in (*row.seeds, (row.passed, row.figures))]
        table.add_row(f"({row.letter}) {row.what}", *cells)
    console.print(table)


def _cell(held: bool | None, figures: dict[str, float]) -> str:
    word = {True: "[green]pass[/]", False: "[red]fail[/]", None: "[dim]not known[/]"}[held]
    return "\n".join([word, *(f"{name} {value:.3g}" for name, value in figures.items())])
