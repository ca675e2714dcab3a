"""From the command line to an app that is served: which runs, which store, who may come in."""

import gc
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from lora_rlhf.continuing import ways_on
from lora_rlhf.errors import ConfigError
from lora_rlhf.runs import Run, find_run
from ui.job import is_offered
from ui.people import secret_at
from ui.server import Settings, prepare_environment, serve

_BACKBONE = ("weights", "quantization", "template")  # of a fingerprint: what adapters must share


def main(
    runs: Sequence[str],
    *,
    runs_dir: Path,
    store: str,
    settings: Settings,
    say: Callable[[str], None],
) -> None:
    """Open runs and store, and serve the app until somebody stops it.

    Args:
        runs: their names or directories; none: those of the newest run's backbone.
        runs_dir: where runs lie, and where retraining makes new ones.
        store: path of an SQLite file, or a postgresql:// URL.
        settings: where and to whom.
        say: prints a line.

    Raises:
        UserError: settings, runs or a store that cannot be used.
    """
    users = settings.check()  # before anything takes time
    chosen = [find_run(name, runs_dir) for name in runs] or newest(runs_dir)
    prepare_environment()
    from ui import app
    from ui.studio import Studio

    secret = secret_at(secret_path(store, runs_dir)) if users is None else None
    studio = Studio.open(chosen, store, runs_dir)
    try:
        serve(studio, app.build_app, settings, look=app.look(), secret=secret, say=say)
    finally:
        gc.freeze()  # or the interpreter looks through all of torch and gradio before it ends


def newest(runs_dir: Path) -> list[Run]:
    """The run trained last and all others on its backbone, oldest first.

    Raises:
        ConfigError: no run has an adapter yet.
    """
    paths = sorted(runs_dir.glob("*/recipe.yaml"), key=_trained_at)
    # A retraining that nobody has adopted, or that still runs, is offered to nobody.
    offered = [Run(path.parent) for path in paths if is_offered(path.parent)]
    runs = [run for run in offered if run.adapters()]
    if not runs:
        if paths:
            begun = Run(paths[-1].parent)
            raise ConfigError(f"{begun.path} has no adapter yet. {ways_on(begun)}")
        raise ConfigError(
            f"{runs_dir} has no run with an adapter yet. Make one: lora-rlhf run quickstart"
        )
    wanted = _backbone(runs[-1])
    return [run for run in runs if _backbone(run) == wanted]


def _trained_at(recipe: Path) -> float:
    summary = recipe.with_name("summary.json")
    return (summary if summary.exists() else recipe).stat().st_mtime


def _backbone(run: Run) -> tuple[str, ...]:
    facts = run.adapter(run.adapters()[0]) / "lora_rlhf.json"
    if not facts.is_file():
        return ("an adapter of another tool", str(run.path))
    fingerprint = json.loads(facts.read_text(encoding="utf-8"))["fingerprint"]
    return tuple(fingerprint[key] for key in _BACKBONE)


def secret_path(store: str, runs_dir: Path) -> Path:
    """Beside the store, so that whoever moves the one moves the other."""
    if "://" in store:
        return runs_dir / ".ui-secret"
    path = Path(store).expanduser()
    return path.with_name(f"{path.name}.secret")
