"""The command line: thin commands over the library, and the one place that catches UserError.

Nothing heavy is imported at the top: the help and `recipes` come up without torch.
"""

import errno
import shlex
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from lora_rlhf import __version__, cli_evaluate, cli_preferences, cli_protocol, cli_ui
from lora_rlhf.errors import ConfigError, UserError
from lora_rlhf.quiet import hush_imports

if TYPE_CHECKING:
    from rich.console import Console

    from lora_rlhf.recipe import Recipe
    from lora_rlhf.runs import Run

USER_ERROR, INTERRUPTED = 2, 130
_RESUME = "resume"  # key of the context: the command that goes on with an interrupted run


class _Commands(TyperGroup):
    """Runs a command and says what went wrong; a bug keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            _say_error(str(error))
            raise typer.Exit(USER_ERROR) from error
        except KeyboardInterrupt as interrupt:
            again = ctx.meta.get(_RESUME)
            _say_error(f"Stopped. Go on with:\n  {again}" if again else "Stopped.")
            raise typer.Exit(INTERRUPTED) from interrupt
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            again = ctx.meta.get(_RESUME)
            where = f" ({error.filename})" if error.filename else ""
            then = f", then go on with:\n  {again}" if again else "."
            _say_error(f"No space left on the disk{where}. Free some{then}")
            raise typer.Exit(USER_ERROR) from error


app = typer.Typer(
    cls=_Commands,
    name="lora-rlhf",
    help="RLHF at home: SFT, reward model and PPO over one frozen 4-bit backbone.",
    epilog="Try:\n\nlora-rlhf run quickstart\n\nlora-rlhf recipes\n\nlora-rlhf doctor",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipeName = Annotated[
    str, typer.Argument(metavar="RECIPE", help="Name of a shipped recipe, or path of a .yaml file.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Change the recipe: ppo.kl_coef=0.1; ppo=null removes a section.",
        show_default=False,
    ),
]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="A run: its name, or its directory.")]
RunsDir = Annotated[Path, typer.Option(help="Where runs lie.")]


def main() -> None:
    """Entry point of the command `lora-rlhf`."""
    app()


def _console(stderr: bool = False) -> "Console":
    from rich.console import Console

    return Console(stderr=stderr, highlight=False)


def _say_error(text: str) -> None:
    _console(stderr=True).print(text, style="red", markup=False, soft_wrap=True)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lora-rlhf {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    hush_imports()


# -- run ----------------------------------------------------------------------------------------


@app.command(
    epilog="Try:\n\nlora-rlhf run quickstart\n\n"
    "lora-rlhf run quickstart ppo.kl_coef=0.1 seed=1 --name kl-0.1\n\n"
    "lora-rlhf run quickstart --resume\n\n"
    "lora-rlhf run quickstart ppo.steps=40 --from ppo"
)
def run(
    ctx: typer.Context,
    recipe: RecipeName,
    overrides: Overrides = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the run; unset: the recipe's, numbered if finished.")
    ] = None,
    runs_dir: RunsDir = Path("runs"),
    only: Annotated[
        str | None, typer.Option(metavar="STAGE", help="This stage alone, again.")
    ] = None,
    start_from: Annotated[
        str | None,
        typer.Option("--from", metavar="STAGE", help="This stage and all later ones, again."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a stopped run, from its last checkpoint.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Go on where a check would stop, such as a weak reward.")
    ] = False,
) -> None:
    """Run a recipe: its stages in order, into runs/NAME.

    A run that exists keeps the recipe it was started with; KEY=VALUE changes stages to come.
    """
    from lora_rlhf.continuing import open_run
    from lora_rlhf.recipe import STAGES

    if only is not None and start_from is not None:
        raise ConfigError("--only and --from exclude each other. Give one of them.")
    for option, stage in (("--only", only), ("--from", start_from)):
        if stage is not None and stage not in STAGES:
            raise ConfigError(f"{option} is {stage}. Allowed: {', '.join(STAGES)}.")
    console = _console()
    resolved, opened = open_run(
        recipe,
        overrides or [],
        runs_dir,
        name=name,
        resume=resume,
        again=only or start_from,
        alone=only is not None,
        force=force,
        tell=lambda text: console.print(text, markup=False, soft_wrap=True),
    )
    again = _resume_command(recipe, resolved, opened, runs_dir)
    ctx.meta[_RESUME] = shlex.join([*again, "--force"] if force else again)

    from lora_rlhf.pipeline import run_pipeline

    run_pipeline(
        resolved,
        opened,
        resume=resume,
        only=only,
        start_from=start_from,
        force=force,
        console=console,
    )


def _resume_command(recipe: str, resolved: "Recipe", opened: "Run", runs_dir: Path) -> list[str]:
    command = ["lora-rlhf", "run", recipe]
    if opened.name != resolved.name:
        command += ["--name", opened.name]
    if runs_dir != Path("runs"):
        command += ["--runs-dir", str(runs_dir)]
    return [*command, "--resume"]


# -- recipes, check, plan -----------------------------------------------------------------------


@app.command(
    epilog="Try:\n\nlora-rlhf recipes\n\nlora-rlhf recipes --copy qwen3-1.7b-12gb\n\n"
    "lora-rlhf run qwen3-1.7b-12gb.yaml"
)
def recipes(
    copy: Annotated[
        str | None, typer.Option(metavar="NAME", help="Copy a recipe here, to edit it.")
    ] = None,
) -> None:
    """List the shipped recipes, or copy one here."""
    from lora_rlhf.recipe_io import find_recipe, recipe_names

    console = _console()
    if copy is not None:
        source = find_recipe(copy)
        target = Path(source.name)
        if target.exists():
            raise ConfigError(f"{target} exists. Remove or rename it first; nothing was copied.")
        shutil.copyfile(source, target)
        console.print(f"Copied to {target}. Edit it, then: lora-rlhf check {target}", markup=False)
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in ("recipe", "base", "what"):
        table.add_column(heading, overflow="fold")
    for each in recipe_names():
        table.add_row(each, *_about(find_recipe(each)))
    console.print(table)
    console.print("\nlora-rlhf run quickstart", markup=False)


def _about(path: Path) -> tuple[str, str]:
    """The base of a recipe, which need not run here, and the first sentence of its header."""
    from lora_rlhf.recipe_yaml import read_yaml

    text = path.read_text(encoding="utf-8")
    return read_yaml(text)[0]["base"]["model"], text.partition("\n")[0].lstrip("# ")


@app.command(
    epilog="Try:\n\nlora-rlhf check quickstart\n\n"
    "lora-rlhf check qwen3-1.7b-12gb 'data.demonstrations={path: my.jsonl}'"
)
def check(
    recipe: RecipeName,
    overrides: Overrides = None,
    hub: Annotated[
        bool, typer.Option("--hub", help="Download and check data sets of the hub, too.")
    ] = False,
) -> None:
    """Check a recipe, its data and its memory, and train nothing."""
    from lora_rlhf.checking import check_recipe

    console = _console()
    with console.status("Checking the recipe, its data and its memory ..."):
        problems = check_recipe(recipe, overrides or [], hub, console)
    if problems:
        raise UserError(problems)


@app.command(epilog="Try:\n\nlora-rlhf plan quickstart\n\nlora-rlhf plan qwen3-8b-24gb --vram 24")
def plan(
    recipe: RecipeName,
    overrides: Overrides = None,
    vram: Annotated[
        float | None,
        typer.Option(metavar="GB", min=0.5, help="Plan for a card of this size, not for this one."),
    ] = None,
) -> None:
    """Show the memory each phase needs against a card."""
    from lora_rlhf.recipe_io import load_recipe

    loaded, console = load_recipe(recipe, overrides or []), _console()
    with console.status("Planning ..."):
        from lora_rlhf import display
        from lora_rlhf.model import memory

        planned = memory.plan(loaded, vram)
    display.render_plan(planned, console)


# -- after a run --------------------------------------------------------------------------------


@app.command(epilog="Try:\n\nlora-rlhf chat quickstart\n\nlora-rlhf chat quickstart --best-of 8")
def chat(
    run: RunName,
    best_of: Annotated[
        int, typer.Option(min=1, max=64, help="Draw so many; the reward adapter picks one.")
    ] = 1,
    runs_dir: RunsDir = Path("runs"),
) -> None:
    """Talk to the adapters of a run in the terminal."""
    from lora_rlhf.runs import find_run

    opened = find_run(run, runs_dir)
    from lora_rlhf.chat import chat as talk

    talk(opened, best_of=best_of)


@app.command(
    epilog="Try:\n\nlora-rlhf export quickstart --adapter policy --to policy\n\n"
    "lora-rlhf export quickstart --adapter policy --merge --to merged"
)
def export(
    run: RunName,
    adapter: Annotated[str, typer.Option(help="sft, reward, policy or value.")] = "policy",
    merge: Annotated[
        bool, typer.Option("--merge", help="A whole model: the adapter merged into the weights.")
    ] = False,
    to: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Unset: exports/RUN-ADAPTER.")
    ] = None,
    runs_dir: RunsDir = Path("runs"),
) -> None:
    """Write an adapter for other tools: a PEFT directory, or a merged model."""
    from lora_rlhf.continuing import ways_on
    from lora_rlhf.runs import find_run

    opened = find_run(run, runs_dir)
    has = opened.adapters()
    if adapter not in has:
        raise ConfigError(
            f"{opened.path} has no adapter {adapter}. It has: {', '.join(has) or 'none yet'}. "
            f"{ways_on(opened)}"
        )
    target = to or Path("exports") / f"{opened.name}-{adapter}{'-merged' if merge else ''}"
    if target.exists() and (target.is_file() or any(target.iterdir())):
        raise ConfigError(f"{target} exists. Give another directory with --to.")
    from lora_rlhf.model.export import export_adapter

    export_adapter(opened, adapter, merge, target)
    _console().print(f"Wrote {target}", markup=False, soft_wrap=True)


app.command(epilog=cli_evaluate.EPILOG)(cli_evaluate.evaluate)
app.command(epilog=cli_ui.EPILOG)(cli_ui.ui)
app.command(epilog=cli_protocol.EPILOG)(cli_protocol.protocol)
app.add_typer(cli_preferences.app, name="preferences")


@app.command(epilog="Try:\n\nlora-rlhf doctor")
def doctor() -> None:
    """Look at torch, CUDA, bitsandbytes and memory, and say what to do."""
    console = _console()
    with console.status("Looking at this machine ..."):
        from lora_rlhf.doctor import run_doctor

        well = run_doctor(console)
    if not well:
        raise typer.Exit(USER_ERROR)
